"""The tape of a call: the very bytes, bounded, of one question."""

from __future__ import annotations

import pytest

from dualtrace.client import Client, Connection
from dualtrace.questions.answers import AnswerSummary, TokenChunk
from dualtrace.questions.asked import Input, TokenizeQuestion
from dualtrace.tape import Tape, split_responses, varint
from dualtrace.v1 import scoring_pb2 as pb
from tests.support.scorers import all_events, fake_scorer, only, rolling_ids, served


async def asked_with(tape: Tape, *counts: int) -> None:
    async with served(fake_scorer()) as (address, _), Client(Connection(address)) as client:
        for count in counts:
            await all_events(client.taped(tape), rolling_ids(count))


async def test_a_tape_holds_the_request_as_it_was_sent() -> None:
    tape = Tape()
    await asked_with(tape, 5)
    sent = pb.RollingLogprobRequest.FromString(tape.request)
    assert list(sent.inputs[0].ids.ids) == [0, 1, 2, 3, 4]


async def test_a_tape_holds_every_response_in_order() -> None:
    tape = Tape()
    await asked_with(tape, 500)
    events = [pb.RollingLogprobResponse.FromString(part).event for part in split_responses(tape.responses)]
    assert [event.sequence for event in events] == list(range(len(events)))
    assert events[-1].HasField("summary")


async def test_a_taped_client_gives_the_same_answer() -> None:
    async with served(fake_scorer()) as (address, _), Client(Connection(address)) as client:
        plain, taped = await all_events(client, rolling_ids(9)), await all_events(client.taped(Tape()), rolling_ids(9))
    values = [[chunk.logprobs.tolist() for chunk in only(events, TokenChunk)] for events in (plain, taped)]
    assert values[0] == values[1]


async def test_what_is_beyond_the_limit_is_cut_whole_and_marked() -> None:
    tape = Tape(limit_bytes=600)
    await asked_with(tape, 500)
    assert tape.responses_cut
    assert len(tape.responses) <= 600
    assert all(pb.RollingLogprobResponse.FromString(part) for part in split_responses(tape.responses))


async def test_a_request_beyond_the_limit_is_cut_and_marked() -> None:
    tape = Tape(limit_bytes=10)
    await asked_with(tape, 500)
    assert (tape.request, tape.request_cut) == (b"", True)


async def test_only_the_first_question_is_on_the_tape() -> None:
    tape = Tape()
    await asked_with(tape, 5, 7)
    assert len(pb.RollingLogprobRequest.FromString(tape.request).inputs[0].ids.ids) == 5
    events = [pb.RollingLogprobResponse.FromString(part).event for part in split_responses(tape.responses)]
    assert sum(event.HasField("summary") for event in events) == 1


async def test_the_look_up_of_ids_before_a_question_gives_way_to_the_question() -> None:
    tape = Tape()
    async with served(fake_scorer()) as (address, _), Client(Connection(address)) as client:
        await client.taped(tape).tokenize(TokenizeQuestion((Input(text="x"),)))
        await all_events(client.taped(tape), rolling_ids(6))
    assert len(pb.RollingLogprobRequest.FromString(tape.request).inputs[0].ids.ids) == 6


async def test_closing_a_taped_client_leaves_the_channel_open() -> None:
    async with served(fake_scorer()) as (address, _), Client(Connection(address)) as client:
        await client.taped(Tape()).close()
        assert only(await all_events(client, rolling_ids(4)), AnswerSummary)


@pytest.mark.parametrize(("value", "written"), [(0, "00"), (127, "7f"), (128, "8001"), (300, "ac02")])
def test_lengths_are_varints(value: int, written: str) -> None:
    assert varint(value).hex() == written
