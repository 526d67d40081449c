"""Logprob as rows: one row per item and variant, read where the completion's tokens are predicted.

Pure. It must not know queues, engines' insides or the wire.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dualtrace.masks.spec import SegmentName
from dualtrace.problems import InvalidArgument, Problem, Reason
from dualtrace.questions.answers import ItemHeader
from dualtrace.questions.asked import LogprobItem, LogprobQuestion
from dualtrace.questions.compose import (
    Context,
    check_chars,
    check_count,
    check_tokens,
    check_top_k,
    check_variants,
    check_work,
    placed,
)
from dualtrace.questions.item_rows import WholeItem, check_all, rows_of_item, scored_tokens
from dualtrace.questions.token_plan import PlannedItem, PlannedRow, Refused, TokenPlan, slice_tokens
from dualtrace.tokens import Boundary, Tokens


@dataclass(frozen=True, eq=False)
class _Composed:
    tokens: Tokens
    prompt_tokens: int
    merged: bool
    prefix_id: int | None


def plan_logprob(question: LogprobQuestion, context: Context) -> TokenPlan:
    check_count(len(question.items), context.limits, "items", least=1)
    check_variants(question.variants, context.limits, len(question.items))
    check_all(question.variants, context)
    check_top_k(question.top_k, context.limits)
    check_chars([part for item in question.items for part in (item.prompt, item.completion)], context.limits)
    items: list[PlannedItem | Problem] = []
    rows: list[PlannedRow] = []
    refused: list[Refused] = []
    total = 0
    for index, item in enumerate(question.items):
        try:
            composed = _compose(item, question, context, f"items[{index}]")
        except Problem as problem:
            items.append(placed(problem, index))
            continue
        total += int(composed.tokens.ids.size) * len(question.variants)
        check_tokens(total, context.limits, len(question.variants))
        planned = _planned(composed)
        items.append(planned)
        found = rows_of_item(_whole(planned, index, question), question.variants, context)
        rows += found.rows
        refused += found.refused
    check_work(sum(row.row.length for row in rows), context.limits)
    return TokenPlan(tuple(items), tuple(rows), len(question.variants), question.top_k, total, tuple(refused))


def _compose(item: LogprobItem, question: LogprobQuestion, context: Context, field: str) -> _Composed:
    is_text = item.prompt.text is not None
    if is_text != (item.completion.text is not None):
        message = "prompt and completion must both be text or both be ids"
        raise InvalidArgument(Reason.MIXED_INPUT_KINDS, message, field=field)
    prefix_id = context.prefix_id(question.prefix, item.prompt, f"{field}.prompt")
    composed = _cut_text(item, question, context, field) if is_text else _join_ids(item, question, context, field)
    count = int(composed.tokens.ids.size)
    context.check_fits(count - 1 + (prefix_id is not None), field)
    return _Composed(composed.tokens, composed.prompt_tokens, composed.merged, prefix_id)


def _cut_text(item: LogprobItem, question: LogprobQuestion, context: Context, field: str) -> _Composed:
    assert item.prompt.text is not None
    assert item.completion.text is not None
    tokenizer = context.need_tokenizer(f"{field}.prompt.text")
    try:
        cut = tokenizer.cut(item.prompt.text, item.completion.text, question.boundary or Boundary.JOINT)
    except Problem as problem:
        # The policy is one of the whole request, not of the item.
        raise problem if problem.detail.field == "boundary" else problem.at(under=field) from None
    context.check_ids(cut.tokens.ids, f"{field}.completion.text")
    return _Composed(cut.tokens, cut.prompt_count, cut.boundary_token_merged, None)


def _join_ids(item: LogprobItem, question: LogprobQuestion, context: Context, field: str) -> _Composed:
    if question.boundary is not None:
        message = "a boundary policy cuts text; these items are ids"
        raise InvalidArgument(Reason.CONFLICT, message, field="boundary")
    prompt = context.tokens(item.prompt, f"{field}.prompt")
    completion = context.tokens(item.completion, f"{field}.completion")
    if not completion.ids.size:
        message = "the completion has no tokens; there is nothing to score"
        raise InvalidArgument(Reason.EMPTY_COMPLETION, message, field=f"{field}.completion")
    ids = np.concatenate([prompt.ids, completion.ids])
    tokens = Tokens(ids, prompt.pieces + completion.pieces, None, None)
    return _Composed(tokens, int(prompt.ids.size), False, None)


def _planned(composed: _Composed) -> PlannedItem:
    count = int(composed.tokens.ids.size)
    # The first token of a text without a prefix has no row before it: unscored.
    start = max(composed.prompt_tokens, 0 if composed.prefix_id is not None else 1)
    scored_start = start if start < count else None
    header = ItemHeader(
        token_count=count,
        prompt_tokens=composed.prompt_tokens,
        scored_start=scored_start,
        prefix_token_id=composed.prefix_id,
        boundary_token_merged=composed.merged,
        unscored=slice_tokens(composed.tokens, 0, count if scored_start is None else scored_start),
    )
    return PlannedItem(composed.tokens, header, count)


def _whole(planned: PlannedItem, index: int, question: LogprobQuestion) -> WholeItem:
    item = question.items[index]
    prompt, count = planned.header.prompt_tokens, planned.header.token_count
    segments = {SegmentName.COMPLETION: (prompt, count)}
    if prompt:
        segments[SegmentName.PROMPT] = (0, prompt)
    texts = (item.prompt.text, item.completion.text)
    characters = None if texts[0] is None or texts[1] is None else len(texts[0]) + len(texts[1])
    return WholeItem(index, planned, scored_tokens(planned), question.top_k, characters, segments)
