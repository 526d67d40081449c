"""From a resolved mask to run-lengths, once per distinct rule: base, edges, native window, empty_row, in that order.

Layers and heads that fall under the same base slice, edges and window share one Rule. This is the compiler; `naive`
evaluates the same mask entry by entry and must not be used here, nor this there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dualtrace.masks import runs as r
from dualtrace.masks import spec as s
from dualtrace.masks.limits import MAX_TOGGLES
from dualtrace.masks.resolve import Cut, ResolvedMask, document_of_rows
from dualtrace.problems import InvalidArgument, Reason

Longs = npt.NDArray[np.int64]
BaseKey = tuple[bytes, ...]


@dataclass(frozen=True, eq=False)
class Rule:
    """What every (layer, head) of one kind may see."""

    base: r.Runs  # the base expression alone
    allowed: r.Runs  # pre-softmax, after everything
    zeroed: r.Runs | None  # allowed entries whose weight is set to zero after the softmax; None when there are none
    emptied: Longs  # [E] rows that saw nothing before empty_row was applied, ascending
    window: int | None


@dataclass(frozen=True, eq=False)
class Compiled:
    rules: tuple[Rule, ...]
    rule_of: npt.NDArray[np.int32]  # [L,H] index into rules
    unmasked: dict[int | None, r.Runs]  # native window -> what a layer with it sees without any mask


def compile_rules(resolved: ResolvedMask, budget: r.Budget) -> Compiled:
    compiler = _Compiler(resolved, budget)
    geometry = resolved.context.geometry
    rule_of = np.empty((geometry.layers, geometry.heads), np.int32)
    found: dict[tuple[BaseKey, bytes, int | None], int] = {}
    rules: list[Rule] = []
    for layer in range(geometry.layers):
        window = None if resolved.spec.replace_native else geometry.window(layer)
        for head in range(geometry.heads):
            key = (compiler.base_key(layer, head), compiler.cut_key(layer, head), window)
            if key not in found:
                found[key] = len(rules)
                rules.append(compiler.rule(layer, head, key))
            rule_of[layer, head] = found[key]
    windows = {geometry.window(layer) for layer in range(geometry.layers)}
    unmasked = {window: unmasked_runs(resolved.context.length, window, budget) for window in windows}
    return Compiled(tuple(rules), rule_of, unmasked)


def unmasked_runs(length: int, window: int | None, budget: r.Budget) -> r.Runs:
    """What the model sees of a plain text when no mask is asked: causal and the layer's own window."""
    rows = np.arange(length, dtype=np.int64)
    starts = np.zeros_like(rows) if window is None else rows - window + 1
    return r.one_run_a_row(length, starts, rows + 1, budget)


class _Compiler:
    def __init__(self, resolved: ResolvedMask, budget: r.Budget) -> None:
        self.resolved = resolved
        self.budget = budget
        self.length = resolved.context.length
        self.kept = 0  # toggles that stay in memory
        self.arrays = tuple(_arrays(resolved.base))
        self.slice_keys: dict[tuple[int, int, int], bytes] = {}
        self.bases: dict[BaseKey, r.Runs] = {}
        self.cuts: dict[tuple[s.CutMode, bytes], r.Runs] = {}
        geometry = resolved.context.geometry
        self.layer_hits = _membership([cut.layers for cut in resolved.cuts], geometry.layers)
        self.head_hits = _membership([cut.heads for cut in resolved.cuts], geometry.heads)

    def base_key(self, layer: int, head: int) -> BaseKey:
        """Equal for (layer, head) pairs that see the same slices of every array."""
        return tuple(self._slice_key(i, layer, head) for i in range(len(self.arrays)))

    def _slice_key(self, index: int, layer: int, head: int) -> bytes:
        rank = self.arrays[index].shape
        place = (index, layer if len(rank) == 4 else 0, head if len(rank) >= 3 else 0)
        if place not in self.slice_keys:
            content = np.packbits(array_slice(self.arrays[index], layer, head))
            self.slice_keys[place] = hashlib.blake2b(content.tobytes(), digest_size=32).digest()
        return self.slice_keys[place]

    def cut_key(self, layer: int, head: int) -> bytes:
        return np.packbits(self.layer_hits[:, layer] & self.head_hits[:, head]).tobytes()

    def rule(self, layer: int, head: int, key: tuple[BaseKey, bytes, int | None]) -> Rule:
        base_key, cut_key, window = key
        if base_key not in self.bases:
            self.bases[base_key] = self._keep(self.expression(self.resolved.base, layer, head))
        base = allowed = self.bases[base_key]
        if (cut := self._cut(s.CutMode.PRE_SOFTMAX, cut_key)).toggles.size:
            allowed = r.without(allowed, cut, self.budget)
        if window is not None:
            allowed = r.within_window(allowed, self.resolved.positions, window, self.budget)
        emptied = allowed.empty_rows()
        if emptied.size and self.resolved.spec.empty_row is s.EmptyRow.SELF:
            alone = r.of_intervals(self.length, emptied, emptied, emptied + 1, self.budget)
            allowed = r.either(allowed, alone, self.budget)
        zeroed = None
        if (zero := self._cut(s.CutMode.POST_SOFTMAX_ZERO, cut_key)).toggles.size:
            zeroed = self._keep(r.both(allowed, zero, self.budget))
        if allowed is not base:
            self._keep(allowed)
        return Rule(base, allowed, zeroed if zeroed is not None and zeroed.toggles.size else None, emptied, window)

    def _keep(self, runs: r.Runs) -> r.Runs:
        self.kept += runs.toggles.size
        if self.kept > MAX_TOGGLES:
            raise InvalidArgument(
                Reason.MASK_TOO_LARGE,
                "the mask has too many different rules for its layers and heads to be kept",
                allowed=f"{MAX_TOGGLES} run starts and ends",
            )
        return runs

    def _cut(self, mode: s.CutMode, cut_key: bytes) -> r.Runs:
        """The union of all edges of one mode that hit a rule."""
        if (mode, cut_key) not in self.cuts:
            hits = np.unpackbits(np.frombuffer(cut_key, np.uint8), count=len(self.resolved.cuts)).astype(np.bool_)
            hit = [cut for cut, is_hit in zip(self.resolved.cuts, hits, strict=True) if is_hit and cut.mode is mode]
            self.cuts[mode, cut_key] = self._keep(_rectangles(self.length, hit, self.budget))
        return self.cuts[mode, cut_key]

    def expression(self, node: s.Expression, layer: int, head: int) -> r.Runs:
        match node:
            case s.All(terms):
                return self._fold(r.both, terms, layer, head)
            case s.AnyOf(terms):
                return self._fold(r.either, terms, layer, head)
            case s.Not(term):
                everything = self._leaf(s.Full())
                return r.without(everything, self.expression(term, layer, head), self.budget)
            case s.Minus(source, take):
                seen = self.expression(source, layer, head)
                return r.without(seen, self.expression(take, layer, head), self.budget)
            case s.Array(content):
                assert content is not None
                return r.of_matrix(array_slice(content.values, layer, head), self.budget)
            case s.DocIsolation():
                return _documents(document_of_rows(node, self.resolved.context), self.budget)
            case _:
                return self._leaf(node)

    def _fold(self, operation: r.Operation, terms: tuple[s.Expression, ...], layer: int, head: int) -> r.Runs:
        result = self.expression(terms[0], layer, head)
        for term in terms[1:]:
            result = operation(result, self.expression(term, layer, head), self.budget)
        return result

    def _leaf(self, node: s.Expression) -> r.Runs:
        """Bases with one run a row."""
        prefix = self.resolved.context.prefix
        rows = np.arange(self.length, dtype=np.int64)
        starts, ends = np.zeros_like(rows), rows + 1
        match node:
            case s.Causal():
                pass
            case s.Full():
                ends = np.full_like(rows, self.length)
            case s.BidirectionalPrefix(n):
                assert n is not None
                ends = np.maximum(ends, n + prefix)
            case s.Sliding(keys_back, keys_ahead):
                starts, ends = rows - keys_back + 1, rows + keys_ahead + 1
            case s.Chunked(size):
                chunks = np.maximum(rows - prefix, 0) // size
                starts = np.where(chunks > 0, chunks * size + prefix, 0)
            case _:
                raise AssertionError(node)
        return r.one_run_a_row(self.length, starts, ends, self.budget)


