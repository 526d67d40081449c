"""Cards, provenance and execution over the wire."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings

from dualtrace.card import Capabilities, Limits, QuestionKind
from dualtrace.model_card import ModelProvenance
from dualtrace.problems import Internal
from dualtrace.v1 import model_pb2 as pb
from dualtrace.wire import model as wire
from tests.support import strategies as known
from tests.support.strategies import same

FEW = settings(max_examples=80)


@FEW
@given(known.CARDS)
def test_a_card_arrives_as_it_was_sent(card: Any) -> None:
    message = pb.ModelCard.FromString(wire.card_to_pb(card).SerializeToString())
    assert same(wire.card_from_pb(message), card)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_seconds_that_are_no_number_break_the_answer_and_not_the_report(value: float) -> None:
    with pytest.raises(Internal, match=r"execution\.total_seconds"):
        wire.execution_from_pb(pb.Execution(total_seconds=value))


@FEW
@given(known.EXECUTIONS)
def test_an_execution_arrives_as_it_was_sent(execution: Any) -> None:
    message = pb.Execution.FromString(wire.execution_to_pb(execution).SerializeToString())
    assert same(wire.execution_from_pb(message), execution)


@FEW
@given(known.PROVENANCES)
def test_the_digest_of_a_provenance_is_the_same_at_both_ends(provenance: ModelProvenance) -> None:
    message = wire.provenance_to_pb(provenance)
    assert message.digest == provenance.digest() == wire.provenance_from_pb(message).digest()


def test_the_questions_are_those_of_the_proto_both_ways() -> None:
    on_the_wire = {name.removeprefix("QUESTION_") for name in pb.Question.keys()} - {"UNSPECIFIED"}  # noqa: SIM118
    assert on_the_wire == {kind.value for kind in QuestionKind}


def test_every_limit_and_capability_has_its_field() -> None:
    for ours, theirs in ((Limits, pb.Limits), (Capabilities, pb.Capabilities)):
        assert {entry.name for entry in fields(ours)} == {field.name for field in theirs.DESCRIPTOR.fields}


def test_a_question_from_the_future_is_left_out() -> None:
    message = pb.Capabilities(questions=[1, 77])  # type: ignore[list-item]
    assert wire.capabilities_from_pb(message).questions == (QuestionKind.TOKENIZE,)


def test_token_id_zero_is_not_the_same_as_no_token() -> None:
    message = pb.ModelCard(bos_token_id=0)
    assert (wire.card_from_pb(message).bos_token_id, wire.card_from_pb(message).eos_token_id) == (0, None)
