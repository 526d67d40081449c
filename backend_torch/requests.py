"""A batch is checked before anything runs, so that a wrong request never becomes an index into a tensor.

It knows the engine's words and the model's limits. It must not know tensors.
"""

from __future__ import annotations

import numpy as np

from dualtrace.arrays import IntArray
from dualtrace.engine import Batch, Read, Reads
from dualtrace.model_card import ModelCard
from dualtrace.problems import Internal, InvalidArgument, Reason


def check_request(card: ModelCard, batch: Batch, reads: Reads) -> None:
    segments = batch.segments
    if len(reads) != len(segments):
        raise InvalidArgument(Reason.CONFLICT, f"{len(reads)} reads for {len(segments)} segments; one each is needed.")
    lengths: list[int] = []
    for index, (segment, read) in enumerate(zip(segments, reads, strict=True)):
        if segment.parent is not None and not 0 <= segment.parent < index:
            raise InvalidArgument(Reason.OUT_OF_RANGE, f"segment {index} names parent {segment.parent}; parents first.")
        if segment.parent is not None and segments[segment.parent].view.key != segment.view.key:
            raise InvalidArgument(
                Reason.CONFLICT, f"segment {index} has another view than its parent; shared rows have one view."
            )
        before = 0 if segment.parent is None else lengths[segment.parent]
        lengths.append(before + segment.ids.size)
        _check_tokens(card, segment.ids, segment.positions, lengths[index])
        _check_read(card, read, lengths[index])
        if segment.mask is not None:
            _check_plan(card, batch, index, lengths[index])
        if read.against is not None:
            _check_against(batch, index, read.against)


def _check_tokens(card: ModelCard, ids: IntArray, positions: IntArray, tokens: int) -> None:
    if tokens == 0 or ids.size != positions.size:
        raise InvalidArgument(Reason.EMPTY, f"a row of {ids.size} ids and {positions.size} positions; give one each.")
    if ids.size == 0:
        return
    if int(ids.min()) < 0 or int(ids.max()) >= card.vocab_size:
        wrong = int(ids[(ids < 0) | (ids >= card.vocab_size)][0])
        allowed = f"0-{card.vocab_size - 1}"
        raise InvalidArgument(
            Reason.TOKEN_OUT_OF_RANGE, f"token id {wrong} sent; the model has the ids {allowed}.", allowed=allowed
        )
    if int(positions.min()) < 0 or int(positions.max()) >= card.max_positions:
        wrong = int(positions[(positions < 0) | (positions >= card.max_positions)][0])
        raise InvalidArgument(
            Reason.INPUT_TOO_LONG,
            f"position {wrong} asked; the model has {card.max_positions} (0-{card.max_positions - 1}).",
            allowed=f"0-{card.max_positions - 1}",
        )


def _check_read(card: ModelCard, read: Read, tokens: int) -> None:
    rows = read.rows
    if rows.size and (int(rows.min()) < 0 or int(rows.max()) >= tokens or bool((np.diff(rows) <= 0).any())):
        raise InvalidArgument(
            Reason.OUT_OF_RANGE, f"rows must ascend and lie in 0-{tokens - 1}.", allowed=f"0-{tokens - 1}"
        )
    if read.targets is not None and read.targets.shape != rows.shape:
        raise InvalidArgument(Reason.CONFLICT, f"{read.targets.size} targets for {rows.size} rows; give one a row.")
    if not 0 <= read.top_k <= card.vocab_size:
        raise InvalidArgument(
            Reason.OUT_OF_RANGE,
            f"top_k {read.top_k} asked; the logits hold {card.vocab_size} ids.",
            allowed=f"0-{card.vocab_size}",
        )
    for what, ids in (("target", read.targets), ("extra id", read.extra_ids)):
        if ids is not None and ids.size and (int(ids.min()) < 0 or int(ids.max()) >= card.vocab_size):
            wrong = int(ids[(ids < 0) | (ids >= card.vocab_size)][0])
            allowed = f"0-{card.vocab_size - 1}"
            message = f"{what} {wrong} asked; the logits hold the ids {allowed}."
            raise InvalidArgument(Reason.TOKEN_OUT_OF_RANGE, message, allowed=allowed)


def _check_plan(card: ModelCard, batch: Batch, index: int, tokens: int) -> None:
    plan = batch.segments[index].mask
    assert plan is not None
    if (plan.layers, plan.heads) != (card.layers, card.query_heads) or plan.length < tokens:
        raise Internal(
            Reason.BUG,
            f"the mask of segment {index} is for {plan.layers} layers, {plan.heads} heads and {plan.length} tokens; "
            f"the model has {card.layers} and {card.query_heads}, the row {tokens}",
        )
    own = plan.positions()
    if own is not None and not np.array_equal(own[:tokens], batch.expand(index)[1]):
        raise Internal(Reason.BUG, f"segment {index} has other positions than its mask set")


def _check_against(batch: Batch, index: int, against: int) -> None:
    if not 0 <= against < index:
        raise InvalidArgument(
            Reason.OUT_OF_RANGE,
            f"segment {index} is measured against {against}; it must be an earlier one.",
            allowed=f"0-{index - 1}",
        )
    if not np.array_equal(batch.expand(index)[0], batch.expand(against)[0]):
        raise InvalidArgument(
            Reason.CONFLICT, f"segments {index} and {against} have different ids; KL needs the same text."
        )
