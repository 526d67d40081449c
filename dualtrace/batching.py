"""Which waiting rows make the next batch, and how equal prefixes become a tree. Pure: values in, values out.

It must not know calls, threads, deadlines or engines.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dualtrace.arrays import IntArray
from dualtrace.engine import NOTHING, Batch, Read, Segment
from dualtrace.rows import Row

BLOCK_TOKENS = 16
"""Prefixes are compared in blocks of this size when a batch is filled, and never shared when shorter."""


MOST_MEMBERS = 1024
"""Rows that share one prefix at most: the work of grouping stays linear, and one prefix more is nothing then."""


class UniqueTokens:
    """Counts what rows would cost if equal prefixes were computed once, a row at a time, in O(length) each."""

    def __init__(self, share: bool) -> None:
        self._share = share
        self._seen: set[tuple[int, int]] = set()
        self._last_masked: Row | None = None
        self.total = 0

    def cost(self, row: Row) -> int:
        return row.length - self._known(row)

    def add(self, row: Row) -> None:
        self.total += self.cost(row)
        if not self._share:
            return
        if row.mask is None:
            self._seen.update(_prefix_hashes(row))
        else:
            self._last_masked = row

    def _known(self, row: Row) -> int:
        if not self._share:
            return 0
        if row.mask is not None:  # masks agree pair by pair, not by hash; variants of one text come one after another
            return 0 if self._last_masked is None else common_prefix(self._last_masked, row)
        known = 0
        for end, digest in _prefix_hashes(row):
            if (end, digest) not in self._seen:
                break
            known = end
        return known


def _prefix_hashes(row: Row) -> Iterable[tuple[int, int]]:
    """(end, hash of everything before end) for each whole block. A collision costs a worse batch, never a number."""
    running = hash(row.view.key)
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
    row_of_segment: tuple[int | None, ...]  # None: a shared prefix, or a row that is only measured against
    wanted_by: tuple[tuple[int, ...], ...]  # per segment: the rows that need it computed
    children: tuple[tuple[int, ...], ...]  # per segment: the rows whose prefix it is
    shared_tokens: tuple[int, ...]  # per row: tokens that another row's computation gave it


def lay_out(rows: Sequence[Row], *, share: bool, deterministic: bool = False) -> Layout:
    """Build the batch: rows with an equal prefix get a common parent (depth one) where that saves tokens.

    A row that another is measured against joins the batch when it is not among `rows`, and always comes first.
    """
    present = {id(row) for row in rows}
    bases = {id(row.against): row.against for row in rows if row.against is not None}
    everything = [*rows, *(base for key, base in bases.items() if key not in present)]
    order = _order(everything)
    groups = _group(everything, order) if share and not deterministic else [_Group((i,), 0) for i in order]
    return _Builder(everything, len(rows)).build(groups, deterministic)


class _Builder:
    """Collects segments group by group. Rows from `asked` on are there only to be measured against."""

    def __init__(self, rows: Sequence[Row], asked: int) -> None:
        self._rows = rows
        self._asked = asked
        self._segments: list[Segment] = []
        self._reads: list[Read] = []
        self._row_of_segment: list[int | None] = []
        self._wanted_by: list[tuple[int, ...]] = []
        self._children: list[tuple[int, ...]] = []
        self._segment_of: dict[int, int] = {}  # id of a Row to its segment
        self._shared = [0] * len(rows)
        self._measured: dict[int, list[int]] = {}  # id of a Row to the rows measured against it
        for index, row in enumerate(rows[:asked]):
            if row.against is not None:
                self._measured.setdefault(id(row.against), []).append(index)

    def build(self, groups: Sequence[_Group], deterministic: bool) -> Layout:
        for group in groups:
            parent = self._add_prefix(group) if group.prefix else None
            for place, index in enumerate(group.members):
                self._add_row(index, group.prefix, parent)
                self._shared[index] = group.prefix if place else 0  # the first member is charged for the prefix
        return Layout(
            Batch(tuple(self._segments), deterministic),
            tuple(self._reads),
            tuple(self._row_of_segment),
            tuple(self._wanted_by),
            tuple(self._children),
            tuple(self._shared[: self._asked]),
        )

    def _add_prefix(self, group: _Group) -> int:
        first = self._rows[group.members[0]]
        part = slice(0, group.prefix)
        segment = Segment(first.ids[part], first.positions[part], None, first.view, first.mask)
        wanted = tuple(dict.fromkeys(user for index in group.members for user in self._users(index)))
        children = tuple(index for index in group.members if index < self._asked)
        return self._add(segment, NOTHING, None, wanted, children)

    def _add_row(self, index: int, prefix: int, parent: int | None) -> None:
        row = self._rows[index]
        segment = Segment(row.ids[prefix:], row.positions[prefix:], parent, row.view, row.mask)
        read = row.read if index < self._asked else NOTHING
        if row.against is not None and index < self._asked:
            read = replace(read, against=self._segment_of[id(row.against)])
        place = self._add(segment, read, index if index < self._asked else None, self._users(index), ())
        self._segment_of[id(row)] = place

    def _users(self, index: int) -> tuple[int, ...]:
        own = (index,) if index < self._asked else ()
        return own + tuple(self._measured.get(id(self._rows[index]), ()))

    def _add(
        self, segment: Segment, read: Read, row: int | None, wanted: tuple[int, ...], children: tuple[int, ...]
    ) -> int:
        self._segments.append(segment)
        self._reads.append(read)
        self._row_of_segment.append(row)
        self._wanted_by.append(wanted)
        self._children.append(children)
        return len(self._segments) - 1


@dataclass(frozen=True)
class _Group:
    members: tuple[int, ...]  # row indices
    prefix: int  # tokens they share; 0 for a row alone


SortKey = tuple[str, bool, bytes]


def _order(rows: Sequence[Row]) -> list[int]:
    """Rows that cannot share stand apart (view, masked or not); among the others lexicographic by ids, so that
    neighbours share the longest prefixes. Rows measured against a base follow it, those of its own view first."""

    def sort_key(row: Row) -> SortKey:
        return row.view.key, row.mask is not None, row.ids.astype(">i4").tobytes()

    def key(index: int) -> tuple[SortKey, bool, bool, SortKey, int]:
        row = rows[index]
        base = row if row.against is None else row.against
        return sort_key(base), row is not base, row.view.key != base.view.key, sort_key(row), index

    return sorted(range(len(rows)), key=key)


def _group(rows: Sequence[Row], order: Sequence[int]) -> list[_Group]:
    """The cut of the ordered rows into runs that saves most tokens, by dynamic programming.

    Not greedily: one row that shares little would otherwise narrow a long prefix that many others have.
    """
    count = len(order)
    shares = [common_prefix(rows[left], rows[right]) for left, right in itertools.pairwise(order)]
    saved = np.zeros(count + 1, np.int64)  # most tokens that can be saved among the first i rows ...
    begins = np.zeros(count + 1, np.int64)  # ... when the last run begins here
    common = np.full(count, np.iinfo(np.int64).max)  # [j]: tokens that all rows j .. end-1 begin with
    for end in range(1, count + 1):
        low = max(0, end - MOST_MEMBERS)
        if end > 1:
            np.minimum(common[low : end - 1], shares[end - 2], out=common[low : end - 1])
        others = np.arange(end - 1 - low, -1, -1)  # members of the run j .. end-1 that do not pay for the prefix
        gain = saved[low:end] + np.where(common[low:end] >= BLOCK_TOKENS, common[low:end], -1) * others
        begins[end] = low + int(gain.argmax())
        saved[end] = gain.max()
    groups: list[_Group] = []
    end = count
    while end:
        start = int(begins[end])
        groups.append(_Group(tuple(order[start:end]), min(shares[start : end - 1], default=0)))
        end = start
    return groups[::-1]


def common_prefix(left: Row, right: Row) -> int:
    """The p for which rows [0, p) of both may be computed once: all is equal there and no row sees a key past p."""
    if left.view.key != right.view.key or (left.mask is None) != (right.mask is None):
        return 0
    n = min(left.length, right.length)
    equal = min(_equal_until(left.ids[:n], right.ids[:n]), _equal_until(left.positions[:n], right.positions[:n]))
    if left.mask is None or right.mask is None or equal == 0:
        return equal
    agreed = left.mask.shared_prefix(right.mask)
    if agreed <= equal:
        return agreed
    cuts = left.mask.step_ends()  # ids differ before the masks do: fall back to a cut that no earlier row sees across
    return int(cuts[cuts <= equal].max(initial=0))


def _equal_until(left: IntArray, right: IntArray) -> int:
    different = np.flatnonzero(left != right)
    return int(different[0]) if different.size else int(left.shape[0])
