"""The proof that an engine applied a mask: counts taken from the applied tensor, compared with the compiler's.

An engine tallies, where the mask meets the attention weights, per (layer, head):

    rows        rows to which a mask was applied
    empty_rows  of these, rows in which no entry was allowed
    allowed     entries (q, k) allowed before the softmax
    sum_a/b     over these entries, mix_a(q, k) and mix_b(q, k), modulo 2**32
    zeroed      entries that were allowed and whose weight was set to zero after the softmax, with the same two sums

q and k are root-to-leaf rows of one sequence, padding excluded, so the tallies of shared and own rows add up.

    mix_x(q, k) = f_x(q) * g_x(k) mod 2**32,  f_x(q) = h(q, FX) | 1,  g_x(k) = h(k, GX)
    h(n, seed): n = n * 0x9E3779B1 + seed; n ^= n >> 16; n *= 0x85EBCA6B; n ^= n >> 13; n *= 0xC2B2AE35; n ^= n >> 16
    seeds: FA = 0x243F6A88, GA = 0x85A308D3, FB = 0x13198A2E, GB = 0x03707344; uint32, wrapping, logical shifts

so inside a compiled function a sum is `f @ (block @ g)` in 32-bit wrapping integers, and over a run of keys it is a
difference of two prefix sums. f is odd: a change inside one row can never vanish.

Two sets of a layer: N, what the model sees of a plain text without a mask (causal and the layer's own window), and A,
what was applied (allowed and not zeroed). Then

    layers_applied, heads_applied    tallied with at least one row
    layers_hit, heads_hit            the tallied sums differ from those of N, or something was zeroed
    entries_cut                      entries of N that are not in A, over all (layer, head)
    entries_cut_that_base_allowed    of these, entries that the base expression allows: what edges took
    rows_emptied                     (layer, head, row) that saw nothing before empty_row was applied

The last three are the tallied counts plus constants of the plan, so they move when the engine's tallies move. Once
`check` has passed they are exact. It knows plans and counts. It must not know frameworks.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dualtrace.masks import runs as r
from dualtrace.masks import spec as s
from dualtrace.masks.plan import MaskPlan
from dualtrace.problems import Internal, Reason

Bools = npt.NDArray[np.bool_]
Longs = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint32]

SEEDS = {"f_a": 0x243F6A88, "g_a": 0x85A308D3, "f_b": 0x13198A2E, "g_b": 0x03707344}


@dataclass(frozen=True, eq=False)
class Mix:
    """The factors of both mixes for indices 0 .. length-1, each [length] uint32."""

    f_a: Words
    g_a: Words
    f_b: Words
    g_b: Words


@lru_cache(maxsize=8)
def mix(length: int) -> Mix:
    """Read-only tables; engines copy them to their device once per length."""
    tables = {}
    for name, seed in SEEDS.items():
        values = np.arange(length, dtype=np.uint32) * np.uint32(0x9E3779B1) + np.uint32(seed)
        values ^= values >> np.uint32(16)
        values *= np.uint32(0x85EBCA6B)
        values ^= values >> np.uint32(13)
        values *= np.uint32(0xC2B2AE35)
        values ^= values >> np.uint32(16)
        if name.startswith("f"):
            values |= np.uint32(1)
        values.setflags(write=False)
        tables[name] = values
    return Mix(**tables)


@dataclass(frozen=True, eq=False)
class Counts:
    """Tallies per (layer, head), each [L,H]; the sums are uint32 and wrap. Disjoint parts of one mask add up."""

    rows: Longs
    empty_rows: Longs
    allowed: Longs
    sum_a: Words
    sum_b: Words
    zeroed: Longs
    zeroed_sum_a: Words
    zeroed_sum_b: Words

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def digest(self, length: int) -> str:
        """SHA-256 of "dualtrace.mask.v1\\n", then little-endian uint32 layers, heads, length; then per layer, per head:
        uint64 allowed, uint32 sum_a, uint32 sum_b, uint64 zeroed, uint32 zeroed_sum_a, uint32 zeroed_sum_b."""
        layers, heads = self.allowed.shape
        packed = [b"dualtrace.mask.v1\n", struct.pack("<III", layers, heads, length)]
        columns = (self.allowed, self.sum_a, self.sum_b, self.zeroed, self.zeroed_sum_a, self.zeroed_sum_b)
        for values in zip(*(column.reshape(-1).tolist() for column in columns), strict=True):
            packed.append(struct.pack("<QIIQII", *values))
        return "sha256:" + hashlib.sha256(b"".join(packed)).hexdigest()


def no_counts(layers: int, heads: int) -> Counts:
    def zeros(kind: type[np.int64] | type[np.uint32]) -> npt.NDArray[np.int64 | np.uint32]:
        return np.zeros((layers, heads), kind)

    kinds = (np.uint32 if "sum" in f.name else np.int64 for f in fields(Counts))
    return Counts(*(zeros(kind) for kind in kinds))  # type: ignore[arg-type]


class Tally:
    """Collects what an engine applied, step by step and layer by layer."""

    def __init__(self, layers: int, heads: int) -> None:
        self.heads = heads
        self._counts = no_counts(layers, heads)

    def add(self, layer: int, allowed: Bools, q0: int, *, zeroed: Bools | None = None) -> None:
        """Whole rows q0 .. of one layer: allowed [H or 1, Qc, K] and zeroed alike, K keys from key 0, no padding."""
        self._add_entries(layer, allowed, zeroed, q0, 0)
        self._counts.rows[layer] += allowed.shape[1]
        self._counts.empty_rows[layer] += (~allowed.any(axis=2)).sum(axis=1)

    def add_part(self, layer: int, allowed: Bools, q0: int, k0: int, *, zeroed: Bools | None = None) -> None:
        """Some keys, k0 .., of rows q0 ..: for engines that attend to a prefix and to own keys apart. Tell the rows
        themselves with `add_rows`, once, when all their keys have been seen."""
        self._add_entries(layer, allowed, zeroed, q0, k0)

    def add_rows(self, layer: int, sees_something: Bools) -> None:
        """[H or 1, Qc] whether each row sees any key."""
        self._counts.rows[layer] += sees_something.shape[1]
        self._counts.empty_rows[layer] += (~sees_something).sum(axis=1)

    def add_counts(self, counts: Counts) -> None:
        """What a compiled function counted itself."""
        self._counts = self._counts + counts

    def _add_entries(self, layer: int, allowed: Bools, zeroed: Bools | None, q0: int, k0: int) -> None:
        assert allowed.shape[0] in (1, self.heads)
        counts = self._counts
        columns = [(allowed, counts.allowed, counts.sum_a, counts.sum_b)]
        if zeroed is not None:
            columns.append((zeroed & allowed, counts.zeroed, counts.zeroed_sum_a, counts.zeroed_sum_b))
        for block, total, sum_a, sum_b in columns:
            entries, a, b = count_block(block, q0, k0)
            total[layer] += entries
            sum_a[layer] += a
            sum_b[layer] += b

    def counts(self) -> Counts:
        return self._counts


def count_block(block: Bools, q0: int, k0: int = 0) -> tuple[Longs, Words, Words]:
    """Per head of a block [H,Qc,K] of rows q0 .. and keys k0 ..: entries [H], sum_a [H], sum_b [H]."""
    rows, keys = slice(q0, q0 + block.shape[1]), slice(k0, k0 + block.shape[2])
    tables = mix(max(rows.stop, keys.stop))
    entries = block.sum(axis=(1, 2), dtype=np.int64)
    words = block.astype(np.uint32)
    sum_a = ((words @ tables.g_a[keys]) * tables.f_a[rows]).sum(axis=1, dtype=np.uint32)
    sum_b = ((words @ tables.g_b[keys]) * tables.f_b[rows]).sum(axis=1, dtype=np.uint32)
    return entries, sum_a, sum_b


def count_runs(runs: r.Runs) -> tuple[int, int, int]:
    """Entries and both sums of a whole matrix, from its run-lengths."""
    tables, width = mix(runs.length), runs.length + 1
    factors = [
        (f, np.concatenate((np.zeros(1, np.uint32), np.cumsum(g, dtype=np.uint32))))  # wraps
        for f, g in ((tables.f_a, tables.g_a), (tables.f_b, tables.g_b))
    ]
    sums = [0, 0]
    for (toggles,) in r.slabs(runs.length, runs.toggles):
        rows = toggles[0::2] // width
        starts, ends = toggles[0::2] - rows * width, toggles[1::2] - rows * width
        for i, (f, before) in enumerate(factors):
            sums[i] += int(((before[ends] - before[starts]) * f[rows]).sum(dtype=np.uint32))
    return runs.count(), sums[0] % 2**32, sums[1] % 2**32


def expected_counts(plan: MaskPlan) -> Counts:
    """What an engine that applies the plan exactly must tally: from run-lengths, once per distinct rule."""
    per_rule = []
    for rule in plan.rules:
        zeroed = (0, 0, 0) if rule.zeroed is None else count_runs(rule.zeroed)
        per_rule.append((plan.length, rule.allowed.empty_rows().size, *count_runs(rule.allowed), *zeroed))
    columns = np.array(per_rule, np.int64)[plan.rule_of]  # [L,H,8]
    return Counts(
        *(
            columns[:, :, i].astype(np.uint32 if "sum" in f.name else np.int64)  # type: ignore[arg-type]
            for i, f in enumerate(fields(Counts))
        )
    )


@dataclass(frozen=True, eq=False)
class Receipt:
    """What was applied, as the module docstring defines it."""

    counts: Counts
    effective_mask_digest: str
    layers_hit: tuple[int, ...]
    heads_hit: tuple[tuple[int, ...], ...]  # one entry per layer of layers_hit
    layers_applied: tuple[int, ...]
    heads_applied: tuple[tuple[int, ...], ...]  # one entry per layer of layers_applied
    entries_cut: int
    entries_cut_that_base_allowed: int
    rows_emptied: int


def write_receipt(plan: MaskPlan, counts: Counts) -> Receipt:
    """The receipt of what an engine tallied."""
    applied = counts.rows > 0  # [L,H]
    distinct = {id(runs): runs for runs in map(plan.unmasked, range(plan.layers))}
    unmasked = {key: count_runs(runs) for key, runs in distinct.items()}
    plain = np.array([unmasked[id(plan.unmasked(layer))] for layer in range(plan.layers)])[:, None, :]  # [L,1,3]
    tallied = np.stack([counts.allowed, counts.sum_a.astype(np.int64), counts.sum_b.astype(np.int64)], axis=2)
    hit = applied & ((tallied != plain).any(axis=2) | (counts.zeroed > 0))
    seen = counts.allowed - counts.zeroed
    restored = plan.rows_emptied() if plan.resolved.spec.empty_row is s.EmptyRow.SELF else 0
    return Receipt(
        counts=counts,
        effective_mask_digest=counts.digest(plan.length),
        layers_hit=_layers(hit),
        heads_hit=_heads(hit),
        layers_applied=_layers(applied),
        heads_applied=_heads(applied),
        entries_cut=_cut(plan, seen, lambda n, base: n),
        entries_cut_that_base_allowed=_cut(plan, seen, lambda n, base: r.both(n, base, r.Budget())),
        rows_emptied=int(counts.empty_rows.sum()) + restored,
    )


def expected_receipt(plan: MaskPlan) -> Receipt:
    return write_receipt(plan, expected_counts(plan))


def effective_mask_digest(plan: MaskPlan) -> str:
    return expected_counts(plan).digest(plan.length)


def _layers(table: Bools) -> tuple[int, ...]:
    return tuple(np.flatnonzero(table.any(axis=1)).tolist())


def _heads(table: Bools) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(np.flatnonzero(row).tolist()) for row in table if row.any())


def _cut(plan: MaskPlan, seen: Longs, yardstick: Callable[[r.Runs, r.Runs], r.Runs]) -> int:
    """Entries of the yardstick set Y that are not in A: |Y| - (|A| as tallied - |A without Y| as planned)."""
    total, cache = 0, dict[tuple[int, int | None], int]()
    for layer in range(plan.layers):
        window = plan.resolved.context.geometry.window(layer)
        for head, index in enumerate(plan.rule_of[layer].tolist()):
            if (index, window) not in cache:
                rule = plan.rules[index]
                wanted = yardstick(plan.unmasked(layer), rule.base)
                applied = rule.allowed if rule.zeroed is None else r.without(rule.allowed, rule.zeroed, r.Budget())
                cache[index, window] = wanted.count() + r.without(applied, wanted, r.Budget()).count()
            total += cache[index, window] - int(seen[layer, head])
    return total


def check(counts: Counts, plan: MaskPlan) -> Receipt:
    """The receipt, if the engine tallied exactly what the plan says; else MASK_NOT_APPLIED, naming the first place."""
    expected = expected_counts(plan)
    for column in fields(Counts):
        asked, tallied = getattr(expected, column.name), getattr(counts, column.name)
        if asked.shape != tallied.shape:
            raise Internal(
                Reason.MASK_NOT_APPLIED,
                f"the receipt covers {tallied.shape[0]} layers and {tallied.shape[1]} heads; "
                f"the model has {plan.layers} and {plan.heads}",
            )
        wrong = np.argwhere(asked != tallied)
        if wrong.size:
            layer, head = (int(i) for i in wrong[0])
            raise Internal(
                Reason.MASK_NOT_APPLIED,
                f"layer {layer}, head {head}: the engine tallied {column.name} = {tallied[layer, head]}, the mask "
                f"demands {asked[layer, head]}; {len(wrong)} of {asked.size} (layer, head) pairs differ in it. "
                "The numbers of this forward must not be used",
            )
    return write_receipt(plan, counts)
