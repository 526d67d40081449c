"""One question to several Scorers: every side ends for itself, and nothing is left running."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest

from dualtrace.card import Card
from dualtrace.fanout import Asked, SideEnded, SideEvent, fan_out
from dualtrace.problems import Cancelled, DeadlineExceeded, Internal, Reason, Unavailable
from dualtrace.questions.answers import AnswerEvent, AnswerSummary, ItemDone, TokenizeAnswer
from dualtrace.questions.asked import Question, TokenizeQuestion
from tests.support.scorers import fake_scorer, rolling_ids

Events = Callable[[], AsyncIterator[AnswerEvent]]
SUMMARY: Any = AnswerSummary.__new__(AnswerSummary)  # only its type is looked at
QUESTION = rolling_ids(4)


class Played:
    """A Scorer that plays what a test says."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self.left = False

    async def describe(self) -> Card:
        raise AssertionError

    async def close(self) -> None: ...

    async def ask(self, question: Question, *, deadline: float | None = None) -> AsyncIterator[AnswerEvent]:
        try:
            async for event in self._events():
                yield event
        finally:
            self.left = True


async def counting(count: int) -> AsyncIterator[AnswerEvent]:
    for item in range(count):
        yield ItemDone(item, 0, 0)
    yield SUMMARY


async def stalling() -> AsyncIterator[AnswerEvent]:
    yield ItemDone(0, 0, 0)
    await asyncio.sleep(3600)


def raising(error: BaseException) -> Events:
    async def events() -> AsyncIterator[AnswerEvent]:
        for event in [ItemDone(0, 0, 0)]:
            yield event
        raise error

    return events


def asked(events: Events, deadline: float | None = None, name: str = "") -> Asked:
    return Asked(Played(events), QUESTION, deadline, name)


async def ends(*sides: Asked) -> dict[int, SideEnded]:
    return {told.index: told async for told in fan_out(sides) if isinstance(told, SideEnded)}


def others() -> set[Any]:
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}


async def test_every_event_of_every_side_arrives_in_its_order() -> None:
    told = [one async for one in fan_out([asked(lambda: counting(200)), asked(lambda: counting(300))])]
    items = [
        [one.event.item for one in told if isinstance(one, SideEvent) and one.index == index
         and isinstance(one.event, ItemDone)]
        for index in (0, 1)
    ]  # fmt: skip
    assert items == [list(range(200)), list(range(300))]


async def test_a_side_that_fails_leaves_the_other_its_whole_answer() -> None:
    found = await ends(asked(raising(Unavailable(Reason.UNREACHABLE, "gone"))), asked(lambda: counting(50)))
    assert isinstance(found[0].problem, Unavailable)
    assert found[1].problem is None


async def test_a_side_that_ignores_its_deadline_is_left_and_named() -> None:
    begun = time.monotonic()
    found = await ends(asked(stalling, begun + 0.1, "left"), asked(lambda: counting(1)))
    assert isinstance(found[0].problem, DeadlineExceeded)
    assert "left" in found[0].problem.detail.message
    assert found[1].problem is None
    assert time.monotonic() - begun < 2


async def test_a_scorers_own_deadline_problem_gets_the_sides_name() -> None:
    late = raising(DeadlineExceeded(Reason.DEADLINE, "the deadline passed"))
    assert str((await ends(asked(late, name="right")))[0].problem).startswith("DEADLINE: right: the deadline")


async def test_a_bug_of_a_side_becomes_internal_for_that_side() -> None:
    found = await ends(asked(raising(KeyError("x"))), asked(lambda: counting(1)))
    assert isinstance(found[0].problem, Internal)
    assert found[0].problem.reason is Reason.BUG
    assert found[1].problem is None


async def test_what_a_bug_said_is_told_to_the_log_and_to_no_caller(caplog: pytest.LogCaptureFixture) -> None:
    found = await ends(asked(raising(KeyError("hush"))))
    assert "KeyError" in str(found[0].problem)
    assert "hush" not in str(found[0].problem)
    assert "hush" in caplog.text


async def test_a_timeout_of_the_sides_own_is_no_deadline() -> None:
    assert isinstance((await ends(asked(raising(TimeoutError()))))[0].problem, Internal)


async def test_a_scorer_that_cancels_itself_is_an_ended_side() -> None:
    found = await ends(asked(raising(asyncio.CancelledError())), asked(lambda: counting(1)))
    assert isinstance(found[0].problem, Cancelled)
    assert found[1].problem is None


@pytest.mark.parametrize("question", [QUESTION, TokenizeQuestion(())])
async def test_an_answer_that_stops_half_way_is_incomplete(question: Question) -> None:
    async def half() -> AsyncIterator[AnswerEvent]:
        for event in [ItemDone(0, 0, 0)] if question is QUESTION else []:
            yield event

    found = await ends(Asked(Played(half), question))
    assert found[0].problem is not None
    assert found[0].problem.reason is Reason.INCOMPLETE_STREAM


async def test_a_unary_answer_is_complete_with_its_one_event() -> None:
    async def whole() -> AsyncIterator[AnswerEvent]:
        yield TokenizeAnswer(())

    assert (await ends(Asked(Played(whole), TokenizeQuestion(()))))[0].problem is None


