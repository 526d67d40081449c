"""Jobs: long work that waits for a worker, tells how it goes, can be cancelled and outlives a restart.

A job that was not finished is run again from the start, under the same id. It knows the store and workers. It must not
know what work is or how it is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from prometheus_client import Gauge

from coordinator.settings import CoordinatorSettings
from coordinator.store import Store
from dualtrace.library import Job, JobEvent, JobState
from dualtrace.metrics import CoordinatorMetrics
from dualtrace.problems import DeadlineExceeded, Exhausted, FailedPrecondition, Internal, Problem, Reason, Unavailable

log = logging.getLogger(__name__)

CRASHES = 3
CRASH_UNIT = "crashes"
TICK_SECONDS = 0.5
LOOK_SECONDS = 5.0  # a watcher looks again after so long, even when nobody rang


@dataclass(frozen=True)
class JobResult:
    """What the work came to."""

    message: str
    run_id: str | None = None
    comparison_id: str | None = None
    problem: Problem | None = None  # it failed, whatever was kept
    is_kept: bool = False  # the job's end is kept already, in one transaction with what it made


Progress = Callable[[int, int, str], None]
"""Told done, total (0: unknown) and the unit."""

Perform = Callable[[str, str, Progress], Awaitable[JobResult]]
"""Does the work of the job of this id and this text. Cancelling it stops the work."""


@dataclass
class _Progress:
    done: int = 0
    total: int = 0
    unit: str = ""

    def take(self, done: int, total: int, unit: str) -> None:
        self.done, self.total, self.unit = done, total, unit


class Jobs:
    """`start`, then begin, watch and cancel; `close` leaves what runs to the next start."""

    def __init__(
        self, store: Store, perform: Perform, settings: CoordinatorSettings, metrics: CoordinatorMetrics
    ) -> None:
        self._store = store
        self._perform = perform
        self._settings = settings
        self._metrics = metrics
        self._line = _Line(settings.max_waiting_jobs, metrics.waiting_jobs)
        self._running: dict[str, asyncio.Task[None]] = {}
        self._cancelled: set[str] = set()  # by a caller; else it is the coordinator that stops
        self._bells: dict[str, set[asyncio.Event]] = {}
        self._workers: list[asyncio.Task[None]] = []
        self._asked: set[asyncio.Task[Job]] = set()  # starts and cancels that are on their way
        self._is_open = False

    async def start(self) -> None:
        for job in await self._store.unfinished_jobs():
            if await self._take_up(job):
                self._line.append(job.job_id)
        self._is_open = True
        self._workers = [asyncio.create_task(self._work()) for _ in range(self._settings.job_workers)]

    async def close(self) -> None:
        """What runs is stopped and will be run again by the next coordinator on this store."""
        self._is_open = False
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, *self._asked, return_exceptions=True)

    async def begin(self, request_id: str, work: str) -> Job:
        """The job of this request id. A repeated call returns the same job, also while no other could be started."""
        if not self._is_open:
            raise Unavailable(Reason.DRAINING, "the coordinator is stopping; start the job when it is back")
        return await self._carry_out(self._begin(request_id, work))

    async def cancel(self, job_id: str) -> Job:
        """The job as it stands afterwards. Harmless when it has ended."""
        return await self._carry_out(self._cancel(job_id))

    async def _carry_out(self, asked: Coroutine[Any, Any, Job]) -> Job:
        """To its end, also when the caller leaves: what is half done would be nobody's to finish."""
        task = asyncio.create_task(asked)
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)
        return await asyncio.shield(task)

    async def _begin(self, request_id: str, work: str) -> Job:
        if not self._line.reserve():
            known = await self._store.started_job(request_id, work)
            if known is None:
                message = f"{self._settings.max_waiting_jobs} jobs wait already; ask again with the same request_id"
                raise Exhausted(Reason.QUEUE_FULL, message, allowed=f"1-{self._settings.max_waiting_jobs}")
            return known
        try:
            job, is_new = await self._store.start_job(request_id, work)
            if is_new:
                self._line.append(job.job_id)
        finally:
            self._line.release()
        return job

    async def _cancel(self, job_id: str) -> Job:
        job = await self._store.job(job_id)
        self._line.leave(job_id)
        task = self._running.get(job_id)
        if task is not None:
            self._cancelled.add(job_id)
            task.cancel()
            await asyncio.wait({task})
            job = await self._store.job(job_id)
        if job.state.is_end:
            return job
        # It waited, or its task was stopped before its first step.
        await self._end(job_id, JobState.CANCELLED, JobResult("cancelled before it began"))
        return await self._store.job(job_id)

    async def watch(self, job_id: str, after_sequence: int, deadline: float) -> AsyncGenerator[JobEvent, None]:
        """Events after this number as they come, until the job's last. Leaving it cancels nothing."""
        bell = asyncio.Event()
        self._bells.setdefault(job_id, set()).add(bell)
        try:
            while True:
                bell.clear()
                job = await self._store.job(job_id)
                for event in await self._store.job_events(job_id, after_sequence):
                    after_sequence = event.sequence
                    yield event
                if after_sequence < job.last_sequence:
                    continue  # that was one page of them
                if job.state.is_end:
                    return
                await self._wait(bell, deadline, after_sequence)
        finally:
            self._bells[job_id].discard(bell)
            if not self._bells[job_id]:
                del self._bells[job_id]

    async def _wait(self, bell: asyncio.Event, deadline: float, after_sequence: int) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            message = f"the deadline passed while the job went on; watch again after sequence {after_sequence}"
            raise DeadlineExceeded(Reason.DEADLINE, message)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(left, LOOK_SECONDS)):
                await bell.wait()

    async def _take_up(self, job: Job) -> bool:
        """Whether a job that another process left is to run. One that ran when its coordinator died has crashed it."""
        if job.state is not JobState.RUNNING:
            return True
        crashes = 1 + await self._store.most_done(job.job_id, CRASH_UNIT)
        if crashes >= CRASHES:
            message = f"the coordinator died {crashes} times while this ran; it is not run again"
            problem = Internal(Reason.ENGINE_FAILED, f"{message}: ask a smaller question, or look into its log")
            await self._end(job.job_id, JobState.FAILED, JobResult(message, problem=problem))
            return False
        message = "the coordinator died while this ran; it is run again from the start"
        await self._add(job.job_id, JobState.WAITING, message, crashes, CRASHES, CRASH_UNIT)
        return True

    async def _work(self) -> None:
        while True:
            job_id = await self._line.first()
            task = self._running[job_id] = asyncio.create_task(self._run(job_id), name=job_id)
            task.add_done_callback(lambda _, job_id=job_id: self._forget(job_id))  # type: ignore[misc]
            self._metrics.running_jobs.inc()
            await asyncio.wait({task})

    def _forget(self, job_id: str) -> None:
        self._running.pop(job_id, None)
        self._cancelled.discard(job_id)
        self._metrics.running_jobs.dec()

    async def _run(self, job_id: str) -> None:
        """One job to its end. Whatever happens is told in an event; nothing leaves."""
        try:
            if (await self._store.job(job_id)).state.is_end:
                return  # cancelled while it waited
            await self._add(job_id, JobState.RUNNING, "started")
            result = await self._tell_while(job_id, await self._store.job_work(job_id))
            state = JobState.DONE if result.problem is None else JobState.FAILED
            await self._end(job_id, state, result)
        except asyncio.CancelledError:
            if job_id in self._cancelled:
                await self._end(job_id, JobState.CANCELLED, JobResult("cancelled"))
            else:
                await self._put_back(job_id)
        except Exception as error:  # noqa: BLE001 - the one place where a job's failure is told
            await self._end(job_id, JobState.FAILED, _failure(error))

    async def _tell_while(self, job_id: str, work: str) -> JobResult:
        progress, done = _Progress(), asyncio.Event()
        teller = asyncio.create_task(self._tell(job_id, progress, done))
        try:
            return await self._perform(job_id, work, progress.take)
        finally:
            done.set()
            await asyncio.wait({teller})  # so that its last event stands before the end

    async def _tell(self, job_id: str, progress: _Progress, done: asyncio.Event) -> None:
        """An event now and then, when something has moved."""
        told = 0
        while not done.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await done.wait()
            if progress.done != told and not done.is_set():
                told = progress.done
                message = f"{told} of {progress.total} {progress.unit}" if progress.total else f"{told} {progress.unit}"
                with contextlib.suppress(Problem):  # progress that cannot be kept is no reason to stop
                    await self._add(job_id, JobState.RUNNING, message, told, progress.total, progress.unit)

    async def _put_back(self, job_id: str) -> None:
        try:
            await self._add(job_id, JobState.WAITING, "the coordinator stopped; this is run again from the start")
        except FailedPrecondition:
            pass  # it has just ended
        except Problem as problem:
            log.warning("job %s could not be put back: %s", job_id, problem)

    async def _end(self, job_id: str, state: JobState, result: JobResult) -> None:
        try:
            if not result.is_kept:
                await self._store.add_job_event(
                    job_id, state, result.message, run_id=result.run_id, comparison_id=result.comparison_id,
                    problem=result.problem,
                )  # fmt: skip
            self._metrics.jobs.labels(state.value).inc()
        except FailedPrecondition:
            pass  # it had ended: whoever was first is right
        except Problem as problem:
            log.error("the end of job %s could not be kept (%s); the next start runs it again", job_id, problem)
        self._ring(job_id)

    async def _add(
        self, job_id: str, state: JobState, message: str, done: int = 0, total: int = 0, unit: str = ""
    ) -> None:
        await self._store.add_job_event(job_id, state, message, done, total, unit)
        self._ring(job_id)

    def _ring(self, job_id: str) -> None:
        for bell in self._bells.get(job_id, ()):
            bell.set()