def array_slice(values: npt.NDArray[np.bool_], layer: int, head: int) -> npt.NDArray[np.bool_]:
    """[T,T] of an array of any rank."""
    return values[(layer, head)[4 - values.ndim :]] if values.ndim > 2 else values


def _arrays(node: s.Expression) -> Iterator[npt.NDArray[np.bool_]]:
    match node:
        case s.All(terms) | s.AnyOf(terms):
            for term in terms:
                yield from _arrays(term)
        case s.Not(term):
            yield from _arrays(term)
        case s.Minus(source, take):
            yield from _arrays(source)
            yield from _arrays(take)
        case s.Array(content) if content is not None:
            yield content.values
        case _:
            pass


def _membership(lists: list[tuple[int, ...] | None], extent: int) -> npt.NDArray[np.bool_]:
    """[edges, extent] whether each edge names each layer (or head)."""
    table = np.zeros((len(lists), extent), np.bool_)
    for row, indices in zip(table, lists, strict=True):
        row[slice(None) if indices is None else list(indices)] = True
    return table


def _rectangles(length: int, cuts: list[Cut], budget: r.Budget) -> r.Runs:
    if not cuts:
        return r.no_runs(length)
    heights = np.array([cut.q1 - cut.q0 for cut in cuts], np.int64)
    budget.spend(int(heights.sum()))
    rows = np.concatenate([np.arange(cut.q0, cut.q1, dtype=np.int64) for cut in cuts])
    starts = np.repeat(np.array([cut.k0 for cut in cuts], np.int64), heights)
    ends = np.repeat(np.array([cut.k1 for cut in cuts], np.int64), heights)
    return r.of_intervals(length, rows, starts, ends, budget)


def _documents(documents: Longs, budget: r.Budget) -> r.Runs:
    """k <= q and the same document. A document may come back after another one: then a row has several runs."""
    length = documents.size
    piece_starts = np.concatenate(([0], np.flatnonzero(np.diff(documents)) + 1)).astype(np.int64)
    piece_ends = np.append(piece_starts[1:], length)
    order = np.argsort(documents[piece_starts], kind="stable")
    grouped = documents[piece_starts][order]
    earlier = np.arange(order.size) - np.searchsorted(grouped, grouped, side="left")  # pieces of the same document
    place = np.empty_like(order)
    place[order] = np.arange(order.size)
    rows = np.arange(length, dtype=np.int64)
    row_place = place[np.repeat(np.arange(order.size), piece_ends - piece_starts)]
    copies = earlier[row_place] + 1
    budget.spend(4 * int(copies.sum()))
    back = np.arange(int(copies.sum())) - np.repeat(np.cumsum(copies) - copies, copies)
    piece = order[np.repeat(row_place, copies) - back]
    row = np.repeat(rows, copies)
    return r.of_intervals(length, row, piece_starts[piece], np.minimum(piece_ends[piece], row + 1), budget)
