"""Which calls answer a batch, and in which order: prefixes once, children packed behind them, long segments in steps.

All state of a forward lives in one object, made per forward, so two forwards can be interleaved. It knows segments,
reads and liveness. It must not know arrays on devices beyond what the runner hands it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from backend_jax.architecture import Architecture
from backend_jax.attention import Keys
from backend_jax.call import Below, Grid, Part
from backend_jax.fork import Fork, choose_fork
from backend_jax.reader import Pending, Side
from backend_jax.runner import Kept, Ran, Stride, past_after
from backend_jax.shapes import MOST_TOKENS, SIDE_BY_SIDE, Reach, Span, bucket, pack, token_bucket
from dualtrace.adapters import Delta
from dualtrace.arrays import IntArray
from dualtrace.engine import Batch, Live, Read, Readout, Reads, Step
from dualtrace.masks.plan import MaskPlan
from dualtrace.masks.receipt import Counts
from dualtrace.views import View

MOST_VIEWS = 16  # adapters and strengths of one call


@dataclass(frozen=True, eq=False)
class Trunk:
    """What a segment's children stand on: all rows of its lineage, kept in one lane."""

    kept: Kept | None  # None: there are no rows yet
    rows: int


ROOT = Trunk(None, 0)


@dataclass(eq=False)
class Lanes:
    """Long segments side by side: how far each has come, and what was kept of it."""

    members: tuple[int, ...]
    at: list[int]  # root-to-leaf row that comes next
    count: int  # of lanes, padded
    kept: Kept | None
    owned: bool = False  # nobody else needs `kept`

    @property
    def tokens(self) -> int:
        return self.kept.tokens if self.kept else 0


@dataclass(frozen=True, eq=False)
class _Made:
    """What a call made of one part."""

    hidden: npt.NDArray[np.generic]  # [n, hidden]
    bucket: str
    counts: Counts | None


class Calls(Protocol):
    """The runner, or what stands in for it while a batch is rehearsed."""

    @property
    def architecture(self) -> Architecture: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def width(self) -> int: ...
    @property
    def delta(self) -> Callable[[View], Delta | None]: ...
    def span(self, reach: Reach, fork: int = 0) -> Span: ...
    def known_rows(
        self, past_tokens: int, masks: Sequence[MaskPlan | None], views: Sequence[View], span: Span
    ) -> frozenset[tuple[int, int]]: ...
    def run(self, parts: Sequence[Part], grid: Grid, kept: Kept | None, *, keep: bool = False) -> Ran: ...
    def run_forked(self, parts: Sequence[Part], grid: Grid, below: Below, kept: Kept | None) -> Ran: ...
    def append(self, kept: Kept | None, fresh: Keys, parts: Sequence[Part], *, owned: bool) -> Kept: ...
    def is_made(self, stride: Stride) -> bool: ...
    def choose(self, kept: Kept | None, chosen: Sequence[int], lanes: int) -> Kept | None: ...


class Reading(Protocol):
    def read(self, pending: Sequence[Pending], *, fixed: bool) -> Sequence[Readout]: ...


