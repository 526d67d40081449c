"""Questions over the wire: what is sent arrives, not set is told from empty, what is odd is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from dualtrace.problems import InvalidArgument, Reason
from dualtrace.questions.asked import PreflightQuestion
from dualtrace.questions.score import plan_score
from dualtrace.v1 import scoring_pb2 as pb
from dualtrace.v1 import token_pb2, view_pb2
from dualtrace.wire import questions as wire
from tests.support import strategies as known
from tests.support.answering import fake_context
from tests.support.strategies import same
from tests.support.wired import over_the_wire

FEW = settings(max_examples=80)


@FEW
@given(known.LOGPROB_QUESTIONS)
def test_a_logprob_question_arrives_as_it_was_sent(question: Any) -> None:
    assert same(wire.logprob_from_pb(over_the_wire(wire.logprob_to_pb(question))), question)


@FEW
@given(known.ROLLING_QUESTIONS)
def test_a_rolling_question_arrives_as_it_was_sent(question: Any) -> None:
    assert same(wire.rolling_from_pb(over_the_wire(wire.rolling_to_pb(question))), question)


@FEW
@given(known.NEXT_TOKEN_QUESTIONS)
def test_a_next_token_question_arrives_as_it_was_sent(question: Any) -> None:
    assert same(wire.next_token_from_pb(over_the_wire(wire.next_token_to_pb(question))), question)


@FEW
@given(known.score_questions())
def test_a_score_question_arrives_as_it_was_sent(question: Any) -> None:
    assert same(wire.score_from_pb(over_the_wire(wire.score_to_pb(question))), question)


@FEW
@given(known.TOKENIZE_QUESTIONS)
def test_a_tokenize_question_arrives_as_it_was_sent(question: Any) -> None:
    assert same(wire.tokenize_from_pb(over_the_wire(wire.tokenize_to_pb(question))), question)


def test_a_preflight_question_arrives_as_it_was_sent() -> None:
    question = PreflightQuestion()
    assert wire.preflight_from_pb(over_the_wire(wire.preflight_to_pb(question))) == question


def test_ids_are_int32() -> None:
    request = pb.TokenizeRequest(inputs=[token_pb2.Input(ids=token_pb2.TokenIds(ids=[1, 2]))])
    given_ids = wire.tokenize_from_pb(request).inputs[0].ids
    assert given_ids is not None
    assert given_ids.dtype == np.int32


def test_empty_ids_are_not_the_same_as_nothing() -> None:
    request = pb.TokenizeRequest(inputs=[token_pb2.Input(ids=token_pb2.TokenIds())])
    assert wire.tokenize_from_pb(request).inputs[0].ids is not None


def test_a_label_list_that_is_set_and_empty_is_not_the_same_as_none() -> None:
    request = pb.ScoreRequest(query=TEXT, label_token_ids=token_pb2.TokenIds())
    assert wire.score_from_pb(request).labels == ()
    assert wire.score_from_pb(pb.ScoreRequest(query=TEXT)).labels is None


TEXT = token_pb2.Input(text="x")
EMPTY = token_pb2.Input()
KIND = token_pb2.PREFIX_KIND_UNSPECIFIED


def rolling(**fields: Any) -> Callable[[], Any]:
    return lambda: wire.rolling_from_pb(pb.RollingLogprobRequest(**fields))


def logprob(**fields: Any) -> Callable[[], Any]:
    return lambda: wire.logprob_from_pb(pb.LogprobRequest(**fields))


def score(**fields: Any) -> Callable[[], Any]:
    labels = token_pb2.TokenIds(ids=[1])
    request = pb.ScoreRequest(**{"label_token_ids": labels, **fields})
    return lambda: plan_score(wire.score_from_pb(request), replace(fake_context(), masks=True))


def following(**fields: Any) -> Callable[[], Any]:
    return lambda: wire.next_token_from_pb(pb.NextTokenDistRequest(**fields))


def prefix(**fields: Any) -> token_pb2.PrefixPolicy:
    return token_pb2.PrefixPolicy(**fields)


R = Reason
REFUSED = [
    ("no prompt", logprob(items=[pb.LogprobItem(completion=TEXT)]), R.MISSING, "items[0].prompt"),
    ("no completion", logprob(items=[pb.LogprobItem(prompt=TEXT)]), R.MISSING, "items[0].completion"),
    ("a prompt of nothing", logprob(items=[pb.LogprobItem(prompt=EMPTY, completion=TEXT)]), R.MISSING,
     "items[0].prompt"),
    ("an input of nothing", rolling(inputs=[TEXT, EMPTY]), R.MISSING, "inputs[1]"),
    ("a prompt that is not set", following(prompts=[EMPTY]), R.MISSING, "prompts[0]"),
    ("no query", score(items=[TEXT]), R.MISSING, "query"),
    ("a query of nothing", score(query=EMPTY), R.MISSING, "query"),
    ("an item of nothing", score(query=TEXT, items=[TEXT, EMPTY]), R.MISSING, "items[1]"),
    ("a prefix of nothing", rolling(prefix=prefix()), R.MISSING, "prefix"),
    ("a prefix kind of nothing", rolling(prefix=prefix(kind=0)), R.UNKNOWN_ENUM_VALUE, "prefix.kind"),
    ("a prefix kind from the future", rolling(prefix=prefix(kind=99)), R.UNKNOWN_ENUM_VALUE, "prefix.kind"),
    ("a negative prefix", rolling(prefix=prefix(token_id=-1)), R.TOKEN_OUT_OF_RANGE, "prefix.token_id"),
    ("a boundary of nothing", logprob(boundary=0), R.UNKNOWN_ENUM_VALUE, "boundary"),
    ("a boundary from the future", logprob(boundary=17), R.UNKNOWN_ENUM_VALUE, "boundary"),
    ("packing of nothing", score(query=TEXT, packing=0), R.UNKNOWN_ENUM_VALUE, "packing"),
    ("packing and item_first", score(query=TEXT, packing=1, item_first=True), R.CONFLICT, "item_first"),
    ("a delimiter without packing", score(query=TEXT, delimiter_token_id=3), R.CONFLICT, "delimiter_token_id"),
    ("a view of nothing", rolling(variants=[pb.Variant(view=view_pb2.View())]), R.MISSING, "variants[0].view"),
    ("a second view of nothing", following(variants=[pb.Variant(), pb.Variant(view=view_pb2.View())]), R.MISSING,
     "variants[1].view"),
    ("a preflight view of nothing", lambda: wire.preflight_from_pb(pb.PreflightRequest(views=[view_pb2.View()])),
     R.MISSING, "views[0]"),
]  # fmt: skip


@pytest.mark.parametrize(("ask", "reason", "field"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_a_message_leaves_open_or_contradicts_is_refused_by_name(
    ask: Callable[[], Any], reason: Reason, field: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        ask()
    assert (caught.value.reason, caught.value.detail.field) == (reason, field)
