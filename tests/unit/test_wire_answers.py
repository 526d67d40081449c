"""Answers over the wire: every one arrives to the last bit, and what cannot be trusted is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from dualtrace.engine import int_array
from dualtrace.problems import Internal, Reason
from dualtrace.questions.answers import AnswerHeader, ItemDone, TokenChunk
from dualtrace.tokens import Tokens
from dualtrace.v1 import scoring_pb2 as pb
from dualtrace.wire import answers as wire
from dualtrace.wire import events
from tests.support import strategies as known
from tests.support.answering import fake_engine
from tests.support.strategies import same
from tests.support.wired import over_the_wire

FEW = settings(max_examples=80)


@FEW
@given(known.EVENTS)
def test_an_event_arrives_as_it_was_sent(event: Any) -> None:
    assert same(events.event_from_pb(over_the_wire(events.event_to_pb(event, 3))), event)


@FEW
@given(known.NEXT_TOKEN_ANSWERS)
def test_a_next_token_answer_arrives_as_it_was_sent(answer: Any) -> None:
    assert same(wire.next_token_from_pb(over_the_wire(wire.next_token_to_pb(answer))), answer)


@FEW
@given(known.SCORE_ANSWERS)
def test_a_score_answer_arrives_as_it_was_sent(answer: Any) -> None:
    assert same(wire.score_from_pb(over_the_wire(wire.score_to_pb(answer))), answer)


@FEW
@given(known.TOKENIZE_ANSWERS)
def test_a_tokenize_answer_arrives_as_it_was_sent(answer: Any) -> None:
    assert same(wire.tokenize_from_pb(over_the_wire(wire.tokenize_to_pb(answer))), answer)


@FEW
@given(known.PREFLIGHT_ANSWERS)
def test_a_preflight_answer_arrives_as_it_was_sent(answer: Any) -> None:
    assert same(wire.preflight_from_pb(over_the_wire(wire.preflight_to_pb(answer))), answer)


def test_the_sequence_number_travels() -> None:
    assert events.event_to_pb(ItemDone(0, 0, 0), 2**40).sequence == 2**40


def test_zero_and_absent_are_told_apart() -> None:
    done = ItemDone(0, 0, 0, total_logprob=0.0, mean_logprob=None, perplexity=None, is_greedy=False)
    assert events.event_from_pb(over_the_wire(events.event_to_pb(done, 0))) == done


def test_minus_infinity_crosses_the_wire() -> None:
    done = ItemDone(0, 0, 1, total_logprob=-math.inf, mean_logprob=-math.inf)
    assert events.event_from_pb(over_the_wire(events.event_to_pb(done, 0))) == done


def test_an_event_from_the_future_is_none() -> None:
    assert events.event_from_pb(pb.AnswerEvent.FromString(b"\x08\x01\xfa\x3e\x00")) is None


@pytest.mark.parametrize(("pieces", "offsets", "top_k"), [(True, False, 0), (False, True, 0), (False, False, 2)])
def test_the_header_lists_the_columns_that_come(pieces: bool, offsets: bool, top_k: int) -> None:
    header = AnswerHeader(fake_engine().card.provenance, (), 1, top_k, True, pieces, offsets)
    columns = set(events.event_to_pb(header, 0).header.columns)
    assert columns >= {pb.COLUMN_IDS, pb.COLUMN_LOGPROBS, pb.COLUMN_RANKS, pb.COLUMN_TIES}
    assert (pb.COLUMN_PIECES in columns, pb.COLUMN_CHAR_OFFSETS in columns, pb.COLUMN_TOP in columns) == (
        pieces, offsets, top_k > 0,
    )  # fmt: skip


def chunk(**fields: Any) -> pb.AnswerEvent:
    given_fields: dict[str, Any] = {"ids": [1, 2], "logprobs": [-1.0, -2.0], "ranks": [1, 2], "ties": [0, 0]} | fields
    return pb.AnswerEvent(tokens=pb.TokenChunk(**given_fields))


def test_a_chunk_of_equal_columns_is_taken() -> None:
    made = events.event_from_pb(chunk(top_ids=[1, 2, 3, 4], top_logprobs=[-1.0] * 4, pieces=[b"a", b"b"]))
    assert isinstance(made, TokenChunk)
    assert made.top_ids is not None
    assert made.top_ids.shape == (2, 2)


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": [-1.0]},
        {"ranks": []},
        {"ties": [0, 0, 0]},
        {"pieces": [b"a"]},
        {"char_starts": [0, 1]},
        {"char_starts": [0], "char_ends": [1]},
        {"char_ends": [0, 1]},
        {"top_ids": [1, 2, 3], "top_logprobs": [-1.0, -1.0, -1.0]},
        {"top_ids": [1, 2], "top_logprobs": [-1.0]},
        {"top_logprobs": [-1.0, -1.0]},
        {"ids": [], "logprobs": [], "ranks": [], "ties": [], "top_ids": [1], "top_logprobs": [-1.0]},
    ],
    ids=str,
)
def test_a_chunk_whose_columns_differ_in_length_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(Internal, match="another length"):
        events.event_from_pb(chunk(**fields))


@pytest.mark.parametrize("state", [0, 99])
def test_a_tail_without_a_known_state_is_refused(state: Any) -> None:
    result = pb.NextTokenDistResult(next=pb.NextTokens(tail=pb.Tail(state=state)))
    with pytest.raises(Internal) as caught:
        wire.next_token_from_pb(pb.NextTokenDistResponse(results=[result]))
    assert caught.value.reason is Reason.UNKNOWN_ENUM_VALUE


def test_pieces_that_are_half_a_character_cross_the_wire() -> None:
    tokens = Tokens(int_array([1]), (b"\xf0\x9f",), None, None)
    event = TokenChunk(0, 0, 0, tokens, np.array([-1.0]), int_array([1]), int_array([0]))
    made = events.event_from_pb(over_the_wire(events.event_to_pb(event, 0)))
    assert isinstance(made, TokenChunk)
    assert made.tokens.pieces == (b"\xf0\x9f",)
