"""A boolean matrix [T,T] as run-lengths: what a mask of rules is made of, small for any length.

All runs of all rows stand in one ascending list of toggles: row * (T+1) + key, a start, an end (exclusive), a start,
an end ... Runs of one row neither overlap nor touch, so equal matrices have equal lists, and every operation is a
merge of sorted lists. It knows rows, keys and budgets. It must not know the mask language.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dualtrace.masks.limits import MAX_WORK
from dualtrace.problems import InvalidArgument, Reason

Longs = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


SLAB_TOGGLES = 1_000_000  # merged at a time: some tens of megabytes of temporary arrays

Operation = Callable[["Runs", "Runs", "Budget"], "Runs"]


class Budget:
    """Bounds the work of one compilation, so that a mask is refused rather than hanging the caller."""

    def __init__(self, toggles: int = MAX_WORK) -> None:
        self.limit = toggles
        self.left = toggles

    def spend(self, toggles: int) -> None:
        """Call it before the work is done."""
        self.left -= int(toggles)
        if self.left < 0:
            raise InvalidArgument(
                Reason.MASK_TOO_LARGE,
                "the mask breaks its rows into too many runs to be compiled; use fewer edges, layers or documents, "
                "or a shorter text",
                allowed=f"{self.limit} run starts and ends",
            )


@dataclass(frozen=True, eq=False)
class Runs:
    length: int  # T, rows and keys
    toggles: Longs  # [2R] int64, ascending, no duplicates

    @cached_property
    def offsets(self) -> Longs:
        """[T+1] where each row's toggles begin."""
        return np.searchsorted(self.toggles, np.arange(self.length + 1, dtype=np.int64) * (self.length + 1))

    @property
    def starts(self) -> Longs:
        """[R] int64, toggles that open a run."""
        return self.toggles[0::2]

    @property
    def ends(self) -> Longs:
        """[R] int64, toggles that close a run."""
        return self.toggles[1::2]

    @property
    def rows(self) -> Longs:
        """[R] int64, the row of each run."""
        return self.starts // (self.length + 1)

    def count(self) -> int:
        """How many entries are True."""
        return int((self.ends - self.starts).sum())

    def empty_rows(self) -> Longs:
        """Rows without a True, ascending."""
        return np.flatnonzero(np.diff(self.offsets) == 0)

    def reach(self) -> Longs:
        """[T] int64, one more than the last True key of each row; 0 where there is none."""
        offsets = self.offsets
        reach = np.zeros(self.length, np.int64)
        some = np.flatnonzero(np.diff(offsets))
        reach[some] = self.toggles[offsets[some + 1] - 1] - some * (self.length + 1)
        return reach

    def row(self, q: int) -> tuple[tuple[int, int], ...]:
        """The runs of one row, [start, end) each."""
        keys = (self.toggles[self.offsets[q] : self.offsets[q + 1]] - q * (self.length + 1)).tolist()
        return tuple(zip(keys[0::2], keys[1::2], strict=True))

    def block(self, q0: int, q1: int) -> Bools:
        """Rows q0 .. q1-1 as booleans [q1-q0, T]; nothing larger is built."""
        width = self.length + 1
        inside = self.toggles[self.offsets[q0] : self.offsets[q1]] - q0 * width
        cuts = np.concatenate(([0], inside, [(q1 - q0) * width]))
        state = np.zeros(cuts.size - 1, np.bool_)
        state[1::2] = True
        flat = np.repeat(state, np.diff(cuts))
        return np.ascontiguousarray(flat.reshape(q1 - q0, width)[:, : self.length])

    def first_difference(self, other: Runs) -> int:
        """The first row, below both lengths, in which the two differ; the shorter length when they agree."""
        rows = min(self.length, other.length)
        mine, theirs = self.toggles[: self.offsets[rows]], other.toggles[: other.offsets[rows]]
        if other.length != self.length:
            theirs = theirs + theirs // (other.length + 1) * (self.length - other.length)
        shared = min(mine.size, theirs.size)
        unequal = np.flatnonzero(mine[:shared] != theirs[:shared])
        if unequal.size:
            return int(min(mine[unequal[0]], theirs[unequal[0]])) // (self.length + 1)
        longer = mine if mine.size > theirs.size else theirs
        return int(longer[shared]) // (self.length + 1) if longer.size > shared else rows


def no_runs(length: int) -> Runs:
    return Runs(length, np.empty(0, np.int64))


def one_run_a_row(length: int, starts: Longs, ends: Longs, budget: Budget) -> Runs:
    """Row q is True on [starts[q], ends[q]), clipped to the matrix; nothing where that is empty."""
    budget.spend(2 * length)
    starts, ends = np.maximum(starts, 0), np.minimum(ends, length)
    some = np.flatnonzero(starts < ends)
    toggles = np.empty((some.size, 2), np.int64)
    toggles[:, 0], toggles[:, 1] = starts[some], ends[some]
    return Runs(length, (toggles + (some * (length + 1))[:, None]).reshape(-1))


