"""A mask plan obeyed row by row, and tallied where it is applied.

It knows plans and tallies. It must not know decoders or reads.
"""

from __future__ import annotations

import numpy as np

from dualtrace.arrays import IntArray
from dualtrace.masks.plan import MaskPlan
from dualtrace.masks.receipt import Counts, Tally
from dualtrace.model_card import ModelCard
from dualtrace.problems import Internal, InvalidArgument, Reason
from dualtrace.reference.attention import BoolArray, Sight


class PlannedMask:
    """`attention.Mask` from a plan, for a plain row of `tokens` rows of which those from `own` on are tallied.

    The plan may be longer than the row: a shared prefix carries the plan of the sequences it begins.
    """

    def __init__(self, plan: MaskPlan, tokens: int, own: int) -> None:
        self._plan = plan
        self._tokens = tokens
        self._own = own
        self._tally = Tally(plan.layers, plan.heads)

    def sight(self, layer: int, q0: int, q1: int) -> Sight:
        zeroed = self._plan.zero_block(layer, q0, q1)
        return Sight(
            self._keys(self._plan.block(layer, q0, q1), q0),
            None if zeroed is None else self._keys(zeroed, q0),
            self._plan.zero_rows(layer, q0, q1),
        )

    def witness(self, layer: int, q0: int, allowed: BoolArray, zeroed: BoolArray | None) -> None:
        skip = max(self._own - q0, 0)  # rows of the parent, who counts them itself
        if skip < allowed.shape[1]:
            rest = None if zeroed is None else zeroed[:, skip:]
            self._tally.add(layer, allowed[:, skip:], q0 + skip, zeroed=rest)

    def counts(self) -> Counts:
        return self._tally.counts()

    def _keys(self, block: BoolArray, q0: int) -> BoolArray:
        if block[:, :, self._tokens :].any():
            raise Internal(
                Reason.BUG,
                f"a row from {q0} on sees a key past the end of its segment, row {self._tokens}: the sequence was cut "
                "where the mask has no cut.",
            )
        return block[:, :, : self._tokens]


def check_plan(plan: MaskPlan, card: ModelCard, positions: IntArray) -> None:
    """A plan that was compiled for another model or another sequence is refused."""
    if (plan.layers, plan.heads) != (card.layers, card.query_heads):
        raise InvalidArgument(
            Reason.UNSUPPORTED_MASK,
            f"the mask is compiled for {plan.layers} layers of {plan.heads} heads; "
            f"the model has {card.layers} of {card.query_heads}.",
            field="mask",
        )
    if plan.length < positions.size:
        raise InvalidArgument(
            Reason.UNSUPPORTED_MASK,
            f"the mask is compiled for {plan.length} rows; the segment reaches row {positions.size - 1}.",
            field="mask",
        )
    wanted = plan.positions()
    if wanted is not None and not np.array_equal(wanted[: positions.size], positions):
        raise InvalidArgument(
            Reason.CONFLICT, "the mask resets positions, and the segment has others; give it the plan's.", field="mask"
        )
