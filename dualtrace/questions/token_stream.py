"""Readouts of planned rows, turned into the events of a streamed answer, while they arrive.

Pure: `push` takes values and returns values. It must not know queues, clocks or the wire.
Tokens of one item and variant leave in ascending order, whatever order the engine finished its windows in.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from dualtrace.arrays import FloatArray, IntArray
from dualtrace.engine import Readout
from dualtrace.model_card import ModelProvenance
from dualtrace.problems import BadNumbers, Problem, Reason
from dualtrace.questions.answers import (
    AnswerHeader,
    Applied,
    ItemDone,
    ItemHeader,
    ItemProblem,
    StreamEvent,
    TokenChunk,
)
from dualtrace.questions.sight import Proof, Sight
from dualtrace.questions.token_plan import PlannedItem, PlannedRow, TokenPlan, slice_tokens
from dualtrace.rows import work_in, work_of

CHUNK_ENTRIES = 65_536
"""Top-k entries of one chunk at most, so that a chunk stays well below the 4 MiB of a message."""


@dataclass(frozen=True, eq=False)
class _Columns:
    """Consecutive tokens of one item, not sent yet. A column that was not asked is None."""

    first_index: int
    logprobs: FloatArray  # [C]
    ranks: IntArray  # [C]
    ties: IntArray  # [C]
    top_ids: IntArray | None  # [C, k]
    top_logprobs: FloatArray | None  # [C, k]
    kl_base_masked: FloatArray | None  # [C]
    kl_masked_base: FloatArray | None  # [C]

    @property
    def count(self) -> int:
        return int(self.logprobs.shape[0])

    def cut(self, start: int, stop: int) -> _Columns:
        rows = slice(start, stop)
        parts = {name: None if column is None else column[rows] for name, column in self._columns()}
        return _Columns(self.first_index + start, **parts)  # type: ignore[arg-type]

    def _columns(self) -> list[tuple[str, Any]]:
        return [(name, getattr(self, name)) for name in COLUMN_NAMES]


COLUMN_NAMES = tuple(entry.name for entry in fields(_Columns) if entry.name != "first_index")


@dataclass
class _Track:
    """One item under one variant."""

    item: int
    variant: int
    planned: PlannedItem
    sight: Sight
    rows: deque[int] = field(default_factory=deque)  # planned rows not finished, in order
    left_in_row: dict[int, int] = field(default_factory=dict)  # rows still to be read and counted
    proof: Proof = field(default_factory=Proof)
    stash: dict[int, list[Readout]] = field(default_factory=dict)  # readouts of rows whose turn has not come
    pending: list[_Columns] = field(default_factory=list)
    pending_count: int = 0
    sent: list[FloatArray] = field(default_factory=list)  # logprobs so far, for the sum
    all_greedy: bool = True
    over: bool = False


class TokenStream:
    """The answer to one Logprob or RollingLogprob question, as it grows."""

    def __init__(self, plan: TokenPlan, chunk_tokens: int) -> None:
        self._plan = plan
        self._chunk_tokens = max(1, min(chunk_tokens, CHUNK_ENTRIES // max(1, plan.top_k)))
        self.done = 0
        self.failed = 0
        self._tracks: dict[tuple[int, int], _Track] = {}
        for index, row in enumerate(plan.rows):
            track = self._track(row)
            track.rows.append(index)
            track.left_in_row[index] = work_of(row.row)

    def _track(self, row: PlannedRow) -> _Track:
        key = (row.item, row.variant)
        if key not in self._tracks:
            planned = self._plan.items[row.item]
            assert isinstance(planned, PlannedItem)
            self._tracks[key] = _Track(row.item, row.variant, planned, row.sight)
        return self._tracks[key]

    def header(self, provenance: ModelProvenance, *, streams: bool) -> AnswerHeader:
        headers = tuple(item.header if isinstance(item, PlannedItem) else ItemHeader() for item in self._plan.items)
        plan = self._plan
        return AnswerHeader(
            provenance,
            headers,
            plan.variants,
            plan.top_k,
            streams,
            plan.has_pieces,
            plan.has_offsets,
            plan.kl_base_masked,
            plan.kl_masked_base,
        )

    def opening(self) -> list[StreamEvent]:
        """What is known before any forward: items that could not be composed, and items with nothing to score."""
        events: list[StreamEvent] = []
        refused = {(entry.item, entry.variant): entry.problem for entry in self._plan.refused}
        for index, item in enumerate(self._plan.items):
            for variant in range(self._plan.variants):
                problem = item if isinstance(item, Problem) else refused.get((index, variant))
                if problem is not None:
                    self.failed += 1
                    events.append(ItemProblem(index, variant, problem))
                elif (index, variant) not in self._tracks:
                    self.done += 1
                    events.append(ItemDone(index, variant, scored_tokens=0))
        return events

    @property
    def has_pending(self) -> bool:
        return any(track.pending for track in self._tracks.values())

    def push(self, row: int, readout: Readout) -> list[StreamEvent]:
        planned = self._plan.rows[row]
        track = self._track(planned)
        if track.over:
            return []
        if readout.bad_rows:
            return self._end_badly(track, _bad_numbers(planned, readout.bad_rows[0]))
        if not track.rows or track.rows[0] != row:
            track.stash.setdefault(row, []).append(readout)
            return []
        events = self._take(track, row, readout)
        while track.rows and track.stash.get(track.rows[0]):
            waiting = track.stash[track.rows[0]].pop(0)
            events += self._take(track, track.rows[0], waiting)
        return events

    def fail(self, row: int, problem: Problem) -> list[StreamEvent]:
        track = self._track(self._plan.rows[row])
        return [] if track.over else self._end_badly(track, problem)

    def flush(self) -> list[StreamEvent]:
        """Everything that may leave now, also in chunks smaller than asked."""
        return [event for track in self._tracks.values() for event in self._send(track, everything=True)]

    def _take(self, track: _Track, row: int, readout: Readout) -> list[StreamEvent]:
        offset = self._plan.rows[row].token_offset
        track.left_in_row[row] -= work_in(readout)
        track.proof.add(readout)
        events: list[StreamEvent] = []
        for columns in self._runs(readout, offset):
            if track.pending and track.pending[-1].first_index + track.pending[-1].count != columns.first_index:
                events += self._send(track, everything=True)  # a gap starts a new chunk
            track.pending.append(columns)
            track.pending_count += columns.count
            track.sent.append(columns.logprobs)
            track.all_greedy = track.all_greedy and bool((columns.ranks == 1).all())
        if track.left_in_row[row] == 0:
            track.rows.popleft()
        if track.rows:
            return events + self._send(track, everything=False)
        return events + self._finish(track)

    def _finish(self, track: _Track) -> list[StreamEvent]:
        try:
            applied = track.proof.check(track.sight)
        except Problem as problem:
            return self._end_badly(track, problem)
        track.over = True
        self.done += 1
        return [*self._send(track, everything=True), _done(track, applied)]

    def _runs(self, readout: Readout, offset: int) -> list[_Columns]:
        """The readout's rows as runs of consecutive tokens."""
        if not readout.rows.size:
            return []
        indices = readout.rows + offset
        whole = self._columns(int(indices[0]), readout)
        breaks = np.flatnonzero(np.diff(indices) != 1) + 1
        edges = [0, *breaks.tolist(), int(indices.size)]
        return [replace(whole.cut(a, b), first_index=int(indices[a])) for a, b in itertools.pairwise(edges)]

    def _columns(self, first: int, readout: Readout) -> _Columns:
        assert readout.logprobs is not None
        assert readout.ranks is not None
        assert readout.ties is not None
        # A plain variant is the base itself: its divergence from it is zero by definition, and is not computed.
        zeros = np.zeros(readout.rows.size)
        from_base = zeros if readout.kl_from_against is None else readout.kl_from_against
        to_base = zeros if readout.kl_to_against is None else readout.kl_to_against
        return _Columns(
            first_index=first,
            logprobs=readout.logprobs,
            ranks=readout.ranks,
            ties=readout.ties,
            top_ids=readout.top_ids,
            top_logprobs=readout.top_logprobs,
            kl_base_masked=from_base if self._plan.kl_base_masked else None,
            kl_masked_base=to_base if self._plan.kl_masked_base else None,
        )

    def _send(self, track: _Track, *, everything: bool) -> list[StreamEvent]:
        size = self._chunk_tokens
        if not track.pending or (track.pending_count < size and not everything):
            return []
        columns = _join(track.pending)
        whole = columns.count if everything else columns.count - columns.count % size
        events: list[StreamEvent] = [
            _chunk(track, columns.cut(start, min(start + size, whole)), self._plan.top_k)
            for start in range(0, whole, size)
        ]
        track.pending = [columns.cut(whole, columns.count)] if whole < columns.count else []
        track.pending_count = columns.count - whole
        return events

    def _end_badly(self, track: _Track, problem: Problem) -> list[StreamEvent]:
        track.over = True
        track.pending, track.stash = [], {}
        self.failed += 1
        return [ItemProblem(track.item, track.variant, problem.at(item=track.item))]


