"""Every refusal of a question: its class, its reason, the field to blame and what is allowed. One table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from dualtrace.problems import InvalidArgument, Problem, Reason, Unsupported
from dualtrace.questions.answers import TokenizeAnswer
from dualtrace.questions.asked import (
    Input,
    NextTokenQuestion,
    Question,
    RollingQuestion,
    ScoreQuestion,
    TokenizeQuestion,
    Variant,
)
from dualtrace.questions.compose import Context
from dualtrace.questions.logprob import plan_logprob
from dualtrace.questions.next_token import plan_next_token
from dualtrace.questions.rolling import plan_rolling
from dualtrace.questions.score import plan_score
from dualtrace.questions.token_plan import TokenPlan
from dualtrace.questions.tokenize import answer_tokenize
from dualtrace.tokens import Boundary, Prefix, PrefixKind
from tests.support.answering import TOKENIZER, ask_logprob, fake_context, ids, text

TOP = TOKENIZER.size - 1
IDS = f"0-{TOP}"
CONTEXT = fake_context(max_items=5, max_top_k=9, max_request_tokens=600, max_request_chars=2000, max_work_tokens=20_000)
NO_TOKENIZER = Context(CONTEXT.vocab_size, CONTEXT.limits, None)
SURROGATE = text("a\ud800b")
GOOD = ids(1, 2)
BOS = Prefix(kind=PrefixKind.BOS)

PLANNERS: dict[str, Callable[[Any, Context], Any]] = {
    "LogprobQuestion": plan_logprob,
    "RollingQuestion": plan_rolling,
    "NextTokenQuestion": plan_next_token,
    "ScoreQuestion": plan_score,
    "TokenizeQuestion": answer_tokenize,
}


@dataclass(frozen=True)
class Refused:
    name: str
    question: Question
    reason: Reason
    field: str
    allowed: str = ""
    item: int | None = None  # None: the whole call
    kind: type[Problem] = InvalidArgument
    context: Context = CONTEXT


def logprob(prompt: Input, completion: Input, **fields: Any) -> Question:
    return ask_logprob((GOOD, GOOD), (prompt, completion), **fields)


def roll(*inputs: Input, **fields: Any) -> Question:
    return RollingQuestion(tuple(inputs), **fields)


def following(*prompts: Input, **fields: Any) -> Question:
    return NextTokenQuestion(tuple(prompts), **fields)


def score(query: Input, *items: Input, **fields: Any) -> Question:
    if "item_labels" not in fields:
        fields.setdefault("labels", (10, 20))
    return ScoreQuestion(query, tuple(items), **fields)


def tokenize(*inputs: Input) -> Question:
    return TokenizeQuestion(tuple(inputs))


R = Reason
BAD_ID = R.TOKEN_OUT_OF_RANGE
LONG = ids(*[1] * 514)
LOGPROB = [
    Refused("no items", ask_logprob(), R.EMPTY, "items"),
    Refused("too many items", ask_logprob(*[(GOOD, GOOD)] * 6), R.TOO_MANY, "items", "1-5"),
    Refused("top_k negative", logprob(GOOD, GOOD, top_k=-1), R.OUT_OF_RANGE, "top_k", "0-9"),
    Refused("top_k absurd", logprob(GOOD, GOOD, top_k=2**31 - 1), R.OUT_OF_RANGE, "top_k", "0-9"),
    Refused("too many variants", logprob(GOOD, GOOD, variants=(Variant(),) * 6), R.TOO_MANY, "variants", "1-5"),
    Refused("too many characters", logprob(text("x" * 1999), text("yz")), R.TOO_MANY, "", "0-2000"),
    Refused("empty completion ids", logprob(GOOD, ids()), R.EMPTY_COMPLETION, "items[1].completion", item=1),
    Refused("empty completion text", logprob(text("a"), text("")), R.EMPTY_COMPLETION, "items[1].completion", item=1),
    Refused("text and ids", logprob(text("a"), GOOD), R.MIXED_INPUT_KINDS, "items[1]", item=1),
    Refused("ids and text", logprob(GOOD, text("a")), R.MIXED_INPUT_KINDS, "items[1]", item=1),
    Refused("id negative", logprob(ids(0, -1), GOOD), BAD_ID, "items[1].prompt.ids[1]", IDS, 1),
    Refused("id too high", logprob(GOOD, ids(TOP + 1)), BAD_ID, "items[1].completion.ids[0]", IDS, 1),
    Refused("too long", logprob(LONG, GOOD), R.INPUT_TOO_LONG, "items[1]", "1-512", 1),
    Refused("boundary for ids", logprob(GOOD, GOOD, boundary=Boundary.JOINT), R.CONFLICT, "boundary", item=1),
    Refused("surrogate in the prompt", logprob(SURROGATE, text("a")), R.INVALID_TEXT, "items[1].prompt", item=1),
    Refused("surrogate behind it", logprob(text("a"), SURROGATE), R.INVALID_TEXT, "items[1].completion", item=1),
    Refused(
        "straddled", logprob(text("th"), text("e"), boundary=Boundary.STRICT), R.BOUNDARY_STRADDLED, "boundary", item=1
    ),
    Refused(
        "prefix id too high", logprob(GOOD, GOOD, prefix=Prefix(token_id=TOP + 1)),
        BAD_ID, "prefix.token_id", IDS, 1,
    ),
    Refused(
        "text without a tokenizer", logprob(text("a"), text("b")), R.NO_TOKENIZER, "items[1].prompt.text", item=1,
        kind=Unsupported, context=NO_TOKENIZER,
    ),
    Refused(
        "a named prefix without a tokenizer", logprob(GOOD, GOOD, prefix=BOS),
        R.NO_PREFIX_TOKEN, "prefix", "NONE or a token id", 1, context=NO_TOKENIZER,
    ),
]  # fmt: skip
ROLLING = [
    Refused("no inputs", roll(), R.EMPTY, "inputs"),
    Refused("too many inputs", roll(*[GOOD] * 6), R.TOO_MANY, "inputs", "1-5"),
    Refused("top_k above the limit", roll(GOOD, top_k=10), R.OUT_OF_RANGE, "top_k", "0-9"),
    Refused("window of nothing", roll(GOOD, max_tokens=0), R.OUT_OF_RANGE, "max_tokens", "1-512"),
    Refused("window negative", roll(GOOD, max_tokens=-5), R.OUT_OF_RANGE, "max_tokens", "1-512"),
    Refused("window above the model", roll(GOOD, max_tokens=513), R.OUT_OF_RANGE, "max_tokens", "1-512"),
    Refused("stride of nothing", roll(GOOD, stride=0), R.OUT_OF_RANGE, "stride", "1-512"),
    Refused("stride above the window", roll(GOOD, max_tokens=8, stride=9), R.OUT_OF_RANGE, "stride", "1-8"),
    Refused("too many tokens", roll(ids(*[1] * 601)), R.TOO_MANY, "", "0-600"),
    Refused("too many characters", roll(text("é" * 2001)), R.TOO_MANY, "", "0-2000"),
    Refused("too much work", roll(ids(*[1] * 500), max_tokens=50, stride=1), R.TOO_MANY, "", "0-20000"),
    Refused("id too high", roll(GOOD, ids(TOP + 1)), BAD_ID, "inputs[1].ids[0]", IDS, 1),
    Refused("surrogate", roll(GOOD, SURROGATE), R.INVALID_TEXT, "inputs[1].text", item=1),
    Refused("prefix id", roll(GOOD, prefix=Prefix(token_id=TOP + 1)), BAD_ID, "prefix.token_id", IDS, 0),
]
NEXT = [
    Refused("too many prompts", following(*[GOOD] * 6), R.TOO_MANY, "prompts", "0-5"),
    Refused("top_k negative", following(GOOD, top_k=-3), R.OUT_OF_RANGE, "top_k", "0-9"),
    Refused("top_k without prompts", following(top_k=10), R.OUT_OF_RANGE, "top_k", "0-9"),
    Refused("extra id negative", following(GOOD, extra_token_ids=(1, -1)), BAD_ID, "extra_token_ids[1]", IDS),
    Refused("extra id too high", following(extra_token_ids=(TOP + 1,)), BAD_ID, "extra_token_ids[0]", IDS),
    Refused("extra id twice", following(GOOD, extra_token_ids=(4, 5, 4)), R.DUPLICATE, "extra_token_ids"),
    Refused(
        "an answer that no message holds", following(*[GOOD] * 5, extra_token_ids=tuple(range(121))),
        R.TOO_MANY, "top_k", "0-600",
    ),
    Refused("no tokens", following(GOOD, ids()), R.EMPTY_PROMPT, "prompts[1]", item=1),
    Refused("no text", following(GOOD, text("")), R.EMPTY_PROMPT, "prompts[1]", item=1),
    Refused("id negative", following(GOOD, ids(-7)), BAD_ID, "prompts[1].ids[0]", IDS, 1),
    Refused("too long", following(GOOD, ids(*[1] * 513)), R.INPUT_TOO_LONG, "prompts[1]", "1-512", 1),
    Refused(
        "text without a tokenizer", following(text("a")), R.NO_TOKENIZER, "prompts[0].text", item=0, kind=Unsupported,
        context=NO_TOKENIZER,
    ),
]  # fmt: skip
SCORE = [
    Refused("labels missing", score(GOOD, GOOD, labels=None), R.MISSING, "label_token_ids"),
    Refused("labels empty", score(GOOD, GOOD, labels=()), R.EMPTY, "label_token_ids.ids"),
    Refused("label negative", score(GOOD, GOOD, labels=(3, -1)), BAD_ID, "label_token_ids.ids[1]", IDS),
    Refused("label too high", score(GOOD, GOOD, labels=(TOP + 1,)), BAD_ID, "label_token_ids.ids[0]", IDS),
    Refused("label twice", score(GOOD, GOOD, labels=(3, 4, 3)), R.DUPLICATE, "label_token_ids.ids"),
    Refused("a list too few", score(GOOD, GOOD, GOOD, item_labels=((1,),)), R.CONFLICT, "item_label_token_ids"),
    Refused("a list too many", score(GOOD, item_labels=((1,),)), R.CONFLICT, "item_label_token_ids"),
    Refused(
        "an item's labels empty", score(GOOD, GOOD, GOOD, item_labels=((1,), ())),
        R.EMPTY, "item_label_token_ids.lists[1].ids",
    ),
    Refused(
        "an item's label twice", score(GOOD, GOOD, item_labels=((1, 1),)),
        R.DUPLICATE, "item_label_token_ids.lists[0].ids",
    ),
    Refused("temperature without softmax", score(GOOD, GOOD, temperature=1.0), R.CONFLICT, "temperature"),
    *(
        Refused(
            f"temperature {value}", score(GOOD, GOOD, apply_softmax=True, temperature=value), reason, "temperature",
            "> 0",
        )
        for value, reason in (
            (0.0, R.OUT_OF_RANGE), (-1.0, R.OUT_OF_RANGE), (math.nan, R.NOT_FINITE), (math.inf, R.NOT_FINITE),
            (-math.inf, R.NOT_FINITE),
        )
    ),
    Refused("text query, id items", score(text("a"), text("b"), GOOD), R.MIXED_INPUT_KINDS, "items[1]"),
    Refused("id query, text items", score(GOOD, text("b")), R.MIXED_INPUT_KINDS, "items[0]"),
    Refused("too many items", score(GOOD, *[GOOD] * 6), R.TOO_MANY, "items", "0-5"),
    Refused("query id negative", score(ids(-1), GOOD), BAD_ID, "query.ids[0]", IDS),
    Refused("item id too high", score(GOOD, GOOD, ids(TOP + 1)), BAD_ID, "items[1].ids[0]", IDS, 1),
    Refused("no tokens", score(ids(), GOOD, ids()), R.EMPTY_PROMPT, "items[1]", item=1),
    Refused("too long", score(GOOD, GOOD, ids(*[1] * 511)), R.INPUT_TOO_LONG, "items[1]", "1-512", 1),
    Refused("surrogate in an item", score(text("a"), SURROGATE), R.INVALID_TEXT, "items[0].text", item=0),
    Refused("a label list no message holds", score(GOOD, *[GOOD] * 5, labels=tuple(range(121))), R.TOO_MANY,
            "label_token_ids", "0-600"),
    Refused("text without a tokenizer", score(text("a"), text("b")), R.NO_TOKENIZER, "items[0].text", item=0,
            kind=Unsupported, context=NO_TOKENIZER),
]  # fmt: skip
TOKENIZE = [
    Refused("too many inputs", tokenize(*[GOOD] * 6), R.TOO_MANY, "inputs", "0-5"),
    Refused("too many characters", tokenize(text("x" * 1500), text("x" * 501)), R.TOO_MANY, "", "0-2000"),
    Refused("id too high", tokenize(GOOD, ids(TOP + 1)), BAD_ID, "inputs[1].ids[0]", IDS, 1),
    Refused("surrogate", tokenize(GOOD, SURROGATE), R.INVALID_TEXT, "inputs[1].text", item=1),
    Refused("no tokenizer", tokenize(text("a")), R.NO_TOKENIZER, "inputs", kind=Unsupported, context=NO_TOKENIZER),
]
TABLE = [*LOGPROB, *ROLLING, *NEXT, *SCORE, *TOKENIZE]
EACH = pytest.mark.parametrize(
    "case", TABLE, ids=lambda case: f"{type(case.question).__name__.removesuffix('Question')}: {case.name}"
)


def refuse(case: Refused) -> Problem:
    """The problem of the whole call, or the one of the item that the table names."""
    planner = PLANNERS[type(case.question).__name__]
    if case.item is None:
        with pytest.raises(Problem) as caught:
            planner(case.question, case.context)
        return caught.value
    made = planner(case.question, case.context)
    if isinstance(made, TokenizeAnswer):
        problem: Any = made.results[case.item]
    elif isinstance(made, TokenPlan):
        problem = made.items[case.item]
    else:
        problem = made.places[case.item].problem
    assert isinstance(problem, Problem), f"item {case.item} was not refused"
    return problem


@EACH
def test_a_refusal_has_its_reason_field_and_range(case: Refused) -> None:
    detail = refuse(case).detail
    assert (detail.reason, detail.field, detail.allowed) == (case.reason, case.field, case.allowed)


@EACH
def test_a_refusal_is_of_its_class_and_names_its_item(case: Refused) -> None:
    problem = refuse(case)
    assert (type(problem), problem.detail.item) == (case.kind, case.item)


@EACH
def test_the_message_of_a_refusal_says_something_and_can_be_sent(case: Refused) -> None:
    message = refuse(case).detail.message
    assert 10 < len(message) < 300
    assert message.encode()


def test_a_prefix_that_is_no_id_is_refused_by_name() -> None:
    with pytest.raises(Problem) as caught:
        Prefix(token_id=-1)
    assert (caught.value.reason, caught.value.detail.field) == (Reason.TOKEN_OUT_OF_RANGE, "prefix.token_id")


def test_refused_items_under_very_many_variants_are_refused_as_a_whole() -> None:
    question = NextTokenQuestion((ids(),) * 1000, variants=(Variant(),) * 1000)
    with pytest.raises(Problem) as caught:
        plan_next_token(question, fake_context())
    assert (caught.value.reason, caught.value.detail.field) == (Reason.TOO_MANY, "variants")


@pytest.mark.parametrize("variants", [2, 3])
@pytest.mark.parametrize("asked", [roll, following], ids=["rolling", "next"])
def test_too_many_tokens_are_told_under_each_variant_and_together(
    asked: Callable[..., Question], variants: int
) -> None:
    question = asked(ids(*[1] * 400), variants=(Variant(),) * variants)
    with pytest.raises(Problem) as caught:
        PLANNERS[type(question).__name__](question, CONTEXT)
    message = caught.value.detail.message
    assert f"{400 * variants} tokens (400 under each of {variants} variants" in message
    assert "ask its variants apart" in message
