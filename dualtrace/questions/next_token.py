"""NextTokenDist as rows: one row per prompt and variant, read at its last position. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dualtrace.arrays import FloatArray, IntArray
from dualtrace.engine import Read
from dualtrace.masks.spec import SegmentName
from dualtrace.problems import InvalidArgument, Problem, Reason
from dualtrace.questions.answers import NextTokenResult, NextTokens
from dualtrace.questions.asked import Input, NextTokenQuestion
from dualtrace.questions.compose import (
    Context,
    check_answer,
    check_chars,
    check_count,
    check_distinct_ids,
    check_receipts,
    check_tokens,
    check_top_k,
    check_variants,
    placed,
    with_prefix,
)
from dualtrace.questions.item_rows import check_all
from dualtrace.questions.outcome import Outcome
from dualtrace.questions.sight import Sequence, Sight, see
from dualtrace.questions.tails import tail_of
from dualtrace.rows import Row


@dataclass(frozen=True, eq=False)
class _Prompt:
    sequence: Sequence
    prefix_id: int | None


@dataclass(frozen=True)
class _Place:
    """Where the answer of one prompt under one variant stands: in this row, or in a problem."""

    item: int
    variant: int
    row: int | None = None
    problem: Problem | None = None


@dataclass(frozen=True, eq=False)
class NextTokenPlan:
    prompts: tuple[_Prompt | None, ...]  # None for one that could not be composed
    rows: tuple[Row, ...]
    sights: tuple[Sight, ...]  # one per row
    places: tuple[_Place, ...]  # in the order of the answer
    extra_ids: IntArray
    prompt_tokens: int


def plan_next_token(question: NextTokenQuestion, context: Context) -> NextTokenPlan:
    check_count(len(question.prompts), context.limits, "prompts", least=0)
    check_variants(question.variants, context.limits, len(question.prompts))
    check_all(question.variants, context)
    check_receipts(question.variants, len(question.prompts), context)
    check_top_k(question.top_k, context.limits)
    check_chars(question.prompts, context.limits)
    extra = check_distinct_ids(question.extra_token_ids, context, "extra_token_ids")
    entries = len(question.prompts) * len(question.variants) * (question.top_k + int(extra.size))
    check_answer(entries, context.limits, "top_k")
    prompts, problems, total = _compose_all(question, context)
    rows: list[Row] = []
    sights: list[Sight] = []
    places: list[_Place] = []
    for variant in range(len(question.variants)):
        for index, prompt in enumerate(prompts):
            if prompt is None:
                places.append(_Place(index, variant, problem=problems[index]))
                continue
            try:
                sight = see(question.variants[variant], prompt.sequence, context)
            except Problem as problem:
                refused = problem.at(item=index, under=f"variants[{variant}]")
                places.append(_Place(index, variant, problem=refused))
                continue
            places.append(_Place(index, variant, row=len(rows)))
            rows.append(_row(prompt.sequence.ids, sight, question.top_k, extra))
            sights.append(sight)
    return NextTokenPlan(tuple(prompts), tuple(rows), tuple(sights), tuple(places), extra, total)


def _row(ids: IntArray, sight: Sight, top_k: int, extra: IntArray) -> Row:
    last = np.asarray([ids.size - 1], np.int32)
    read = Read(last, top_k=top_k, extra_ids=extra if extra.size else None, tail=True)
    return Row(ids, sight.positions, read, sight.view, sight.plan)


def _compose_all(question: NextTokenQuestion, context: Context) -> tuple[list[_Prompt | None], dict[int, Problem], int]:
    prompts: list[_Prompt | None] = []
    problems: dict[int, Problem] = {}
    total = 0
    for index, given in enumerate(question.prompts):
        try:
            prompt = _compose(given, question, context, f"prompts[{index}]")
        except Problem as problem:
            prompts.append(None)
            problems[index] = placed(problem, index)
            continue
        prompts.append(prompt)
        total += int(prompt.sequence.ids.size) * len(question.variants)
        check_tokens(total, context.limits, len(question.variants))
    return prompts, problems, total


def _compose(given: Input, question: NextTokenQuestion, context: Context, field: str) -> _Prompt:
    prefix_id = context.prefix_id(question.prefix, given, field)
    tokens = context.tokens(given, field)
    context.check_ids(tokens.ids, f"{field}.text")
    ids = with_prefix(prefix_id, tokens.ids)
    if not ids.size:
        message = "the prompt has no tokens and no prefix token; there is no position to read"
        raise InvalidArgument(Reason.EMPTY_PROMPT, message, field=field)
    context.check_fits(int(ids.size), field)
    characters = None if given.text is None else len(given.text)
    segments = {SegmentName.PROMPT: (0, int(tokens.ids.size))} if tokens.ids.size else {}
    front = 0 if prefix_id is None else 1
    return _Prompt(Sequence(ids, tokens, front, characters, segments), prefix_id)


def read_next_token(plan: NextTokenPlan, outcomes: dict[int, Outcome], context: Context) -> tuple[NextTokenResult, ...]:
    """Results in the order asked: all prompts of the first variant, then of the second, ..."""
    results = []
    for place in plan.places:
        outcome: NextTokens | Problem
        try:
            outcome = _read(plan, place, outcomes, context)
        except Problem as problem:
            outcome = problem.at(item=place.item)
        results.append(NextTokenResult(place.item, place.variant, outcome))
    return tuple(results)


def _read(plan: NextTokenPlan, place: _Place, outcomes: dict[int, Outcome], context: Context) -> NextTokens:
    if place.row is None:
        assert place.problem is not None
        raise place.problem
    prompt = plan.prompts[place.item]
    assert prompt is not None
    outcome = outcomes[place.row]
    readout, at = outcome.at(int(prompt.sequence.ids.size) - 1)
    top_ids = _entry(readout.top_ids, at, np.int32)
    assert readout.tail_logprobs is not None
    beyond = None
    if plan.extra_ids.size:
        assert readout.rest_logprobs is not None
        listed = np.union1d(top_ids, plan.extra_ids).size
        beyond = tail_of(listed, context.vocab_size, float(readout.rest_logprobs[at]))
    return NextTokens(
        top_ids=top_ids,
        top_logprobs=_entry(readout.top_logprobs, at, np.float64),
        top_pieces=context.describe(top_ids).pieces,
        tail=tail_of(int(top_ids.size), context.vocab_size, float(readout.tail_logprobs[at])),
        extra_logprobs=_entry(readout.extra_logprobs, at, np.float64),
        tail_beyond_extra=beyond,
        vocab_size=context.vocab_size,
        prompt_tokens=int(prompt.sequence.ids.size),
        prefix_token_id=prompt.prefix_id,
        applied=outcome.applied(plan.sights[place.row]),
    )


def _entry(column: IntArray | FloatArray | None, at: int, dtype: type) -> Any:
    return np.empty(0, dtype) if column is None else column[at]