def _join(parts: list[_Columns]) -> _Columns:
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Any] = {}
    for name in COLUMN_NAMES:
        columns = [getattr(part, name) for part in parts]
        joined[name] = None if columns[0] is None else np.concatenate(columns)
    return _Columns(parts[0].first_index, **joined)


def _chunk(track: _Track, columns: _Columns, top_k: int) -> TokenChunk:
    first = columns.first_index
    return TokenChunk(
        track.item,
        track.variant,
        first,
        slice_tokens(track.planned.tokens, first, first + columns.count),
        columns.logprobs,
        columns.ranks,
        columns.ties,
        columns.top_ids if top_k else None,
        columns.top_logprobs if top_k else None,
        columns.kl_base_masked,
        columns.kl_masked_base,
    )


def _done(track: _Track, applied: Applied | None) -> ItemDone:
    done = ItemDone(
        track.item,
        track.variant,
        scored_tokens=0,
        applied=applied,
        document_starts=track.sight.document_starts,
        delta_modules=track.proof.delta_modules,
    )
    values = np.concatenate(track.sent) if track.sent else np.empty(0)
    if not values.size:
        return done
    total = math.fsum(values.tolist())  # exact, so it does not depend on how the answer was chunked
    mean = total / values.size
    perplexity = math.exp(-mean) if mean > -700 else None  # beyond that it is no double
    return replace(
        done,
        scored_tokens=int(values.size),
        total_logprob=total,
        mean_logprob=mean,
        perplexity=perplexity,
        is_greedy=track.all_greedy,
    )


def _bad_numbers(planned: PlannedRow, row: int) -> Problem:
    token = row + planned.token_offset
    where = f"row {row}, which predicts token {token} (variant {planned.variant})"
    message = f"the model's logits hold NaN or infinity at {where}"
    return BadNumbers(Reason.NON_FINITE_LOGITS, message)
