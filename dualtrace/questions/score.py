"""The Score API as rows: one row per item and variant, read for its labels at the last position. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dualtrace.arrays import FloatArray, IntArray
from dualtrace.engine import Read
from dualtrace.masks.spec import SegmentName
from dualtrace.problems import InvalidArgument, Problem, Reason
from dualtrace.questions import sight as sights
from dualtrace.questions.answers import ScoreResult
from dualtrace.questions.asked import Input, ScoreQuestion
from dualtrace.questions.compose import (
    Context,
    check_answer,
    check_chars,
    check_count,
    check_distinct_ids,
    check_receipts,
    check_tokens,
    check_variants,
    placed,
)
from dualtrace.questions.item_rows import check_all
from dualtrace.questions.outcome import Outcome
from dualtrace.questions.packed import check_packing, plan_packed
from dualtrace.questions.score_plan import ScorePlace, ScorePlan
from dualtrace.questions.sight import Sight
from dualtrace.rows import Row
from dualtrace.tokens import Tokens


def plan_score(question: ScoreQuestion, context: Context) -> ScorePlan:
    check_count(len(question.items), context.limits, "items", least=0)
    check_variants(question.variants, context.limits, len(question.items))
    check_all(question.variants, context)
    check_receipts(question.variants, len(question.items), context)
    labels = _labels(question, context)
    check_answer(sum(ids.size for ids in labels) * len(question.variants), context.limits, "label_token_ids")
    temperature = _temperature(question)
    is_text = _is_text(question)
    check_packing(question, context)
    # The query is encoded once with each item, so it costs that often.
    check_chars([question.query] * max(1, len(question.items)) + list(question.items), context.limits)
    if question.packing is not None and question.items:
        packed = plan_packed(question, labels, context)
        if packed is not None:
            return replace(packed, temperature=temperature)
    query = None if is_text else context.tokens(question.query, "query")
    return replace(_plan_items(question, labels, query, context), temperature=temperature)


def _plan_items(
    question: ScoreQuestion, labels: Sequence[IntArray], query: Tokens | None, context: Context
) -> ScorePlan:
    prompts: list[sights.Sequence | Problem] = []
    total = 0
    for index, item in enumerate(question.items):
        try:
            prompt = _compose(item, question, query, context, f"items[{index}]")
        except Problem as problem:
            prompts.append(placed(problem, index))
            continue
        prompts.append(prompt)
        total += int(prompt.ids.size) * len(question.variants)
        check_tokens(total, context.limits, len(question.variants))
    rows: list[Row] = []
    seen: list[Sight] = []
    places: list[ScorePlace] = []
    for variant in range(len(question.variants)):
        for index, sequence in enumerate(prompts):
            if isinstance(sequence, Problem):
                places.append(ScorePlace(index, variant, problem=sequence))
                continue
            length = int(sequence.ids.size)
            try:
                sight = sights.see(question.variants[variant], sequence, context)
            except Problem as problem:
                refused = problem.at(item=index, under=f"variants[{variant}]")
                places.append(ScorePlace(index, variant, length, problem=refused))
                continue
            places.append(ScorePlace(index, variant, length, len(rows), length - 1))
            read = Read(np.asarray([length - 1], np.int32), extra_ids=labels[index])
            rows.append(Row(sequence.ids, sight.positions, read, sight.view, sight.plan))
            seen.append(sight)
    return ScorePlan(tuple(rows), tuple(seen), tuple(places), None, total)


def _labels(question: ScoreQuestion, context: Context) -> list[IntArray]:
    """The label ids of each item, checked. They are checked even when there are no items."""
    if question.labels is not None and question.item_labels is not None:
        message = "both label_token_ids and item_label_token_ids are set; give one list for all items, or one per item"
        raise InvalidArgument(Reason.CONFLICT, message, field="label_token_ids")
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
    item: Input, question: ScoreQuestion, query: Tokens | None, context: Context, field: str
) -> sights.Sequence:
    """The prompt: text as one text with the tokenizer's own special tokens, ids put together as they are."""
    if query is None:
        assert question.query.text is not None
        assert item.text is not None
        pair = (item.text, question.query.text) if question.item_first else (question.query.text, item.text)
        text = "".join(pair)
        tokens = context.tokens(Input(text=text), field, special_tokens=True)
        context.check_ids(tokens.ids, f"{field}.text")
        sequence = sights.Sequence(tokens.ids, tokens, 0, len(text))
    else:
        own = context.tokens(item, field)
        first, second = (own, query) if question.item_first else (query, own)
        cut, end = int(first.ids.size), int(first.ids.size + second.ids.size)
        names = (SegmentName.QUERY, SegmentName.ITEM)
        ranges = dict(zip(reversed(names) if question.item_first else names, ((0, cut), (cut, end)), strict=True))
        tokens = Tokens(np.concatenate([first.ids, second.ids]), first.pieces + second.pieces, None, None)
        sequence = sights.Sequence(tokens.ids, tokens, 0, None, {k: r for k, r in ranges.items() if r[0] < r[1]})
    if not sequence.ids.size:
        message = "query and item together have no tokens; there is no position to read"
        raise InvalidArgument(Reason.EMPTY_PROMPT, message, field=field)
    context.check_fits(int(sequence.ids.size), field)
    return sequence


def read_score(plan: ScorePlan, outcomes: dict[int, Outcome]) -> tuple[ScoreResult, ...]:
    """Results in the order asked."""
    return tuple(_read(plan, place, outcomes) for place in plan.places)


def _read(plan: ScorePlan, place: ScorePlace, outcomes: dict[int, Outcome]) -> ScoreResult:
    result = ScoreResult(place.item, place.variant, place.prompt_tokens)
    if place.problem is not None:
        return replace(result, problem=place.problem)
    try:
        readout, at = outcomes[place.row].at(place.read_row)
        applied = outcomes[place.row].applied(plan.sights[place.row])
    except Problem as problem:
        return replace(result, problem=problem.at(item=place.item))
    assert readout.extra_logprobs is not None
    logprobs = readout.extra_logprobs[at] if place.columns is None else readout.extra_logprobs[at][place.columns]
    scores = np.exp(logprobs) if plan.temperature is None else label_softmax(logprobs, plan.temperature)
    return replace(result, scores=tuple(scores.tolist()), label_logprobs=tuple(logprobs.tolist()), applied=applied)


def label_softmax(logprobs: FloatArray, temperature: float) -> FloatArray:
    """softmax over the labels only of logprobs / temperature; [L] float64, also for tiny temperatures."""
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best label to -inf, which is right
        shifted = (logprobs - logprobs.max()) / temperature
    weights = np.exp(shifted)
    result: FloatArray = weights / weights.sum()
    return result
