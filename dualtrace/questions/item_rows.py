"""One item that fits one window, as rows: one per variant, each read where the wanted tokens are predicted.

Pure. It must not know queues, engines' insides or the wire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dualtrace.arrays import IntArray
from dualtrace.engine import Read
from dualtrace.masks.spec import MaskSpec, SegmentName
from dualtrace.problems import Problem
from dualtrace.questions import sight as sights
from dualtrace.questions.asked import Variant
from dualtrace.questions.compose import Context, check_one_window, with_prefix
from dualtrace.questions.sight import Sight, check_variant, readable_rows
from dualtrace.questions.token_plan import PlannedItem, PlannedRow, Refused
from dualtrace.rows import Row

UNMASKED = Variant(mask=MaskSpec())
"""The model's own attention, said as a mask: it shares rows with other masks, up to where they differ."""


@dataclass(frozen=True, eq=False)
class WholeItem:
    """An item to be read under variants."""

    index: int
    planned: PlannedItem
    tokens_read: IntArray  # [N] ascending token indices to score; none may be the first of a text without a prefix
    top_k: int
    characters: int | None = None
    segments: Mapping[SegmentName, tuple[int, int]] = field(default_factory=dict)

    @property
    def front(self) -> int:
        return 0 if self.planned.header.prefix_token_id is None else 1

    def sequence(self) -> sights.Sequence:
        tokens = self.planned.tokens
        ids = with_prefix(self.planned.header.prefix_token_id, tokens.ids)
        return sights.Sequence(ids, tokens, self.front, self.characters, self.segments)


@dataclass
class VariantRows:
    rows: list[PlannedRow] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)


def check_all(variants: Sequence[Variant], context: Context) -> None:
    for index, variant in enumerate(variants):
        check_variant(variant, context, f"variants[{index}]")


def rows_of_item(item: WholeItem, variants: Sequence[Variant], context: Context, first: int = 0) -> VariantRows:
    """The item's rows under each variant; a variant that cannot meet this item is refused for it alone.

    `first` is the number of the first of these variants in the request.
    """
    found = VariantRows()
    if not item.tokens_read.size:
        return found
    sequence = item.sequence()
    for number, variant in enumerate(variants, first):
        try:
            found.rows.append(plan_row(item, sequence, number, variant, context))
        except Problem as problem:
            refused = problem.at(item=item.index, under=f"variants[{number}]")
            found.refused.append(Refused(item.index, number, refused))
    return found


def plan_row(item: WholeItem, sequence: sights.Sequence, number: int, variant: Variant, context: Context) -> PlannedRow:
    sight = sights.see(variant, sequence, context)
    if sight.plan is not None:
        check_one_window(int(sequence.ids.size), context.limits, "mask")
    offset = 1 - item.front  # row r predicts token r + 1 - front
    rows = readable_rows(sight, item.tokens_read - offset, offset, allow_leak=variant.allow_leak)
    row = _row(sequence.ids, sight, rows, item.top_k)
    return PlannedRow(row, item.index, number, offset, sight)


def _row(ids: IntArray, sight: Sight, rows: IntArray, top_k: int) -> Row:
    read = Read(rows=rows, targets=ids[rows + 1], top_k=top_k)
    # Without a mask nothing after the last row read is needed. A masked row is run whole: its receipt speaks of all.
    stop = int(ids.size) if sight.plan is not None else int(rows[-1]) + 1
    return Row(ids[:stop], sight.positions[:stop], read, sight.view, sight.plan)


def measured(row: PlannedRow, base: Row) -> PlannedRow:
    """The row, measured against the base by exact KL; the base itself needs no measuring."""
    return row if row.row is base else replace(row, row=replace(row.row, against=base))


def scored_tokens(planned: PlannedItem) -> IntArray:
    """Every token of the item that can be scored, [N]."""
    start = planned.header.scored_start
    return np.arange(planned.scored_stop if start is None else start, planned.scored_stop, dtype=np.int32)
