"""The unit of batching: one sequence to run and what to read of it.

It knows the engine's words and nothing of questions or queues.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dualtrace.arrays import IntArray
from dualtrace.engine import Read, Readout
from dualtrace.views import BASE, View

if TYPE_CHECKING:
    from dualtrace.masks.plan import MaskPlan


@dataclass(frozen=True, eq=False)
class Row:
    """A whole sequence of inputs, root to leaf. The planner may split it into a shared prefix and the rest."""

    ids: IntArray  # [T] int32
    positions: IntArray  # [T] int32
    read: Read  # `read.against` is set by the planner, from `against`
    view: View = BASE
    mask: MaskPlan | None = None  # None: the model's own attention
    against: Row | None = None  # a row of the same ids to measure KL with; it runs in the same batch

    @property
    def length(self) -> int:
        return int(self.ids.shape[0])


def work_of(row: Row) -> int:
    """Rows to read and, under a mask, rows whose receipt must come in. An answer is complete when both are."""
    return int(row.read.rows.size) + (row.length if row.mask is not None else 0)


def work_in(readout: Readout) -> int:
    """How much of `work_of` a readout brings."""
    counted = 0 if readout.counts is None else int(readout.counts.rows[0, 0])
    return int(readout.rows.size) + counted


def plain_row(ids: IntArray, read: Read) -> Row:
    """A row whose positions simply count."""
    return Row(ids, np.arange(ids.shape[0], dtype=np.int32), read)