class _Line:
    """The jobs that wait, first come first served. A place that is reserved is taken."""

    def __init__(self, places: int, gauge: Gauge) -> None:
        self._places = places
        self._gauge = gauge
        self._waiting: OrderedDict[str, None] = OrderedDict()
        self._reserved = 0
        self._arrived = asyncio.Event()

    def reserve(self) -> bool:
        """A place for a job that is being written down; False when all are taken. `release` it in any case."""
        if len(self._waiting) + self._reserved >= self._places:
            return False
        self._reserved += 1
        return True

    def release(self) -> None:
        self._reserved -= 1

    def append(self, job_id: str) -> None:
        self._waiting[job_id] = None
        self._arrived.set()
        self._gauge.set(len(self._waiting))

    def leave(self, job_id: str) -> None:
        """Harmless for one that does not stand in it."""
        self._waiting.pop(job_id, None)
        self._gauge.set(len(self._waiting))

    async def first(self) -> str:
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        job_id, _ = self._waiting.popitem(last=False)
        self._gauge.set(len(self._waiting))
        return job_id


def _failure(error: Exception) -> JobResult:
    if isinstance(error, Problem):
        return JobResult(f"failed: {error.detail.message}", problem=error)
    log.error("a job failed", exc_info=error)
    problem = Internal(Reason.BUG, f"the coordinator failed with {type(error).__name__}; its log has the details")
    return JobResult("failed", problem=problem)
