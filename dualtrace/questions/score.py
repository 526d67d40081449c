"""The Score API as rows: one row per item and variant, read for its labels at the last position. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dualtrace.engine import FloatArray, IntArray, Read, Readout
from dualtrace.problems import BadNumbers, InvalidArgument, Problem, Reason
from dualtrace.questions.answers import ScoreResult
from dualtrace.questions.asked import Input, ScoreQuestion
from dualtrace.questions.compose import (
    Context,
    check_answer,
    check_chars,
    check_count,
    check_distinct_ids,
    check_tokens,
    check_variants,
    placed,
)
from dualtrace.rows import Row, plain_row


@dataclass(frozen=True, eq=False)
class ScorePlan:
    """`rows[i]` belongs to `places[i]` = (item, variant)."""

    prompts: tuple[IntArray | Problem, ...]  # [T] as composed
    rows: tuple[Row, ...]
    places: tuple[tuple[int, int], ...]
    temperature: float | None  # None: no softmax over the labels
    prompt_tokens: int
    variants: int


def plan_score(question: ScoreQuestion, context: Context) -> ScorePlan:
    check_count(len(question.items), context.limits, "items", least=0)
    check_variants(question.variants, context.limits)
    labels = _labels(question, context)
    check_answer(sum(ids.size for ids in labels) * len(question.variants), context.limits, "label_token_ids")
    temperature = _temperature(question)
    kind = _is_text(question)
    check_chars([question.query, *question.items], context.limits)
    query = None if kind else context.tokens(question.query, "query")
    prompts: list[IntArray | Problem] = []
    rows: list[Row] = []
    places: list[tuple[int, int]] = []
    total = 0
    for index, item in enumerate(question.items):
        try:
            prompt = _compose(item, question, None if query is None else query.ids, context, f"items[{index}]")
        except Problem as problem:
            prompts.append(placed(problem, index))
            continue
        prompts.append(prompt)
        total += int(prompt.size) * len(question.variants)
        check_tokens(total, context.limits)
        read = Read(np.asarray([prompt.size - 1], np.int32), extra_ids=labels[index])
        for variant in range(len(question.variants)):
            rows.append(plain_row(prompt, read))
            places.append((index, variant))
    return ScorePlan(tuple(prompts), tuple(rows), tuple(places), temperature, total, len(question.variants))


def _labels(question: ScoreQuestion, context: Context) -> list[IntArray]:
    """The label ids of each item, checked. They are checked even when there are no items."""
    if question.item_labels is not None:
        if len(question.item_labels) != len(question.items):
            message = f"{len(question.item_labels)} label lists for {len(question.items)} items; give one per item"
            raise InvalidArgument(Reason.CONFLICT, message, field="item_label_token_ids")
        return [
            _label_list(ids, context, f"item_label_token_ids.lists[{index}].ids")
            for index, ids in enumerate(question.item_labels)
        ]
    if question.labels is None:
        message = "no labels; set label_token_ids or item_label_token_ids"
        raise InvalidArgument(Reason.MISSING, message, field="label_token_ids")
    shared = _label_list(question.labels, context, "label_token_ids.ids")
    return [shared] * len(question.items)


def _label_list(ids: tuple[int, ...], context: Context, field: str) -> IntArray:
    if not ids:
        raise InvalidArgument(Reason.EMPTY, "no label ids; at least one is needed", field=field)
    return check_distinct_ids(ids, context, field)


def _temperature(question: ScoreQuestion) -> float | None:
    given = question.temperature
    if not question.apply_softmax:
        if given is not None:
            message = "a temperature works on the softmax over the labels; set apply_softmax or leave it out"
            raise InvalidArgument(Reason.CONFLICT, message, field="temperature")
        return None
    temperature = 1.0 if given is None else given
    if not math.isfinite(temperature):
        message = f"temperature {temperature} asked; it must be finite and above 0"
        raise InvalidArgument(Reason.NOT_FINITE, message, field="temperature", allowed="> 0")
    if temperature <= 0:
        message = f"temperature {temperature} asked; it must be above 0"
        raise InvalidArgument(Reason.OUT_OF_RANGE, message, field="temperature", allowed="> 0")
    return temperature


def _is_text(question: ScoreQuestion) -> bool:
    is_text = question.query.text is not None
    for index, item in enumerate(question.items):
        if (item.text is not None) != is_text:
            have, want = ("ids", "text") if is_text else ("text", "ids")
            message = f"the query is {want} and item {index} is {have}; send all as text or all as ids"
            raise InvalidArgument(Reason.MIXED_INPUT_KINDS, message, field=f"items[{index}]")
    return is_text


def _compose(
    item: Input, question: ScoreQuestion, query_ids: IntArray | None, context: Context, field: str
) -> IntArray:
    """The prompt: text as one text with the tokenizer's own special tokens, ids put together as they are."""
    if query_ids is None:
        assert question.query.text is not None
        assert item.text is not None
        pair = (item.text, question.query.text) if question.item_first else (question.query.text, item.text)
        ids = context.tokens(Input(text="".join(pair)), field, special_tokens=True).ids
        context.check_ids(ids, f"{field}.text")
    else:
        item_ids = context.tokens(item, field).ids
        ids = np.concatenate([item_ids, query_ids] if question.item_first else [query_ids, item_ids])
    if not ids.size:
        message = "query and item together have no tokens; there is no position to read"
        raise InvalidArgument(Reason.EMPTY_PROMPT, message, field=field)
    context.check_fits(int(ids.size), field)
    return ids


def read_score(plan: ScorePlan, outcomes: dict[int, Readout | Problem]) -> tuple[ScoreResult, ...]:
    """Results in the order asked: all items of the first variant, then of the second, ..."""
    by_place = {place: outcomes[index] for index, place in enumerate(plan.places)}
    results = []
    for variant in range(plan.variants):
        for index, prompt in enumerate(plan.prompts):
            if isinstance(prompt, Problem):
                results.append(ScoreResult(index, variant, 0, problem=prompt))
            else:
                results.append(_read(plan, index, variant, int(prompt.size), by_place[index, variant]))
    return tuple(results)


def _read(plan: ScorePlan, item: int, variant: int, prompt_tokens: int, outcome: Readout | Problem) -> ScoreResult:
    if isinstance(outcome, Problem):
        return ScoreResult(item, variant, prompt_tokens, problem=outcome.at(item=item))
    if outcome.bad_rows:
        message = f"the model's logits hold NaN or infinity after the item (row {outcome.bad_rows[0]})"
        return ScoreResult(
            item, variant, prompt_tokens, problem=BadNumbers(Reason.NON_FINITE_LOGITS, message, item=item)
        )
    assert outcome.extra_logprobs is not None
    logprobs = outcome.extra_logprobs[0]
    scores = np.exp(logprobs) if plan.temperature is None else label_softmax(logprobs, plan.temperature)
    return ScoreResult(item, variant, prompt_tokens, tuple(scores.tolist()), tuple(logprobs.tolist()))


def label_softmax(logprobs: FloatArray, temperature: float) -> FloatArray:
    """softmax over the labels only of logprobs / temperature; [L] float64, also for tiny temperatures."""
    shifted = (logprobs - logprobs.max()) / temperature
    weights = np.exp(shifted)
    result: FloatArray = weights / weights.sum()
    return result
