"""Batches for which an engine must compile stand aside: others pass, and a failure there ends their calls only."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable

import pytest

from dualtrace.calls import Ticket
from dualtrace.engine import Batch, Preparation, Reads
from dualtrace.fake import FakeEngine, FakeSpec
from dualtrace.metrics import Metrics
from dualtrace.preparing import warm_up
from dualtrace.problems import DeadlineExceeded, Exhausted, Problem, Reason, Unavailable
from dualtrace.rows import Row
from dualtrace.scheduler import Scheduler, SchedulerLimits
from tests.unit.test_scheduler import drain, row, until


class CompilingEngine(FakeEngine):
    """Needs a function for each length of a batch; each is made when the test lets it."""

    def __init__(self, spec: FakeSpec | None = None) -> None:
        super().__init__(spec or FakeSpec(share=0))
        self.made: set[int] = set()
        self.begun: list[int] = []
        self.may_compile = threading.Event()
        self.failure: Exception | None = None

    def list_missing(self, batch: Batch, reads: Reads) -> tuple[Preparation, ...]:
        lengths = dict.fromkeys(int(segment.ids.size) for segment in batch.segments)
        return tuple(self.preparation(length) for length in lengths if length not in self.made)

    def list_usual(self) -> tuple[Preparation, ...]:
        return tuple(self.preparation(length) for length in (8, 16))

    def preparation(self, length: int) -> Preparation:
        return Preparation(f"forward {length}", lambda: self.compile(length))

    def compile(self, length: int) -> None:
        self.begun.append(length)
        assert self.may_compile.wait(10), "a test forgot to let the engine compile"
        if self.failure is not None:
            raise self.failure
        self.made.add(length)


@pytest.fixture
async def compiling() -> AsyncIterator[tuple[CompilingEngine, Scheduler]]:
    engine = CompilingEngine()
    engine.made.add(10)
    scheduler = Scheduler(engine, SchedulerLimits(), Metrics())
    scheduler.start()
    yield engine, scheduler
    engine.may_compile.set()
    await asyncio.to_thread(scheduler.close)


async def answered_beside(engine: CompilingEngine, scheduler: Scheduler, unusual: Row) -> tuple[Ticket, int]:
    """The unusual call, still compiling, and what a usual one beside it was answered."""
    waiting = scheduler.submit([unusual])
    await until(lambda: engine.begun)
    return waiting, await drain(scheduler.submit([row(10)]))


async def test_a_usual_call_is_answered_while_another_ones_function_is_compiled(
    compiling: tuple[CompilingEngine, Scheduler],
) -> None:
    waiting, answered = await answered_beside(*compiling, row(30))
    assert (answered, waiting.is_done) == (10, False)


async def test_the_call_that_stood_aside_is_answered_when_its_function_is_there(
    compiling: tuple[CompilingEngine, Scheduler],
) -> None:
    engine, scheduler = compiling
    waiting, _answered = await answered_beside(engine, scheduler, row(30))
    engine.may_compile.set()
    assert await drain(waiting) == 30


async def test_what_was_compiled_once_is_not_waited_for_again(compiling: tuple[CompilingEngine, Scheduler]) -> None:
    engine, scheduler = compiling
    engine.may_compile.set()
    await drain(scheduler.submit([row(30)]))
    await drain(scheduler.submit([row(30, 1)]))
    assert engine.begun == [30]


async def test_a_deadline_is_kept_while_its_function_is_compiled(compiling: tuple[CompilingEngine, Scheduler]) -> None:
    _engine, scheduler = compiling
    late = scheduler.submit([row(30)], deadline=time.monotonic() + 0.05)
    with pytest.raises(DeadlineExceeded):
        await late.take(5)


async def test_a_compilation_that_fails_ends_its_call_and_no_other(
    compiling: tuple[CompilingEngine, Scheduler],
) -> None:
    engine, scheduler = compiling
    engine.failure = RuntimeError("the compiler broke")
    waiting, answered = await answered_beside(engine, scheduler, row(30))
    engine.may_compile.set()
    with pytest.raises(Problem, match="the compiler broke") as caught:
        await drain(waiting)
    assert (caught.value.reason, answered) == (Reason.ENGINE_FAILED, 10)


async def test_closing_fails_the_call_that_stands_aside(compiling: tuple[CompilingEngine, Scheduler]) -> None:
    engine, scheduler = compiling
    waiting, _answered = await answered_beside(engine, scheduler, row(30))
    closing = asyncio.create_task(asyncio.to_thread(scheduler.close))
    with pytest.raises(Unavailable):
        await waiting.take(5)
    engine.may_compile.set()
    await closing


async def test_a_small_batch_that_has_become_ready_passes_a_long_one() -> None:
    engine = CompilingEngine(FakeSpec(step=1, step_ms=2, share=0))
    engine.made.add(2000)
    engine.may_compile.set()
    scheduler = Scheduler(engine, SchedulerLimits(), Metrics())
    scheduler.start()
    try:
        long = scheduler.submit([row(2000)])
        await long.take(5)
        assert await drain(scheduler.submit([row(30)])) == 30
        assert not long.is_done
        long.cancel()
    finally:
        await asyncio.to_thread(scheduler.close)


# ---- who stands aside waits all the same


@pytest.fixture
async def crowded() -> AsyncIterator[tuple[CompilingEngine, Scheduler, Metrics]]:
    """Nothing is compiled yet, and only two calls may wait."""
    engine, metrics = CompilingEngine(), Metrics()
    scheduler = Scheduler(engine, SchedulerLimits(queue_calls=2), metrics)
    scheduler.start()
    yield engine, scheduler, metrics
    engine.may_compile.set()
    await asyncio.to_thread(scheduler.close)


async def stand_aside(
    engine: CompilingEngine, scheduler: Scheduler, count: int, deadline: float | None = None
) -> list[Ticket]:
    """So many calls, each in a batch of its own that is being compiled for, or waits for its turn to be."""
    tickets = []
    for seed in range(count):
        tickets.append(scheduler.submit([row(30 + seed)], deadline=deadline))
        await until(lambda: scheduler.waiting_rows == 0)
    await until(lambda: engine.begun)
    return tickets


def count_waiting(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("dualtrace_waiting_calls")


def count_dropped(metrics: Metrics, reason: str) -> float | None:
    return metrics.registry.get_sample_value("dualtrace_dropped_segments_total", {"reason": reason})


Crowded = tuple[CompilingEngine, Scheduler, Metrics]


async def test_calls_that_stand_aside_count_toward_the_limit_of_the_queue(crowded: Crowded) -> None:
    engine, scheduler, _ = crowded
    await stand_aside(engine, scheduler, 2)
    with pytest.raises(Exhausted, match="2 calls are waiting") as caught:
        scheduler.submit([row(10)])
    assert caught.value.reason is Reason.QUEUE_FULL


async def test_the_gauge_shows_calls_that_stand_aside(crowded: Crowded) -> None:
    engine, scheduler, metrics = crowded
    await stand_aside(engine, scheduler, 2)
    assert count_waiting(metrics) == 2


async def test_a_call_that_stands_aside_in_two_batches_counts_once(crowded: Crowded) -> None:
    engine, scheduler, metrics = crowded
    scheduler.submit([row(3000), row(3001)])  # more than one batch holds
    await until(lambda: len(engine.begun) == 2)
    assert count_waiting(metrics) == 1


async def test_a_call_that_was_answered_waits_no_more(crowded: Crowded) -> None:
    engine, scheduler, metrics = crowded
    (ticket,) = await stand_aside(engine, scheduler, 1)
    engine.may_compile.set()
    await drain(ticket)
    assert count_waiting(metrics) == 0


async def test_a_call_that_leaves_while_it_stands_aside_makes_room_at_once(crowded: Crowded) -> None:
    engine, scheduler, metrics = crowded
    first, _ = await stand_aside(engine, scheduler, 2)
    first.cancel()
    assert count_waiting(metrics) == 1
    scheduler.submit([row(10)])


async def test_a_call_whose_deadline_passes_while_it_stands_aside_makes_room(crowded: Crowded) -> None:
    engine, scheduler, metrics = crowded
    await stand_aside(engine, scheduler, 2, deadline=time.monotonic() + 0.2)
    await until(lambda: count_waiting(metrics) == 0)
    scheduler.submit([row(10)])


async def test_nothing_runs_for_calls_that_left_while_they_stood_aside(crowded: Crowded) -> None:
    engine, scheduler, metrics = crowded
    (ticket,) = await stand_aside(engine, scheduler, 1)
    ticket.cancel()
    engine.may_compile.set()
    await until(lambda: count_dropped(metrics, "cancelled") == 1)
    assert engine.computed_tokens == 0


async def test_nothing_more_is_compiled_for_calls_that_left(crowded: Crowded) -> None:
    engine, scheduler, metrics = crowded
    ticket = scheduler.submit([row(30), row(31), row(32)])
    await until(lambda: engine.begun)
    ticket.cancel()
    engine.may_compile.set()
    await until(lambda: count_dropped(metrics, "cancelled") == 3)
    assert len(engine.begun) == 1


def count_prepared(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("dualtrace_prepare_seconds_count")


async def test_every_compilation_is_counted_and_timed() -> None:
    engine, metrics = CompilingEngine(), Metrics()
    engine.may_compile.set()
    scheduler = Scheduler(engine, SchedulerLimits(), metrics)
    scheduler.start()
    try:
        await drain(scheduler.submit([row(30)]))
        await drain(scheduler.submit([row(40)]))
    finally:
        await asyncio.to_thread(scheduler.close)
    assert count_prepared(metrics) == 2


def warmed(engine: FakeEngine) -> tuple[list[str], float | None]:
    said: list[str] = []
    metrics = Metrics()
    tell: Callable[[str], None] = said.append
    warm_up(engine, metrics, tell)
    return said, count_prepared(metrics)


def test_warming_up_tells_how_far_it_is_and_how_long_it_took() -> None:
    engine = CompilingEngine()
    engine.may_compile.set()
    said, prepared = warmed(engine)
    assert said[:2] == ["warming up 1 of 2: forward 8", "warming up 2 of 2: forward 16"]
    assert said[2].startswith("warmed up in ")
    assert prepared == 2


def test_an_engine_that_compiles_nothing_needs_no_warming_up() -> None:
    assert warmed(FakeEngine(FakeSpec())) == ([], 0)
