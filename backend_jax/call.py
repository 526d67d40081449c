"""The arrays of one compiled call: which tokens stand where, what they may see, which adapters their rows wear.

It knows segments' parts and numpy. It must not know which calls answer a batch, nor how anything is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from backend_jax.architecture import Architecture
from backend_jax.model import Rows
from backend_jax.programs import shape_of
from backend_jax.rope import rotary_tables
from dualtrace.arrays import IntArray
from dualtrace.masks.plan import MaskPlan
from dualtrace.views import View

NOBODY = -1  # segment number of padding


@dataclass(frozen=True, eq=False)
class Part:
    """A run of one segment's tokens inside a call."""

    segment: int  # index in the batch
    ids: IntArray  # [n] int32
    positions: IntArray  # [n] int32
    start: int  # root-to-leaf row of the first of them
    own_start: int  # rows below belong to an ancestor and are not counted for this segment
    view: View
    mask: MaskPlan | None
    lane: int = 0  # which past
    row: int = 0  # which row behind it
    offset: int = 0  # first token in the row

    @property
    def size(self) -> int:
        return int(self.ids.size)

    @property
    def stop(self) -> int:
        return self.start + self.size

    @property
    def span(self) -> slice:
        return slice(self.offset, self.offset + self.size)


@dataclass(frozen=True)
class Grid:
    """The padded size of a call."""

    pasts: int
    rows: int
    tokens: int
    past_tokens: int

    def first_flat(self, part: Part) -> int:
        """Where the part's hidden states begin among [N*C*T]."""
        return (part.lane * self.rows + part.row) * self.tokens + part.offset


def lay_rows(architecture: Architecture, parts: Sequence[Part], grid: Grid, dtype: np.dtype[np.generic]) -> Rows:
    shape = (grid.pasts, grid.rows, grid.tokens)
    ids, places = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    segments = np.full(shape, NOBODY, np.int32)
    for number, part in enumerate(parts):
        ids[part.lane, part.row, part.span] = part.ids
        places[part.lane, part.row, part.span] = part.positions
        segments[part.lane, part.row, part.span] = number
    if architecture.rotary:
        cosines, sines = (table.astype(dtype) for table in rotary_tables(architecture.rotary, places))
    else:
        cosines = sines = np.zeros((0, *shape, 0), dtype)
    return Rows(ids, places, segments, cosines, sines)  # type: ignore[arg-type]


def outline_rows(architecture: Architecture, grid: Grid, dtype: np.dtype[np.generic]) -> Rows:
    """What `lay_rows` makes, as shapes."""
    shape = (grid.pasts, grid.rows, grid.tokens)
    pairs = len(architecture.rotary[0].frequencies) if architecture.rotary else 0
    numbers, turns = shape_of(shape, np.int32), shape_of((len(architecture.rotary), *shape, pairs), dtype)
    return Rows(numbers, numbers, numbers, turns, turns)


@dataclass(frozen=True, eq=False)
class PastRows:
    """What the host knows of kept keys and values, per lane."""

    positions: tuple[IntArray, ...]  # [length] int32 of each lane

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(int(lane.size) for lane in self.positions)

    def choose(self, chosen: Sequence[int], lanes: int) -> PastRows:
        """Of some lanes, and of empty ones up to so many."""
        empty = (np.empty(0, np.int32),) * (lanes - len(chosen))
        return PastRows((*(self.positions[lane] for lane in chosen), *empty))

    def arrays(self, lanes: int, tokens: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Lengths [N] and positions [N, P], padded."""
        lengths, places = np.zeros(lanes, np.int32), np.zeros((lanes, tokens), np.int32)
        for lane, positions in enumerate(self.positions):
            lengths[lane] = positions.size
            places[lane, : positions.size] = positions
        return lengths, places


@dataclass(frozen=True, eq=False)
class Below:
    """The lower layers of a call's parts, run for those of them that stand for all."""

    layer: int  # where the call goes on
    standing: tuple[Part, ...]  # for each part of the call the one that stands for it; places are those below
    grid: Grid

    @property
    def parts(self) -> tuple[Part, ...]:
        """Each once."""
        return tuple(dict.fromkeys(self.standing))

    def source(self, parts: Sequence[Part], grid: Grid) -> IntArray:
        """[N,C,T] which of the states below each token of the call goes on from."""
        source = np.zeros((grid.pasts, grid.rows, grid.tokens), np.int32)
        for part, stands in zip(parts, self.standing, strict=True):
            first = self.grid.first_flat(stands)
            source[part.lane, part.row, part.span] = np.arange(first, first + part.size)
        return source
