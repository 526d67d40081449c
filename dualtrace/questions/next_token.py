"""NextTokenDist as rows: one row per prompt and variant, read at its last position. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dualtrace.engine import FloatArray, IntArray, Read, Readout
from dualtrace.problems import BadNumbers, InvalidArgument, Problem, Reason
from dualtrace.questions.answers import NextTokenResult, NextTokens
from dualtrace.questions.asked import Input, NextTokenQuestion
from dualtrace.questions.compose import (
    Context,
    check_answer,
    check_chars,
    check_count,
    check_distinct_ids,
    check_tokens,
    check_top_k,
    check_variants,
    placed,
    with_prefix,
)
from dualtrace.questions.tails import tail_of
from dualtrace.rows import Row, plain_row


@dataclass(frozen=True, eq=False)
class _Prompt:
    ids: IntArray  # [T] prefix included
    prefix_id: int | None


@dataclass(frozen=True, eq=False)
class NextTokenPlan:
    """`rows[i]` belongs to `places[i]` = (prompt, variant)."""

    prompts: tuple[_Prompt | Problem, ...]
    rows: tuple[Row, ...]
    places: tuple[tuple[int, int], ...]
    extra_ids: IntArray
    prompt_tokens: int
    variants: int


def plan_next_token(question: NextTokenQuestion, context: Context) -> NextTokenPlan:
    check_count(len(question.prompts), context.limits, "prompts", least=0)
    check_variants(question.variants, context.limits)
    check_top_k(question.top_k, context.limits)
    check_chars(question.prompts, context.limits)
    extra = check_distinct_ids(question.extra_token_ids, context, "extra_token_ids")
    entries = len(question.prompts) * len(question.variants) * (question.top_k + int(extra.size))
    check_answer(entries, context.limits, "top_k")
    prompts: list[_Prompt | Problem] = []
    rows: list[Row] = []
    places: list[tuple[int, int]] = []
    total = 0
    for index, given in enumerate(question.prompts):
        try:
            prompt = _compose(given, question, context, f"prompts[{index}]")
        except Problem as problem:
            prompts.append(placed(problem, index))
            continue
        prompts.append(prompt)
        total += int(prompt.ids.size) * len(question.variants)
        check_tokens(total, context.limits)
        last = np.asarray([prompt.ids.size - 1], np.int32)
        read = Read(last, top_k=question.top_k, extra_ids=extra if extra.size else None, tail=True)
        for variant in range(len(question.variants)):
            rows.append(plain_row(prompt.ids, read))
            places.append((index, variant))
    return NextTokenPlan(tuple(prompts), tuple(rows), tuple(places), extra, total, len(question.variants))


def _compose(given: Input, question: NextTokenQuestion, context: Context, field: str) -> _Prompt:
    prefix_id = context.prefix_id(question.prefix, is_text=given.text is not None)
    tokens = context.tokens(given, field)
    context.check_ids(tokens.ids, f"{field}.text")
    ids = with_prefix(prefix_id, tokens.ids)
    if not ids.size:
        message = "the prompt has no tokens and no prefix token; there is no position to read"
        raise InvalidArgument(Reason.EMPTY_PROMPT, message, field=field)
    context.check_fits(int(ids.size), field)
    return _Prompt(ids, prefix_id)


def read_next_token(
    plan: NextTokenPlan, outcomes: dict[int, Readout | Problem], context: Context
) -> tuple[NextTokenResult, ...]:
    """Results in the order asked: all prompts of the first variant, then of the second, ..."""
    by_place = {place: outcomes[index] for index, place in enumerate(plan.places)}
    results = []
    for variant in range(plan.variants):
        for index, prompt in enumerate(plan.prompts):
            if isinstance(prompt, Problem):
                results.append(NextTokenResult(index, variant, prompt))
                continue
            outcome = by_place[index, variant]
            read = outcome if isinstance(outcome, Problem) else _read(plan, prompt, outcome, context)
            results.append(NextTokenResult(index, variant, read.at(item=index) if isinstance(read, Problem) else read))
    return tuple(results)


def _read(plan: NextTokenPlan, prompt: _Prompt, readout: Readout, context: Context) -> NextTokens | Problem:
    if readout.bad_rows:
        message = f"the model's logits hold NaN or infinity after the prompt (row {readout.bad_rows[0]})"
        return BadNumbers(Reason.NON_FINITE_LOGITS, message)
    top_ids = _first(readout.top_ids, np.int32)
    top_logprobs = _first(readout.top_logprobs, np.float64)
    extra_logprobs = _first(readout.extra_logprobs, np.float64)
    assert readout.tail_logprobs is not None
    listed = np.union1d(top_ids, plan.extra_ids).size
    beyond = None
    if plan.extra_ids.size:
        assert readout.rest_logprobs is not None
        beyond = tail_of(listed, context.vocab_size, float(readout.rest_logprobs[0]))
    return NextTokens(
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        top_pieces=context.describe(top_ids).pieces,
        tail=tail_of(int(top_ids.size), context.vocab_size, float(readout.tail_logprobs[0])),
        extra_logprobs=extra_logprobs,
        tail_beyond_extra=beyond,
        vocab_size=context.vocab_size,
        prompt_tokens=int(prompt.ids.size),
        prefix_token_id=prompt.prefix_id,
    )


def _first(column: IntArray | FloatArray | None, dtype: type) -> Any:
    return np.empty(0, dtype) if column is None else column[0]
