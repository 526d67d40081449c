"""Segments on their way: how far each has come, what must be kept of it, and the pieces of the next pass.

A strand is a segment with its state. A piece is the run of a strand's rows that one pass computes. Rows are
root-to-leaf. It knows lengths, cuts and who waits for whom. It must not know what a pass does with its pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dualtrace.arrays import IntArray
from dualtrace.engine import Batch, Live, Read, Reads
from dualtrace.masks.plan import MaskPlan
from dualtrace.views import View

PASS_TOKENS = 1024
"""Rows of one pass, unless a single piece needs more: enough for full speed, and a bound on every temporary."""


@dataclass(eq=False)
class Strand:
    """A segment on its way. Everything a forward keeps between its steps hangs here."""

    index: int
    ids: IntArray  # [own rows] int32
    positions: IntArray  # [T] int32, root to leaf
    start: int  # the first row this strand computes
    counted_from: int  # the first row whose mask it tallies: its own rows only
    read: Read
    view: View
    plan: MaskPlan | None
    parent: Strand | None
    done: int = 0  # rows below are computed
    reported: bool = False  # at least one readout went out
    dropped: bool = False
    children: list[Strand] = field(default_factory=list)
    measured_by: list[Strand] = field(default_factory=list)  # strands whose `read.against` this is
    against: Strand | None = None
    keys_values: list[tuple[Tensor, Tensor]] | None = None  # per layer [1,G,own rows,D], while somebody needs them
    later_rows: IntArray = field(default_factory=lambda: np.empty(0, np.int32))  # own rows that others read
    later_hidden: Tensor | None = None  # [len(later_rows), D]

    @property
    def stop(self) -> int:
        return self.start + int(self.ids.size)

    @property
    def finished(self) -> bool:
        return self.reported and self.done == self.stop

    @property
    def is_over(self) -> bool:
        return self.finished or self.dropped

    def owner(self, row: int) -> Strand:
        """The strand that computes a row of this one's text: itself or an ancestor."""
        strand = self
        while row < strand.start:
            assert strand.parent is not None
            strand = strand.parent
        return strand

    def ancestors(self) -> tuple[Strand, ...]:
        """Root first, this strand not among them."""
        chain: list[Strand] = []
        strand = self.parent
        while strand is not None:
            chain.append(strand)
            strand = strand.parent
        return tuple(reversed(chain))

    def next_cut(self, step_tokens: int) -> int:
        """Where the next piece ends: at most `step_tokens` on, at a row below which nothing is seen from before."""
        limit = min(self.done + step_tokens, self.stop)
        if self.plan is None:
            return limit
        cuts = self.plan.step_ends()
        fitting = cuts[(cuts > self.done) & (cuts <= limit)]
        if fitting.size:
            return int(fitting[-1])
        beyond = cuts[cuts > self.done]
        return min(int(beyond[0]), self.stop) if beyond.size else self.stop


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows [start, stop) of a strand, computed in one pass."""

    strand: Strand
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        return self.start == self.strand.start and self.stop == self.strand.stop

    @property
    def ids(self) -> IntArray:
        return self.strand.ids[self.start - self.strand.start : self.stop - self.strand.start]

    @property
    def positions(self) -> IntArray:
        return self.strand.positions[self.start : self.stop]


def make_strands(batch: Batch, reads: Reads) -> list[Strand]:
    """One strand a segment, parents first. A deterministic batch shares nothing: every strand starts at its root."""
    strands: list[Strand] = []
    for index, (segment, read) in enumerate(zip(batch.segments, reads, strict=True)):
        ids, positions = batch.expand(index)
        own_from = ids.size - segment.ids.size
        start = 0 if batch.deterministic else own_from
        parent = strands[segment.parent] if segment.parent is not None and start else None
        strand = Strand(
            index, ids[start:], positions, start, own_from, read, segment.view, segment.mask, parent, done=start
        )
        if parent is not None:
            parent.children.append(strand)
        if read.against is not None:
            strand.against = strands[read.against]
            strand.against.measured_by.append(strand)
        strands.append(strand)
    _mark_later_rows(strands)
    return strands


def _mark_later_rows(strands: Sequence[Strand]) -> None:
    """Rows whose hidden state is read by another strand: a child, or one that is measured against this."""
    later: dict[int, list[npt.NDArray[np.integer]]] = {}
    for strand in strands:
        rows = strand.read.rows
        for source, wanted in ((strand.parent, rows[rows < strand.start]), (strand.against, rows)):
            while source is not None and wanted.size:
                later.setdefault(source.index, []).append(wanted[wanted >= source.start])
                wanted = wanted[wanted < source.start]
                source = source.parent
    for index, parts in later.items():
        strands[index].later_rows = np.unique(np.concatenate(parts)).astype(np.int32)


def drop_unwanted(strands: Sequence[Strand], live: Live) -> None:
    """Mark what nobody waits for any more. A strand is wanted while one that needs it is."""
    for strand in reversed(strands):
        if strand.is_over:
            continue
        needed = any(not other.is_over for other in (*strand.children, *strand.measured_by))
        if not needed and not live(strand.index):
            strand.dropped = True


def next_pieces(strands: Sequence[Strand], step_tokens: int, *, alone: bool) -> list[Piece]:
    """The pieces of the next pass: parents before children, each strand advanced once, within PASS_TOKENS rows."""
    reach = {strand.index: strand.done for strand in strands}
    pieces: list[Piece] = []
    total = 0
    for strand in strands:
        if strand.is_over or (strand.parent is not None and reach[strand.parent.index] < strand.parent.stop):
            continue
        stop = strand.next_cut(step_tokens)
        if strand.against is not None and not strand.against.dropped:
            ahead = reach[strand.against.index]
            if ahead < stop and ahead < strand.against.stop:
                continue  # its yardstick goes first; they advance in lockstep from there
        if pieces and (alone or total + stop - strand.done > PASS_TOKENS):
            if alone:
                break
            continue
        pieces.append(Piece(strand, strand.done, stop))
        total += stop - strand.done
        reach[strand.index] = stop
    return pieces


def keeps_keys(piece: Piece, pieces: Sequence[Piece]) -> bool:
    """Whether the keys and values of this piece's strand outlive the pass."""
    strand = piece.strand
    if strand.keys_values is not None or piece.stop < strand.stop:
        return True
    running = {other.strand.index for other in pieces}
    return any(not child.is_over and child.index not in running for child in strand.children)


def release(strands: Sequence[Strand]) -> None:
    """Let go of what nobody will look at again."""
    for strand in strands:
        if strand.is_over and all(child.is_over for child in strand.children):
            strand.keys_values = None
            if all(other.is_over for other in _readers(strand)):
                strand.later_hidden = None


def _readers(strand: Strand) -> Iterator[Strand]:
    yield from strand.measured_by
    for child in strand.children:
        yield child
        yield from _readers(child)