def of_intervals(length: int, rows: Longs, starts: Longs, ends: Longs, budget: Budget) -> Runs:
    """The union of intervals [starts, ends), one per entry of `rows`, in any order; all inside the matrix."""
    budget.spend(8 * rows.size)
    begin = rows * (length + 1)
    # A start sorts before an end of the same place, so intervals that touch become one run.
    events = np.sort(np.concatenate(((begin + starts) * 2, (begin + ends) * 2 + 1)), kind="stable")
    depth = np.cumsum(1 - 2 * (events & 1))
    opens = (depth == 1) & ((events & 1) == 0)
    closes = depth == 0
    return Runs(length, events[opens | closes] >> 1)


def of_matrix(matrix: Bools, budget: Budget) -> Runs:
    """From booleans [T,T]."""
    length = matrix.shape[0]
    budget.spend(length * length // 8)  # a row of bytes costs far less than a toggle
    padded = np.zeros((length, length + 2), np.bool_)
    padded[:, 1:-1] = matrix
    changes = padded[:, 1:] != padded[:, :-1]  # [T, T+1]: the very numbering of toggles
    budget.spend(int(np.count_nonzero(changes)))
    return Runs(length, np.flatnonzero(changes))


def both(a: Runs, b: Runs, budget: Budget) -> Runs:
    return _merge(a, b, np.logical_and, budget)


def either(a: Runs, b: Runs, budget: Budget) -> Runs:
    return _merge(a, b, np.logical_or, budget)


def without(a: Runs, b: Runs, budget: Budget) -> Runs:
    return _merge(a, b, np.greater, budget)


def slabs(length: int, *lists: Longs) -> Iterator[tuple[Longs, ...]]:
    """The same rows of several toggle lists, some rows at a time, so that temporary arrays stay small."""
    longest = max(lists, key=lambda toggles: toggles.size)
    row_starts = np.unique(longest[::SLAB_TOGGLES] // (length + 1)) * (length + 1)
    inner = [np.searchsorted(toggles, row_starts[1:]).tolist() for toggles in lists]
    bounds = [[0, *places, toggles.size] for places, toggles in zip(inner, lists, strict=True)]
    for i in range(len(bounds[0]) - 1):
        yield tuple(toggles[places[i] : places[i + 1]] for toggles, places in zip(lists, bounds, strict=True))


def _merge(a: Runs, b: Runs, truth: Callable[[Bools, Bools], Bools], budget: Budget) -> Runs:
    budget.spend(a.toggles.size + b.toggles.size)
    parts = [_merge_toggles(mine, theirs, truth) for mine, theirs in slabs(a.length, a.toggles, b.toggles)]
    return Runs(a.length, parts[0] if len(parts) == 1 else np.concatenate(parts))


def _merge_toggles(a: Longs, b: Longs, truth: Callable[[Bools, Bools], Bools]) -> Longs:
    events = np.sort(np.concatenate((a * 2, b * 2 + 1)), kind="stable")
    if not events.size:
        return events
    of_b = (events & 1).astype(np.int64)
    place = events >> 1
    in_b = np.cumsum(of_b)
    in_a = np.arange(1, events.size + 1) - in_b
    settled = np.append(place[1:] != place[:-1], True)  # two toggles may share a place
    value = truth((in_a[settled] & 1).astype(np.bool_), (in_b[settled] & 1).astype(np.bool_))
    changed = value != np.concatenate(([False], value[:-1]))
    merged: Longs = place[settled][changed]
    return merged


def within_window(runs: Runs, positions: Longs, window: int, budget: Budget) -> Runs:
    """Only entries with |positions[q] - positions[k]| < window. Positions [T] int64, any; cheap where they count up.

    Keys are cut into pieces in which positions count up by one; inside a piece the window is one interval.
    """
    length, width = runs.length, runs.length + 1
    piece_starts = np.concatenate(([0], np.flatnonzero(np.diff(positions) != 1) + 1)).astype(np.int64)
    piece_ends = np.append(piece_starts[1:], length)
    rows = runs.rows
    starts, ends = runs.starts - rows * width, runs.ends - rows * width
    first = np.searchsorted(piece_starts, starts, side="right") - 1
    last = np.searchsorted(piece_starts, ends - 1, side="right") - 1
    copies = last - first + 1
    budget.spend(4 * int(copies.sum()))
    run = np.repeat(np.arange(rows.size), copies)
    piece = first[run] + np.arange(run.size) - np.repeat(np.cumsum(copies) - copies, copies)
    centre = positions[rows[run]] - positions[piece_starts[piece]] + piece_starts[piece]
    low = np.maximum.reduce([starts[run], piece_starts[piece], centre - window + 1])
    high = np.minimum.reduce([ends[run], piece_ends[piece], centre + window])
    kept = low < high
    return of_intervals(length, rows[run][kept], low[kept], high[kept], budget)
