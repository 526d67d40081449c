"""Which waiting rows make the next batch, and how equal prefixes become a tree. Pure: values in, values out.

It must not know calls, threads, deadlines or engines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dualtrace.engine import NOTHING, Batch, IntArray, Read, Segment
from dualtrace.rows import Row

BLOCK_TOKENS = 16
"""Prefixes are compared in blocks of this size when a batch is filled, and never shared when shorter."""


class UniqueTokens:
    """Counts what rows would cost if equal prefixes were computed once, a row at a time, in O(length) each."""

    def __init__(self, share: bool) -> None:
        self._share = share
        self._seen: set[tuple[int, int]] = set()
        self.total = 0

    def cost(self, row: Row) -> int:
        return row.length - self._known(row)

    def add(self, row: Row) -> None:
        self.total += self.cost(row)
        if self._share:
            self._seen.update(_prefix_hashes(row))

    def _known(self, row: Row) -> int:
        if not self._share or not self._seen:
            return 0
        known = 0
        for end, digest in _prefix_hashes(row):
            if (end, digest) not in self._seen:
                break
            known = end
        return known


def _prefix_hashes(row: Row) -> Iterable[tuple[int, int]]:
    """(end, hash of everything before end) for each whole block. A collision costs a worse batch, never a number."""
    running = 0
    for end in range(BLOCK_TOKENS, row.length + 1, BLOCK_TOKENS):
        block = slice(end - BLOCK_TOKENS, end)
        running = hash((running, row.ids[block].tobytes(), row.positions[block].tobytes()))
        yield end, running


def fill(rows: Iterable[Row], budget_tokens: int, *, share: bool) -> int:
    """How many of the rows, taken in order, fit the budget. The first always fits: a long row must run some time."""
    unique = UniqueTokens(share)
    taken = 0
    for row in rows:
        if taken and unique.total + unique.cost(row) > budget_tokens:
            break
        unique.add(row)
        taken += 1
    return taken


@dataclass(frozen=True)
class Layout:
    """A batch and its reads, with the way back from segments to the rows they came from."""

    batch: Batch
    reads: tuple[Read, ...]
    row_of_segment: tuple[int | None, ...]  # None for a segment that is only a shared prefix
    prefix_users: tuple[tuple[int, ...], ...]  # per segment: rows that share it; () for a row's own segment
    shared_tokens: tuple[int, ...]  # per row: tokens that another row's computation gave it


def lay_out(rows: Sequence[Row], *, share: bool, deterministic: bool = False) -> Layout:
    """Build the batch: rows with an equal prefix get a common parent (depth one) where that saves tokens."""
    groups = _group(rows) if share and not deterministic else [_Group((i,), 0) for i in range(len(rows))]
    segments: list[Segment] = []
    reads: list[Read] = []
    row_of_segment: list[int | None] = []
    users: list[tuple[int, ...]] = []
    shared = [0] * len(rows)
    for group in groups:
        parent = None
        if group.prefix:
            first = rows[group.members[0]]
            parent = len(segments)
            segments.append(Segment(first.ids[: group.prefix], first.positions[: group.prefix]))
            reads.append(NOTHING)
            row_of_segment.append(None)
            users.append(group.members)
        for place, index in enumerate(group.members):
            row = rows[index]
            segments.append(Segment(row.ids[group.prefix :], row.positions[group.prefix :], parent))
            reads.append(row.read)
            row_of_segment.append(index)
            users.append(())
            shared[index] = group.prefix if place else 0  # the first member is charged for the prefix
    return Layout(
        Batch(tuple(segments), deterministic), tuple(reads), tuple(row_of_segment), tuple(users), tuple(shared)
    )


@dataclass(frozen=True)
class _Group:
    members: tuple[int, ...]  # row indices
    prefix: int  # tokens they share; 0 for a row alone


def _group(rows: Sequence[Row]) -> list[_Group]:
    """Greedy over the rows in lexicographic order: neighbours there share the longest prefixes."""
    order = sorted(range(len(rows)), key=lambda i: (rows[i].ids.astype(">i4").tobytes(), i))
    groups: list[_Group] = []
    members: list[int] = []
    prefix = 0
    for index in order:
        if members:
            common = common_prefix(rows[members[-1]], rows[index])
            narrowed = common if len(members) == 1 else min(prefix, common)
            saved_now = (len(members) - 1) * prefix
            if narrowed >= BLOCK_TOKENS and len(members) * narrowed > saved_now:
                members.append(index)
                prefix = narrowed
                continue
            groups.append(_Group(tuple(members), prefix if len(members) > 1 else 0))
        members, prefix = [index], 0
    if members:
        groups.append(_Group(tuple(members), prefix if len(members) > 1 else 0))
    return groups


def common_prefix(left: Row, right: Row) -> int:
    """Rows [0, p) of both have the same ids at the same positions."""
    n = min(left.length, right.length)
    return min(_equal_until(left.ids[:n], right.ids[:n]), _equal_until(left.positions[:n], right.positions[:n]))


def _equal_until(left: IntArray, right: IntArray) -> int:
    different = np.flatnonzero(left != right)
    return int(different[0]) if different.size else int(left.shape[0])