async def test_a_slow_reader_holds_each_side_back_at_its_buffer() -> None:
    made = [0, 0]

    def producing(index: int) -> Events:
        async def produce() -> AsyncIterator[AnswerEvent]:
            for _ in range(100):
                made[index] += 1
                yield ItemDone(0, 0, 0)
            yield SUMMARY

        return produce

    async with aclosing(fan_out([asked(producing(0)), asked(producing(1))], buffer_events=8)) as told:
        await anext(told)
        await asyncio.sleep(0.05)
        assert max(made) <= 8 + 2  # in the buffer, one in the reader's hand, one in the side's


async def test_a_fast_side_takes_no_room_from_a_slow_one() -> None:
    async def slow() -> AsyncIterator[AnswerEvent]:
        await asyncio.sleep(0.02)
        yield ItemDone(7, 0, 0)
        yield SUMMARY

    seen = []
    async with aclosing(fan_out([asked(lambda: counting(1000)), asked(slow)], buffer_events=4)) as told:
        async for one in told:
            seen.append(one.index)
            await asyncio.sleep(0.001)
            if one.index == 1:
                break
    assert len(seen) < 200  # it did not have to wait for the fast side's end


async def test_leaving_the_iterator_leaves_every_side_and_no_task() -> None:
    sides = [asked(stalling), asked(stalling)]
    before = others()
    async with aclosing(fan_out(sides)) as told:
        await anext(told)
        await anext(told)
    assert all(side.scorer.left for side in sides if isinstance(side.scorer, Played))
    assert others() == before


async def test_a_cancelled_reader_leaves_every_side_and_no_task() -> None:
    sides = [asked(stalling), asked(lambda: counting(3))]
    before = others()
    reader = asyncio.create_task(ends(*sides))
    await asyncio.sleep(0.02)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert all(side.scorer.left for side in sides if isinstance(side.scorer, Played))
    assert others() == before


async def test_leaving_reaches_the_engines_queue() -> None:
    scorer = fake_scorer(step=8, step_ms=20.0)
    try:
        async with aclosing(fan_out([Asked(scorer, rolling_ids(4000)), Asked(scorer, rolling_ids(4000))])) as told:
            await anext(told)
        assert scorer.scheduler.waiting_rows == 0
    finally:
        await scorer.close()


async def test_the_time_that_the_reader_took_is_not_the_sides() -> None:
    seconds = 0.0
    async with aclosing(fan_out([asked(lambda: counting(20))], buffer_events=1)) as told:
        async for one in told:
            await asyncio.sleep(0.01)
            if isinstance(one, SideEnded):
                seconds = one.seconds
    assert seconds < 0.1


async def last_of(side: Asked, reader_seconds: float) -> SideEnded:
    """How a side ends whose reader stops for so long after the second word."""
    heard = 0
    async with aclosing(fan_out([side], buffer_events=4)) as told:
        async for one in told:
            heard += 1
            if heard == 2:
                await asyncio.sleep(reader_seconds)
            if isinstance(one, SideEnded):
                return one
    raise AssertionError


async def test_a_slow_reader_costs_a_side_no_time() -> None:
    end = await last_of(asked(lambda: counting(40), time.monotonic() + 0.1, "left"), 0.6)
    assert end.problem is None


async def test_a_deadline_that_passed_while_the_reader_was_away_says_so() -> None:
    async def keeping() -> AsyncIterator[AnswerEvent]:
        begun = time.monotonic()
        for item in range(40):
            if time.monotonic() - begun > 0.1:
                raise DeadlineExceeded(Reason.DEADLINE, "the deadline passed")
            yield ItemDone(item, 0, 0)

    end = await last_of(asked(keeping, time.monotonic() + 0.1, "left"), 0.6)
    assert "waited to be read" in str(end.problem)


async def test_a_deadline_that_would_have_passed_for_any_reader_is_the_sides() -> None:
    late = raising(DeadlineExceeded(Reason.DEADLINE, "the deadline passed"))
    found = await ends(asked(late, time.monotonic(), "left"))
    assert "waited" not in str(found[0].problem)


class Lingering(Played):
    """Does not end what it does about the end of its call."""

    async def ask(self, question: Question, *, deadline: float | None = None) -> AsyncIterator[AnswerEvent]:
        try:
            for item in range(9):
                yield ItemDone(item, 0, 0)
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(3600)


def lingering(deadline: float | None = None) -> Asked:
    return Asked(Lingering(stalling), QUESTION, deadline, "left")


async def test_a_side_that_does_not_end_its_call_is_left_to_itself() -> None:
    begun = time.monotonic()
    found = await ends(lingering(begun + 0.1))
    assert isinstance(found[0].problem, DeadlineExceeded)
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize("buffer_events", [1, 64], ids=["while it waits for room", "while it is asked"])
async def test_leaving_waits_no_longer_than_the_grace_for_a_call_to_end(buffer_events: int) -> None:
    begun = time.monotonic()
    async with aclosing(fan_out([lingering()], buffer_events=buffer_events)) as told:
        await anext(told)
        await asyncio.sleep(0.02)
    assert time.monotonic() - begun < 2