class Forest:
    def __init__(
        self, batch: Batch, reads: Reads, live: Live, runner: Calls, reader: Reading, step_tokens: int
    ) -> None:
        self._batch = batch
        self._reads = reads
        self._live = live
        self._runner = runner
        self._reader = reader
        self._step_tokens = step_tokens
        self._fixed = batch.deterministic
        count = len(batch.segments)
        self._children: list[list[int]] = [[] for _ in range(count)]
        for index, segment in enumerate(batch.segments):
            if segment.parent is not None:
                self._children[segment.parent].append(index)
        self._own_start = [0] * count
        for index, segment in enumerate(batch.segments):
            if segment.parent is not None:
                parent = segment.parent
                self._own_start[index] = self._own_start[parent] + batch.segments[parent].ids.size
        self._users: list[list[int]] = [[] for _ in range(count)]  # who measures divergence with a segment
        for index, read in enumerate(reads):
            if read.against is not None:
                self._users[read.against].append(index)
        self._begun: set[int] = set()  # segments whose first readout is out
        self._needed = self._find_needed()
        self._rows_kept: dict[tuple[int, int], npt.NDArray[np.generic]] = {}  # (owner, row) -> hidden state
        self._held: list[tuple[Readout, Read, npt.NDArray[np.generic]]] = []  # waiting for the other side

    # ---- the order of things

    def run(self) -> Iterator[Step]:
        if self._fixed:
            for index in range(len(self._batch.segments)):
                if self._is_wanted(index):
                    yield from self._advance([index], ROOT)
        else:
            yield from self._grow([i for i, s in enumerate(self._batch.segments) if s.parent is None], ROOT)

    def _grow(self, members: Sequence[int], trunk: Trunk) -> Iterator[Step]:
        """Segments that stand on one trunk, and all that stands on them. Short leaves first: they finish first."""
        empty = [i for i in members if not self._batch.segments[i].ids.size]
        leaves = [i for i in members if i not in empty and not self._children[i] and self._is_one_step(i)]
        long = [i for i in members if i not in empty and i not in leaves]
        if empty:
            pending = [self._pend(i, trunk.rows, trunk.rows, 0, None) for i in empty if self._is_wanted(i)]
            yield from self._emit(pending)
            for index in empty:
                yield from self._grow(self._children[index], trunk)
        yield from self._fan(leaves, trunk)
        lonely = [i for i in long if self._children[i] or trunk.kept is not None]
        beside = [i for i in long if i not in lonely]
        most = min(SIDE_BY_SIDE[-1], max(1, MOST_TOKENS // self._step_tokens))
        for start in range(0, len(beside), most):
            yield from self._advance(beside[start : start + most], trunk)
        for index in lonely:
            yield from self._advance([index], trunk)

    def _fan(self, leaves: Sequence[int], trunk: Trunk) -> Iterator[Step]:
        """Leaves packed into rows behind one past. Who left meanwhile keeps his place, so that no call changes its
        shape; a call that nobody wants is not run."""
        waiting = list(leaves)
        while waiting:
            members = self._take(waiting)
            waiting = waiting[len(members) :]
            if not any(map(self._is_wanted, members)):
                continue
            yield from self._run_leaves(members, trunk)

    def _run_leaves(self, members: Sequence[int], trunk: Trunk) -> Iterator[Step]:
        layers = self._runner.architecture.layers
        fork = choose_fork([self._batch.segments[i] for i in members], trunk.rows, layers)
        if fork is None:
            parts, grid = self._lay(members, trunk, self._runner.span(Reach.WHOLE))
            ran = self._runner.run(parts, grid, trunk.kept)
        else:
            parts, grid = self._lay(members, trunk, self._runner.span(Reach.ABOVE, fork.layer))
            ran = self._runner.run_forked(parts, grid, self._lay_below(members, trunk, fork), trunk.kept)
        yield from self._harvest(parts, grid, ran)

    def _lay_below(self, members: Sequence[int], trunk: Trunk, fork: Fork) -> Below:
        standing = tuple(dict.fromkeys(fork.standing))
        span = self._runner.span(Reach.BELOW, fork.layer)
        parts, grid = self._lay([members[i] for i in standing], trunk, span)
        part_of = dict(zip(standing, parts, strict=True))
        return Below(fork.layer, tuple(part_of[i] for i in fork.standing), grid)

    def _lay(self, members: Sequence[int], trunk: Trunk, span: Span) -> tuple[list[Part], Grid]:
        """Leaves in rows of one length, for a call of these layers."""
        segments = [self._batch.segments[i] for i in members]
        lengths = tuple(segment.ids.size for segment in segments)
        kinds = tuple(segment.view.key for segment in segments)
        past = trunk.kept.tokens if trunk.kept else 0
        masks, views = [segment.mask for segment in segments], [segment.view for segment in segments]
        plan = pack(lengths, kinds, self._runner.known_rows(past, masks, views, span))
        parts = [
            self._part(i, self._own_start[i], self._own_start[i] + size, row=row, offset=offset)
            for i, size, (row, offset) in zip(members, lengths, plan.places, strict=True)
        ]
        return parts, Grid(1, plan.rows, plan.tokens, past)

    def _take(self, waiting: Sequence[int]) -> list[int]:
        """As many as one call holds; the first always goes."""
        taken: list[int] = []
        tokens, views = 0, set[str]()
        for index in waiting:
            segment = self._batch.segments[index]
            tokens += segment.ids.size
            views.add(segment.view.key)
            if taken and (tokens > MOST_TOKENS or len(views) > MOST_VIEWS):
                break
            taken.append(index)
        return taken

    def _advance(self, members: Sequence[int], trunk: Trunk) -> Iterator[Step]:
        """Segments side by side, step by step, each in its lane over what it kept; then their children."""
        at = [0 if self._fixed else self._own_start[i] for i in members]
        lanes = Lanes(tuple(members), at, bucket(len(members), SIDE_BY_SIDE), trunk.kept)
        while parts := self._next_parts(lanes.members, lanes.at):
            if not any(self._is_wanted(part.segment) for part in parts):
                return
            left = self._leave_behind(lanes, parts)
            if left is not lanes:
                lanes = left
                continue
            stride = next(self._strides(lanes.members, lanes.at, lanes.count, lanes.tokens))
            ran = self._runner.run(parts, stride.grid, lanes.kept, keep=True)
            for part in parts:
                lanes.at[part.lane] = part.stop
            if ran.fresh is not None and stride.room:
                lanes.kept = self._runner.append(lanes.kept, ran.fresh, parts, owned=lanes.owned)
                lanes.owned = True
            yield from self._harvest(parts, stride.grid, ran)
        if not self._fixed:
            for index, reached in zip(lanes.members, lanes.at, strict=True):
                if self._children[index]:
                    yield from self._grow(self._children[index], Trunk(lanes.kept, reached))

    def _next_parts(self, members: Sequence[int], at: Sequence[int]) -> list[Part]:
        """The next step of each that is not at its end, in its lane."""
        ends = [self._own_start[i] + self._batch.segments[i].ids.size for i in members]
        return [
            self._part(index, start, self._next_stop(index, start, end), lane=lane)
            for lane, (index, start, end) in enumerate(zip(members, at, ends, strict=True))
            if start < end
        ]

    def _strides(self, members: Sequence[int], at: Sequence[int], count: int, past: int) -> Iterator[Stride]:
        """The calls that bring them to their ends, from here on."""
        at = list(at)
        stays = not self._fixed and any(self._children[i] for i in members)
        while parts := self._next_parts(members, at):
            grid = Grid(count, 1, token_bucket(max(part.size for part in parts)), past)
            longest = max(at)
            for part in parts:
                at[part.lane] = part.stop
            past = past_after(past, longest, grid.tokens) if stays or self._next_parts(members, at) else 0
            yield Stride(tuple(parts), grid, past)

    def _leave_behind(self, lanes: Lanes, parts: Sequence[Part]) -> Lanes:
        """Without the lanes that are at their end or that nobody wants, if functions for fewer lanes are there for the
        whole way that is left: none is compiled while a forward runs. Without them all go on."""
        alive = [part.lane for part in parts if self._is_wanted(part.segment)]
        members = tuple(lanes.members[lane] for lane in alive)
        at = [lanes.at[lane] for lane in alive]
        for count in (size for size in SIDE_BY_SIDE if bucket(len(alive), SIDE_BY_SIDE) <= size < lanes.count):
            if all(map(self._runner.is_made, self._strides(members, at, count, lanes.tokens))):
                return Lanes(members, at, count, self._runner.choose(lanes.kept, alive, count), owned=True)
        return lanes

    def _is_wanted(self, index: int) -> bool:
        """Somebody wants the segment, a segment on it, or one that measures itself against it."""
        used = self._users[index] if self._fixed else (*self._children[index], *self._users[index])
        return self._live(index) or any(self._is_wanted(other) for other in used)

    def _is_one_step(self, index: int) -> bool:
        end = self._own_start[index] + self._batch.segments[index].ids.size
        return self._next_stop(index, self._own_start[index], end) == end

    def _next_stop(self, index: int, at: int, end: int) -> int:
        """A step further, at a cut the mask allows; where it allows none that near, the next one it does."""
        limit, mask = min(at + self._step_tokens, end), self._batch.segments[index].mask
        if mask is None or limit == end:
            return limit
        cuts = mask.step_ends()
        cuts = cuts[(cuts > at) & (cuts < end)]
        near = cuts[cuts <= limit]
        return int(near[-1]) if near.size else int(cuts[0]) if cuts.size else end

    def _part(self, index: int, start: int, stop: int, *, lane: int = 0, row: int = 0, offset: int = 0) -> Part:
        segment, own_start = self._batch.segments[index], self._own_start[index]
        if self._fixed:
            ids, positions = self._batch.expand(index)
            span = slice(start, stop)
        else:
            ids, positions = segment.ids, segment.positions
            span = slice(start - own_start, stop - own_start)
        return Part(index, ids[span], positions[span], start, own_start, segment.view, segment.mask, lane, row, offset)

    # ---- reading

    def _find_needed(self) -> dict[int, set[int]]:
        """Per segment, the rows of its own that others read: its descendants, and those that measure against it."""
        needed: dict[int, set[int]] = {}
        for index, read in enumerate(self._reads):
            rows = read.rows.tolist()
            if not self._fixed:
                self._note(needed, index, (row for row in rows if row < self._own_start[index]))
            if read.against is not None:
                self._note(needed, read.against, rows)
        return needed

    def _note(self, needed: dict[int, set[int]], index: int, rows: Iterable[int]) -> None:
        for row in rows:
            needed.setdefault(self._owner(index, row), set()).add(row)

    def _owner(self, index: int, row: int) -> int:
        """Which segment of the lineage computes the row."""
        while not self._fixed and row < self._own_start[index]:
            parent = self._batch.segments[index].parent
            assert parent is not None
            index = parent
        return index

    def _harvest(self, parts: Sequence[Part], grid: Grid, ran: Ran) -> Iterator[Step]:
        pending = []
        for number, part in enumerate(parts):
            if not self._is_wanted(part.segment):
                continue
            first = grid.first_flat(part)
            hidden = ran.hidden[first : first + part.size]
            for row in self._needed.get(part.segment, ()):
                if part.start <= row < part.stop:
                    self._rows_kept[part.segment, row] = hidden[row - part.start].copy()
            made = _Made(hidden, ran.bucket, ran.counts(parts, number, self._runner.architecture.query_heads))
            pending.append(self._pend(part.segment, part.start, part.stop, part.size, made))
        if pending:
            pending[0] = (replace(pending[0][0], padded_tokens=ran.count_empty(parts)), *pending[0][1:])
        yield from self._emit(pending)

    def _pend(
        self, index: int, start: int, stop: int, computed: int, made: _Made | None
    ) -> tuple[Readout, Read, npt.NDArray[np.generic]]:
        """What is read of one part: its rows, and with a segment's first part the rows that its ancestors computed."""
        asked, segment = self._reads[index], self._batch.segments[index]
        first = 0 if index not in self._begun else start
        self._begun.add(index)
        inside = (asked.rows >= first) & (asked.rows < stop)
        targets = None if asked.targets is None else asked.targets[inside]
        read = Read(asked.rows[inside], targets, asked.top_k, asked.extra_ids, asked.tail, asked.against)
        delta = self._runner.delta(segment.view)
        readout = Readout(
            index,
            first,
            stop,
            read.rows,
            computed,
            counts=made.counts if made else None,
            delta_modules=delta.modules if delta else None,
            bucket=made.bucket if made else "",
        )
        below = int(np.searchsorted(read.rows, start))  # rows that ancestors computed
        hidden = self._stack_kept([(self._owner(index, row), row) for row in read.rows[:below].tolist()])
        if made is not None:
            own = made.hidden[read.rows[below:] - start]
            hidden = np.concatenate([hidden, own]) if below else own
        return readout, read, hidden

    def _emit(self, fresh: Sequence[tuple[Readout, Read, npt.NDArray[np.generic]]]) -> Iterator[Step]:
        """Read what can be read; a segment whose other side is not computed yet waits for it."""
        waiting = [*self._held, *fresh]
        ready, self._held = [], []
        sides: dict[tuple[int, bytes], Side | None] = {}
        for readout, read, hidden in waiting:
            against = None
            if read.against is not None:
                key = (read.against, read.rows.tobytes())
                if key not in sides:
                    sides[key] = self._other_side(read.against, read.rows, key)
                against = sides[key]
            if read.against is not None and against is None:
                self._held.append((readout, read, hidden))
            else:
                ready.append(Pending(readout, read, hidden, against))
        if ready:
            yield tuple(self._reader.read(ready, fixed=self._fixed))

    def _other_side(self, index: int, rows: IntArray, key: tuple[int, bytes]) -> Side | None:
        """Rows of the segment to measure against; None while one of them is missing."""
        places = [(self._owner(index, row), row) for row in rows.tolist()]
        return Side(key, self._stack_kept(places)) if all(place in self._rows_kept for place in places) else None

    def _stack_kept(self, places: Sequence[tuple[int, int]]) -> npt.NDArray[np.generic]:
        """[R, hidden]"""
        if not places:
            return np.empty((0, self._runner.width), self._runner.dtype)
        return np.stack([self._rows_kept[place] for place in places])
