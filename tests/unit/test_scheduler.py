"""The queue and the engine thread: what runs first, what is dropped, and what one failure may take with it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest

from dualtrace.calls import Ticket
from dualtrace.engine import Batch, Live, Read, Reads, Shape, Step
from dualtrace.fake import FakeEngine, FakeSpec
from dualtrace.metrics import Metrics
from dualtrace.model_card import ModelCard
from dualtrace.problems import Cancelled, DeadlineExceeded, Exhausted, Problem, Reason, Unavailable
from dualtrace.rows import Row, plain_row
from dualtrace.scheduler import Scheduler, SchedulerLimits


class GatedEngine:
    """A fake engine whose every step waits for a permit, so that tests decide what runs when."""

    def __init__(self, spec: FakeSpec) -> None:
        self.inner = FakeEngine(spec)
        self.permits = threading.Semaphore(0)
        self.log: list[tuple[int, ...]] = []  # lengths of the segments of each batch, as they start

    @property
    def card(self) -> ModelCard:
        return self.inner.card

    def prepare(self, shape: Shape) -> None: ...

    def close(self) -> None: ...

    def forward(self, batch: Batch, reads: Reads, live: Live) -> Iterator[Step]:
        self.log.append(tuple(int(segment.ids.size) for segment in batch.segments))
        steps = self.inner.forward(batch, reads, live)
        while True:
            assert self.permits.acquire(timeout=10), "a test forgot to let the engine step"
            step = next(steps, None)
            if step is None:
                return
            yield step

    def let(self, steps: int) -> None:
        self.permits.release(steps)


def row(length: int, seed: int = 0) -> Row:
    ids = np.random.default_rng(seed + 1000 * length).integers(0, 200, length).astype(np.int32)
    rows = np.arange(length, dtype=np.int32)
    return plain_row(ids, Read(rows, targets=ids))


async def drain(ticket: Ticket) -> int:
    """Wait for everything; how many token rows were read."""
    count = 0
    while not ticket.is_done:
        for delivery in await ticket.take(10):
            if delivery.problem is not None:
                raise delivery.problem
            assert delivery.readout is not None
            count += int(delivery.readout.rows.size)
    return count


@pytest.fixture
async def gated() -> AsyncIterator[tuple[GatedEngine, Scheduler]]:
    engine = GatedEngine(FakeSpec(step=100, share=0))
    scheduler = Scheduler(engine, SchedulerLimits(batch_tokens=1000, pass_tokens=50, queue_calls=8), Metrics())
    scheduler.start()
    yield engine, scheduler
    engine.let(10_000)
    await asyncio.to_thread(scheduler.close)


async def until(condition: object, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it never came about"
        await asyncio.sleep(0.002)


async def test_a_small_call_that_arrives_later_is_answered_before_a_long_one_ends(
    gated: tuple[GatedEngine, Scheduler],
) -> None:
    engine, scheduler = gated
    long = scheduler.submit([row(1000)])
    engine.let(2)
    first = await long.take(5)
    small = scheduler.submit([row(10)])
    engine.let(3)  # the long one's next step, then the small batch
    assert await drain(small) == 10
    assert not long.is_done
    engine.let(20)
    read = sum(int(d.readout.rows.size) for d in first if d.readout) + await drain(long)
    assert read == 1000


async def test_a_long_call_makes_progress_between_small_ones(gated: tuple[GatedEngine, Scheduler]) -> None:
    engine, scheduler = gated
    long = scheduler.submit([row(400)])
    engine.let(1)
    await long.take(5)
    smalls = []
    for seed in range(4):
        smalls.append(scheduler.submit([row(10, seed)]))
        engine.let(3)
        await drain(smalls[-1])
    engine.let(10)
    await drain(long)
    # Four long steps were needed; with a small batch after each, none of the two starved.
    assert long.is_done


async def test_a_cancelled_call_leaves_no_work_in_the_queue(gated: tuple[GatedEngine, Scheduler]) -> None:
    engine, scheduler = gated
    running = scheduler.submit([row(300)])
    await until(lambda: engine.log)
    waiting = scheduler.submit([row(200), row(200)])
    assert scheduler.waiting_rows == 2
    waiting.cancel()
    assert scheduler.waiting_rows == 0
    engine.let(10)
    assert await drain(running) == 300
    assert engine.inner.computed_tokens == 300
    with pytest.raises(Cancelled):
        await waiting.take(1)


async def test_a_call_cancelled_in_mid_forward_stops_at_the_next_step(gated: tuple[GatedEngine, Scheduler]) -> None:
    engine, scheduler = gated
    ticket = scheduler.submit([row(1000)])
    engine.let(1)
    await ticket.take(5)
    ticket.cancel()
    engine.let(50)
    after = scheduler.submit([row(10)])
    assert await drain(after) == 10
    assert engine.inner.computed_tokens <= 100 + 100 + 10  # at most the step that was under way


async def test_work_left_in_mid_forward_is_counted_as_dropped() -> None:
    engine, metrics = GatedEngine(FakeSpec(step=100, share=0)), Metrics()
    scheduler = Scheduler(engine, SchedulerLimits(batch_tokens=1000, pass_tokens=50, queue_calls=8), metrics)
    scheduler.start()
    try:
        ticket = scheduler.submit([row(1000)])
        engine.let(1)
        await ticket.take(5)
        ticket.cancel()
        engine.let(10_000)
        await drain(scheduler.submit([row(10)]))
    finally:
        await asyncio.to_thread(scheduler.close)
    dropped = metrics.registry.get_sample_value("dualtrace_dropped_segments_total", {"reason": "cancelled"})
    assert dropped == 1


async def test_an_expired_call_is_dropped_before_it_runs(gated: tuple[GatedEngine, Scheduler]) -> None:
    engine, scheduler = gated
    running = scheduler.submit([row(100)])
    await until(lambda: engine.log)
    late = scheduler.submit([row(700)], deadline=time.monotonic() + 0.02)
    with pytest.raises(DeadlineExceeded) as caught:
        await late.take(5)
    assert caught.value.reason == Reason.DEADLINE
    engine.let(10)
    await drain(running)
    await until(lambda: scheduler.waiting_rows == 0)
    assert (700,) not in engine.log


async def test_a_deadline_is_kept_even_while_the_engine_is_stuck_in_a_step(
    gated: tuple[GatedEngine, Scheduler],
) -> None:
    _engine, scheduler = gated  # no permit is given: the step hangs
    begun = time.monotonic()
    ticket = scheduler.submit([row(100)], deadline=begun + 0.05)
    with pytest.raises(DeadlineExceeded):
        await ticket.take()
    assert time.monotonic() - begun < 2.0


async def test_one_call_more_than_the_queue_holds_is_refused(gated: tuple[GatedEngine, Scheduler]) -> None:
    engine, scheduler = gated
    scheduler.submit([row(900)])
    await until(lambda: engine.log)
    for seed in range(8):
        scheduler.submit([row(900, seed)])
    with pytest.raises(Exhausted, match="8 calls are waiting") as caught:
        scheduler.submit([row(10)])
    assert caught.value.reason == Reason.QUEUE_FULL


async def test_rows_of_many_calls_share_one_batch_up_to_the_budget(gated: tuple[GatedEngine, Scheduler]) -> None:
    engine, scheduler = gated
    tickets = [scheduler.submit([row(900)])]
    await until(lambda: engine.log)
    tickets += [scheduler.submit([row(300, seed)]) for seed in range(4)]
    engine.let(100)
    for ticket in tickets:
        await drain(ticket)
    assert engine.log == [(900,), (300, 300, 300), (300,)]


async def test_small_calls_cannot_hold_back_a_big_one_for_ever() -> None:
    engine = FakeEngine(FakeSpec(step=1000, share=0, step_ms=1))
    scheduler = Scheduler(engine, SchedulerLimits(batch_tokens=60, pass_tokens=50), Metrics())
    scheduler.start()
    try:
        big = scheduler.submit([row(400)])
        finished = asyncio.Event()

        async def flood() -> None:
            while not finished.is_set():
                await drain(scheduler.submit([row(50)]))

        floods = [asyncio.create_task(flood()) for _ in range(3)]
        async with asyncio.timeout(10):
            assert await drain(big) == 400
        finished.set()
        await asyncio.gather(*floods)
    finally:
        await asyncio.to_thread(scheduler.close)


async def test_a_row_that_breaks_the_engine_does_not_take_its_neighbours() -> None:
    engine = FakeEngine(FakeSpec(oom_tokens=500, share=0))
    gate = GatedEngine(FakeSpec())
    gate.inner = engine
    scheduler = Scheduler(gate, SchedulerLimits(batch_tokens=2000), Metrics())
    scheduler.start()
    try:
        blocker = scheduler.submit([row(400, 7)])
        await until(lambda: gate.log)
        bad = scheduler.submit([row(600)])
        good = scheduler.submit([row(30)])
        gate.let(100)
        await drain(blocker)
        assert await drain(good) == 30
        with pytest.raises(Exhausted) as caught:
            await drain(bad)
        assert caught.value.reason == Reason.OUT_OF_MEMORY
        assert await drain(scheduler.submit([row(20)])) == 20  # the thread lives
    finally:
        gate.let(1000)
        await asyncio.to_thread(scheduler.close)


async def test_an_engine_that_raises_gives_a_problem_and_goes_on() -> None:
    scheduler = Scheduler(FakeEngine(FakeSpec(fail_at=5)), SchedulerLimits(), Metrics())
    scheduler.start()
    try:
        with pytest.raises(Problem) as caught:
            await drain(scheduler.submit([row(10)]))
        assert caught.value.reason == Reason.ENGINE_FAILED
        assert await drain(scheduler.submit([row(4)])) == 4
    finally:
        await asyncio.to_thread(scheduler.close)


async def test_an_engine_that_skips_rows_is_found_out() -> None:
    class Forgetful(FakeEngine):
        def forward(self, batch: Batch, reads: Reads, live: Live) -> Iterator[Step]:
            steps = list(super().forward(batch, reads, live))
            yield from steps[:-1]

    scheduler = Scheduler(Forgetful(FakeSpec(step=10)), SchedulerLimits(), Metrics())
    scheduler.start()
    try:
        with pytest.raises(Problem, match="without reading all rows"):
            await drain(scheduler.submit([row(30)]))
    finally:
        await asyncio.to_thread(scheduler.close)


async def test_a_reader_that_never_reads_is_ended_and_the_engine_goes_on() -> None:
    scheduler = Scheduler(FakeEngine(FakeSpec(step=10)), SchedulerLimits(buffer_bytes=2000), Metrics())
    scheduler.start()
    try:
        lazy = scheduler.submit([row(5000)])
        await until(lambda: lazy.stats.failure is not None)
        with pytest.raises(Exhausted) as caught:
            await lazy.take(1)
        assert caught.value.reason == Reason.SLOW_READER
        assert await drain(scheduler.submit([row(20)])) == 20
    finally:
        await asyncio.to_thread(scheduler.close)


async def test_closing_fails_what_waits_and_refuses_what_comes(gated: tuple[GatedEngine, Scheduler]) -> None:
    engine, scheduler = gated
    running = scheduler.submit([row(900)])
    await until(lambda: engine.log)
    waiting = scheduler.submit([row(900, 1)])
    closing = asyncio.create_task(asyncio.to_thread(scheduler.close))
    with pytest.raises(Unavailable):
        await waiting.take(5)
    engine.let(100)
    await closing
    with pytest.raises(Unavailable) as caught:
        scheduler.submit([row(1)])
    assert caught.value.reason == Reason.DRAINING
    running.cancel()


async def test_shared_prefixes_are_computed_once_and_charged_once() -> None:
    engine = FakeEngine(FakeSpec())
    scheduler = Scheduler(engine, SchedulerLimits(), Metrics())
    prompt = row(256).ids
    rows = []
    for index in range(32):
        tail = row(16, index).ids
        ids = np.concatenate([prompt, tail])
        rows.append(plain_row(ids, Read(np.arange(255, 272, dtype=np.int32), targets=ids[-17:])))
    ticket = scheduler.submit(rows)
    scheduler.start()
    try:
        assert await drain(ticket) == 32 * 17
        assert ticket.stats.computed_tokens == engine.computed_tokens == 256 + 32 * 16
        assert ticket.stats.shared_tokens == 31 * 256
    finally:
        await asyncio.to_thread(scheduler.close)


async def test_deterministic_calls_never_share_a_batch_with_others(gated: tuple[GatedEngine, Scheduler]) -> None:
    engine, scheduler = gated
    first = scheduler.submit([row(900)])
    await until(lambda: engine.log)
    plain = scheduler.submit([row(100)])
    fixed = scheduler.submit([row(110)], deterministic=True)
    engine.let(100)
    for ticket in (first, plain, fixed):
        await drain(ticket)
    assert (100,) in engine.log
    assert (110,) in engine.log
