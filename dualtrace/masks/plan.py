"""What an engine obeys: a mask compiled for one sequence and one model.

It knows run-lengths per rule and answers from them; no [T,T] array is ever built except the rows a caller asks for.
It must not know how a rule came about (`rules`) or how an engine applies it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dualtrace.arrays import IntArray
from dualtrace.masks import runs as r
from dualtrace.masks import spec as s
from dualtrace.masks.leaks import leaking_rows
from dualtrace.masks.resolve import ResolvedMask, document_starts
from dualtrace.masks.rules import Compiled, Rule, compile_rules, unmasked_runs
from dualtrace.problems import InvalidArgument, Reason

Bools = npt.NDArray[np.bool_]
DOCUMENT_START = "DOCUMENT_START"


@dataclass(frozen=True)
class Unscored:
    """A token that has no logprob under this mask, and why."""

    token: int
    reason: str


def compile_mask(resolved: ResolvedMask, *, allow_empty_rows: bool = False, budget: r.Budget | None = None) -> MaskPlan:
    """The plan of a mask. Rows that may see nothing are refused under ERROR; explaining a mask allows them."""
    plan = MaskPlan(resolved, compile_rules(resolved, r.Budget() if budget is None else budget))
    if resolved.spec.empty_row is s.EmptyRow.ERROR and not allow_empty_rows:
        plan.refuse_empty_rows()
    return plan


class MaskPlan:
    def __init__(self, resolved: ResolvedMask, compiled: Compiled) -> None:
        self.resolved = resolved
        self.length = resolved.context.length
        self.layers, self.heads = compiled.rule_of.shape
        self.rules: tuple[Rule, ...] = compiled.rules  # each distinct rule once
        self.rule_of = compiled.rule_of  # [L,H] int32, index into rules
        self._unmasked = compiled.unmasked

    def rule(self, layer: int, head: int) -> Rule:
        return self.rules[int(self.rule_of[layer, head])]

    def unmasked(self, layer: int) -> r.Runs:
        """What this layer sees of a plain text when no mask is asked: causal and its own window."""
        return self._unmasked[self.resolved.context.geometry.window(layer)]

    def layer_groups(self) -> tuple[tuple[int, ...], ...]:
        """Layers whose heads all have the same rules: one block serves a whole group."""
        groups: dict[bytes, list[int]] = {}
        for layer in range(self.layers):
            groups.setdefault(self.rule_of[layer].tobytes(), []).append(layer)
        return tuple(tuple(group) for group in groups.values())

    # ---- what a forward needs

    def block(self, layer: int, q0: int, q1: int) -> Bools:
        """May see, pre-softmax: [H or 1, q1-q0, T], True = may see. One head means all heads are alike."""
        return self._stack(layer, lambda rule: rule.allowed.block(q0, q1))

    def zero_block(self, layer: int, q0: int, q1: int) -> Bools | None:
        """Weights set to zero after the softmax: [H or 1, q1-q0, T]; None when this layer has none at all."""
        if all(self.rules[i].zeroed is None for i in set(self.rule_of[layer].tolist())):
            return None
        return self._stack(layer, lambda rule: _zeroed(rule).block(q0, q1))

    def zero_rows(self, layer: int, q0: int, q1: int) -> Bools | None:
        """Rows whose attention output is zero because they may see nothing: [H or 1, q1-q0]; None when none is."""
        if self.resolved.spec.empty_row is s.EmptyRow.SELF or not any(
            self.rules[i].emptied.size for i in set(self.rule_of[layer].tolist())
        ):
            return None
        return self._stack(layer, lambda rule: np.isin(np.arange(q0, q1), rule.emptied))

    def _stack(self, layer: int, build: Callable[[Rule], Bools]) -> Bools:
        heads = self.rule_of[layer]
        different, place = np.unique(heads, return_inverse=True)
        blocks = np.stack([build(self.rules[i]) for i in different])
        return blocks if different.size == 1 else blocks[place]

    def positions(self) -> IntArray | None:
        """[T] int32 the positions that doc_isolation set; None when the mask leaves positions alone."""
        return self.resolved.positions.astype(np.int32) if self.resolved.resets_positions else None

    @cached_property
    def _step_ends(self) -> IntArray:
        reach = np.zeros(self.length, np.int64)
        for rule in self.rules:
            np.maximum(reach, rule.allowed.reach(), out=reach)
        cuts = np.arange(1, self.length + 1)
        return cuts[np.maximum.accumulate(reach) <= cuts].astype(np.int32)

    def step_ends(self) -> IntArray:
        """[C] int32 every c in 1..T such that no row below c sees a key at or above c; T is always one."""
        return self._step_ends

    def row_runs(self, layer: int, head: int, q: int) -> tuple[tuple[int, int], ...]:
        """What one row may see, as runs [start, end)."""
        return self.rule(layer, head).allowed.row(q)

    # ---- what it is like

    def is_plain_causal(self) -> bool:
        """Every row sees exactly itself and all before it, everywhere; says nothing about positions."""
        causal = unmasked_runs(self.length, None, r.Budget())
        return all(_same(rule.allowed, causal) and rule.zeroed is None for rule in self.rules)

    def is_unmasked(self) -> bool:
        """The model without this mask would do the same, so an engine may run its native path."""
        consecutive = bool((np.diff(self.resolved.positions) == 1).all())
        if self.resolved.resets_positions or not (consecutive or set(self._unmasked) == {None}):
            return False
        pairs = {
            (int(i), self.resolved.context.geometry.window(n)) for n in range(self.layers) for i in self.rule_of[n]
        }
        return all(
            self.rules[i].zeroed is None and _same(self.rules[i].allowed, self._unmasked[window]) for i, window in pairs
        )

    def unscored(self) -> tuple[Unscored, ...]:
        """Tokens (prefix not counted) that would be read from another document's row."""
        starts = document_starts(self.resolved.base, self.resolved.context)
        return tuple(Unscored(token, DOCUMENT_START) for token in starts)

    def sparsity(self) -> float:
        """Share of entries that may not be seen, over all layers and heads."""
        uses = np.bincount(self.rule_of.reshape(-1), minlength=len(self.rules))
        seen = sum(int(n) * rule.allowed.count() for n, rule in zip(uses, self.rules, strict=True))
        return 1 - seen / (self.rule_of.size * self.length**2)

    def shape(self) -> str:
        """The smallest array that could hold this mask."""
        if len(self.rules) == 1:
            return "[T,T]"
        return "[H,T,T]" if len(self.layer_groups()) == 1 else "[L,H,T,T]"

    # ---- rows that see nothing, rows that see too much

    def empty_rows(self, layer: int, head: int) -> IntArray:
        """[E] int32 rows that may see nothing here before empty_row is applied, ascending."""
        return self.rule(layer, head).emptied.astype(np.int32)

    def rows_emptied(self) -> int:
        """How many (layer, head, row) may see nothing before empty_row is applied."""
        uses = np.bincount(self.rule_of.reshape(-1), minlength=len(self.rules))
        return sum(int(n) * rule.emptied.size for n, rule in zip(uses, self.rules, strict=True))

    def refuse_empty_rows(self) -> None:
        total = self.rows_emptied()
        if total:
            layer, head = next(
                (n, h) for n in range(self.layers) for h in range(self.heads) if self.rule(n, h).emptied.size
            )
            row = int(self.rule(layer, head).emptied[0])
            raise InvalidArgument(
                Reason.EMPTY_ROW,
                f"row {row} of layer {layer}, head {head} may see nothing ({total} such rows in all); "
                "let it see something, or set empty_row",
                field="empty_row",
                allowed="ZERO, SELF",
            )

    @cached_property
    def _leaks(self) -> tuple[int, ...]:
        return leaking_rows(
            [[self.rules[i].allowed for i in np.unique(self.rule_of[layer])] for layer in range(self.layers)]
        )

    def leaks(self) -> tuple[int, ...]:
        """Rows that see the token they predict, ascending. LEAK_UNKNOWN when that is too dear to find out."""
        return self._leaks

    def refuse_leaks(self, rows_read: Iterable[int]) -> None:
        """Call it unless the request says allow_leak."""
        leaking = sorted(set(self.leaks()) & set(rows_read))
        if leaking:
            raise InvalidArgument(
                Reason.LEAK,
                f"row {leaking[0]} sees the token it predicts ({len(leaking)} such rows are read); "
                "change the mask, or say allow_leak",
                field="allow_leak",
            )

    # ---- two masks over one beginning

    def shared_prefix(self, other: MaskPlan) -> int:
        """The largest p for which rows [0, p) agree, in every layer, head and position, and see no key at or above p.

        Ids and views are the caller's to compare.
        """
        assert (self.layers, self.heads) == (other.layers, other.heads)
        rows = min(self.length, other.length)
        unequal = np.flatnonzero(self.resolved.positions[:rows] != other.resolved.positions[:rows])
        agree = int(unequal[0]) if unequal.size else rows
        pairs = np.unique(np.stack([self.rule_of.reshape(-1), other.rule_of.reshape(-1)]), axis=1)
        for mine, theirs in pairs.T:
            agree = min(agree, _agreement(self.rules[mine], other.rules[theirs]))
        cuts = self.step_ends()
        return int(cuts[cuts <= agree].max(initial=0))


def _same(a: r.Runs, b: r.Runs) -> bool:
    return a.length == b.length and np.array_equal(a.toggles, b.toggles)


def _agreement(mine: Rule, theirs: Rule) -> int:
    """The first row in which two rules differ."""
    allowed = mine.allowed.first_difference(theirs.allowed)
    if mine.zeroed is None and theirs.zeroed is None:
        return allowed
    return min(allowed, _zeroed(mine).first_difference(_zeroed(theirs)))


def _zeroed(rule: Rule) -> r.Runs:
    return r.no_runs(rule.allowed.length) if rule.zeroed is None else rule.zeroed
