"""Jobs: started once, watched from anywhere, cancelled down to the engine, taken up after a restart."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coordinator.jobs import CRASH_UNIT, CRASHES, JobResult, Jobs, Progress
from coordinator.operations import Caller, CaseRun
from coordinator.settings import CoordinatorSettings
from coordinator.store import Store
from coordinator.store import jobs as rows_of_jobs
from coordinator.work import read_work, work_to_text
from dualtrace.compare.report import Verdict
from dualtrace.library import Case, ComparePlan, Job, JobState, RunPlan, SideSpec
from dualtrace.masks.spec import Causal, MaskSpec
from dualtrace.metrics import CoordinatorMetrics
from dualtrace.problems import AlreadyExists, DeadlineExceeded, Exhausted, InvalidArgument, NotFound, Problem, Reason
from dualtrace.questions.asked import Variant
from tests.support.desk import ANYONE, Desk, desk_of, fake_side, open_desk, plan, rolling, twins, wait_until
from tests.support.scorers import served


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with desk_of(tmp_path, twins()) as opened:
        yield opened


class Work:
    """Work that a test steers: it waits for `go`, then ends as told."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.begun: list[str] = []
        self.stopped = 0
        self.error: Exception | None = None

    async def __call__(self, _job_id: str, text: str, progress: Progress) -> JobResult:
        self.begun.append(text)
        progress(len(self.begun), 0, "calls")
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.stopped += 1
            raise
        if self.error is not None:
            raise self.error
        return JobResult("done")


@contextlib.asynccontextmanager
async def jobs_on(store: Store, work: Work, **settings: int) -> AsyncIterator[Jobs]:
    jobs = Jobs(store, work, CoordinatorSettings(**settings), CoordinatorMetrics())  # type: ignore[arg-type]
    await jobs.start()
    try:
        yield jobs
    finally:
        await jobs.close()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await Store.open(tmp_path)
    yield opened
    await opened.close()


async def states(store: Store, job_id: str) -> list[JobState]:
    return [event.job.state for event in await store.job_events(job_id, 0)]


async def wait_for(store: Store, job_id: str, state: JobState) -> None:
    end = time.monotonic() + 5
    while (await store.job(job_id)).state is not state:
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


# Start


async def test_a_job_yields_a_comparison(desk: Desk) -> None:
    job = await desk.operations.start_job(ANYONE, "first", plan())
    events = await desk.finish(job)
    last = events[-1].job
    assert (last.state, events[-1].message) == (JobState.DONE, "verdict PASS")
    assert last.comparison_id is not None
    assert (await desk.store.get_comparison(last.comparison_id)).report.verdict is Verdict.PASS


async def test_the_same_request_is_the_same_job(desk: Desk) -> None:
    first = await desk.operations.start_job(ANYONE, "first", plan())
    await desk.finish(first)
    again = await desk.operations.start_job(ANYONE, "first", plan())
    assert again.job_id == first.job_id
    assert len((await desk.operations.list_comparisons(ANYONE)).entries) == 1


async def test_the_same_request_id_with_other_work_is_refused(desk: Desk) -> None:
    await desk.operations.start_job(ANYONE, "first", plan())
    with pytest.raises(AlreadyExists):
        await desk.operations.start_job(ANYONE, "first", plan(question=rolling(200)))


async def test_a_job_of_an_unknown_backend_is_refused_at_once(desk: Desk) -> None:
    with pytest.raises(NotFound):
        await desk.operations.start_job(ANYONE, "first", plan(right="backend:tpu"))


async def test_a_job_of_an_unknown_case_is_refused_at_once(desk: Desk) -> None:
    with pytest.raises(NotFound):
        await desk.operations.start_job(ANYONE, "first", CaseRun("smoke"))


async def test_a_job_that_keeps_nothing_is_refused(desk: Desk) -> None:
    with pytest.raises(InvalidArgument):
        await desk.operations.start_job(ANYONE, "first", plan(store=False))


async def test_a_case_is_run_as_a_job_and_its_comparison_names_it(desk: Desk) -> None:
    case = Case("smoke", rolling(), SideSpec("backend:torch"), SideSpec("backend:jax"))
    await desk.operations.create_case(ANYONE, case)
    await desk.finish(await desk.operations.start_job(ANYONE, "first", CaseRun("smoke")))
    page = await desk.operations.list_comparisons(ANYONE, case="smoke")
    assert [entry.verdict for entry in page.entries] == [Verdict.PASS]


async def test_a_side_that_fails_is_a_verdict_and_no_failed_job(tmp_path: Path) -> None:
    async with desk_of(tmp_path, {"torch": fake_side()}, absent=("jax",)) as desk:
        events = await desk.finish(await desk.operations.start_job(ANYONE, "first", plan()))
    assert (events[-1].job.state, events[-1].message) == (JobState.DONE, "verdict ERROR")


async def test_one_waiting_job_too_many_is_refused(store: Store) -> None:
    async with jobs_on(store, Work(), job_workers=1, max_waiting_jobs=1) as jobs:
        first = await jobs.begin("1", "one")
        await wait_for(store, first.job_id, JobState.RUNNING)
        await jobs.begin("2", "two")
        with pytest.raises(Exhausted) as caught:
            await jobs.begin("3", "three")
    assert caught.value.reason is Reason.QUEUE_FULL


async def test_no_more_jobs_run_at_a_time_than_there_are_workers(store: Store) -> None:
    work = Work()
    async with jobs_on(store, work, job_workers=2) as jobs:
        for number in range(4):
            await jobs.begin(str(number), "work")
        await asyncio.sleep(0.2)
        assert len(work.begun) == 2


async def test_a_start_whose_caller_leaves_is_run_all_the_same(store: Store) -> None:
    work = Work()
    work.go.set()
    async with jobs_on(store, work) as jobs:
        starting = asyncio.create_task(jobs.begin("1", "work"))
        while not store._database._pending:  # noqa: ASYNC110 - until its row is being written, not a moment later
            await asyncio.sleep(0)
        starting.cancel()
        await asyncio.wait({starting})
        again = await jobs.begin("1", "work")
        await wait_for(store, again.job_id, JobState.DONE)


async def test_starts_at_once_take_no_more_places_than_there_are(store: Store) -> None:
    async with jobs_on(store, Work(), job_workers=1, max_waiting_jobs=2) as jobs:
        first = await jobs.begin("1", "one")
        await wait_for(store, first.job_id, JobState.RUNNING)
        begun = await asyncio.gather(*(jobs.begin(f"r{i}", "more") for i in range(5)), return_exceptions=True)
    assert sum(not isinstance(one, Exhausted) for one in begun) == 2


async def test_a_repeated_start_needs_no_place(store: Store) -> None:
    async with jobs_on(store, Work(), job_workers=1, max_waiting_jobs=1) as jobs:
        first = await jobs.begin("1", "one")
        await wait_for(store, first.job_id, JobState.RUNNING)
        second = await jobs.begin("2", "two")
        assert (await jobs.begin("2", "two")).job_id == second.job_id


async def test_a_cancelled_job_gives_its_place_up(store: Store) -> None:
    async with jobs_on(store, Work(), job_workers=1, max_waiting_jobs=1) as jobs:
        first = await jobs.begin("1", "one")
        await wait_for(store, first.job_id, JobState.RUNNING)
        await jobs.cancel((await jobs.begin("2", "two")).job_id)
        third = await jobs.begin("3", "three")
    assert third.state is JobState.WAITING


async def test_jobs_that_are_taken_up_are_counted_as_waiting(store: Store) -> None:
    for number in range(3):
        await store.start_job(str(number), "work")
    async with jobs_on(store, Work(), job_workers=1) as jobs:
        assert jobs._metrics.registry.get_sample_value("dualtrace_waiting_jobs") == 3


# Watch


async def test_a_job_is_watched_from_a_sequence_number(desk: Desk) -> None:
    job = await desk.operations.start_job(ANYONE, "first", plan())
    all_events = await desk.finish(job)
    later = [event async for event in desk.operations.watch_job(ANYONE, job.job_id, 1)]
    assert [event.sequence for event in all_events] == list(range(1, len(all_events) + 1))
    assert later == all_events[1:]


async def test_progress_is_told_while_a_job_runs(store: Store) -> None:
    work = Work()
    async with jobs_on(store, work) as jobs:
        job = await jobs.begin("1", "work")
        async for event in jobs.watch(job.job_id, 0, time.monotonic() + 5):
            if event.unit == "calls":
                work.go.set()
            last = event
    assert last.job.state is JobState.DONE
    assert (await store.job_events(job.job_id, 0))[1].done == 1


async def test_a_watch_ends_at_its_deadline_and_says_where_to_go_on(store: Store) -> None:
    async with jobs_on(store, Work()) as jobs:
        job = await jobs.begin("1", "work")
        with pytest.raises(DeadlineExceeded, match="sequence"):
            async for _ in jobs.watch(job.job_id, 0, time.monotonic() + 0.2):
                pass


async def test_a_job_of_many_events_is_watched_page_by_page(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_of_jobs, "EVENT_PAGE", 2)
    job, _ = await store.start_job("1", "work")
    for state in [JobState.RUNNING] * 6 + [JobState.DONE]:
        await store.add_job_event(job.job_id, state)
    jobs = Jobs(store, Work(), CoordinatorSettings(), CoordinatorMetrics())
    told = [event.sequence async for event in jobs.watch(job.job_id, 0, time.monotonic() + 1)]
    assert told == [1, 2, 3, 4, 5, 6, 7]


async def test_leaving_a_watch_cancels_nothing(store: Store) -> None:
    work = Work()
    async with jobs_on(store, work) as jobs:
        job = await jobs.begin("1", "work")
        watch = jobs.watch(job.job_id, 0, time.monotonic() + 5)
        await anext(watch)
        await watch.aclose()
        work.go.set()
        await wait_for(store, job.job_id, JobState.DONE)


async def test_an_unknown_job_is_not_found(desk: Desk) -> None:
    with pytest.raises(NotFound):
        await desk.operations.get_job(ANYONE, "job-00000000000000000000000000")
    with pytest.raises(NotFound):
        await desk.operations.cancel_job(ANYONE, "job-00000000000000000000000000")
    with pytest.raises(NotFound):
        [event async for event in desk.operations.watch_job(ANYONE, "job-00000000000000000000000000")]


# Cancel


async def test_cancelling_a_job_reaches_the_engine(tmp_path: Path) -> None:
    slow = {"torch": fake_side(step=32, step_ms=30), "jax": fake_side(step=32, step_ms=30)}
    async with desk_of(tmp_path, slow) as desk:
        job = await desk.operations.start_job(ANYONE, "first", plan(question=rolling(4000)))
        await wait_until(lambda: slow["torch"]._engine.steps > 5)  # type: ignore[attr-defined]
        cancelled = await desk.operations.cancel_job(ANYONE, job.job_id)
        await asyncio.sleep(0.2)
        steps = slow["torch"]._engine.steps  # type: ignore[attr-defined]
        await asyncio.sleep(0.2)
        assert slow["torch"]._engine.steps == steps  # type: ignore[attr-defined]
    assert cancelled.state is JobState.CANCELLED


async def test_a_waiting_job_is_cancelled_before_it_begins(store: Store) -> None:
    work = Work()
    async with jobs_on(store, work, job_workers=1) as jobs:
        first = await jobs.begin("1", "one")
        second = await jobs.begin("2", "two")
        await wait_for(store, first.job_id, JobState.RUNNING)
        assert (await jobs.cancel(second.job_id)).state is JobState.CANCELLED
        work.go.set()
        await wait_for(store, first.job_id, JobState.DONE)
        await asyncio.sleep(0.05)
    assert work.begun == ["one"]


async def test_cancelling_an_ended_job_changes_nothing(store: Store) -> None:
    work = Work()
    work.go.set()
    async with jobs_on(store, work) as jobs:
        job = await jobs.begin("1", "work")
        await wait_for(store, job.job_id, JobState.DONE)
        assert (await jobs.cancel(job.job_id)).state is JobState.DONE


async def test_a_job_that_is_cancelled_just_as_a_worker_takes_it_ends(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, read = Work(), store.job
    async with jobs_on(store, work, job_workers=1) as jobs:
        first = await jobs.begin("1", "one")
        await wait_for(store, first.job_id, JobState.RUNNING)
        second = await jobs.begin("2", "two")

        async def read_late(job_id: str) -> Job:
            monkeypatch.setattr(store, "job", read)  # this once
            found = await read(job_id)
            work.go.set()
            while second.job_id not in jobs._running:  # noqa: ASYNC110 - before its task has taken its first step
                await asyncio.sleep(0)
            return found

        monkeypatch.setattr(store, "job", read_late)
        assert (await jobs.cancel(second.job_id)).state is JobState.CANCELLED


async def test_a_cancel_whose_caller_leaves_is_carried_out(store: Store) -> None:
    async with jobs_on(store, Work()) as jobs:
        job = await jobs.begin("1", "work")
        await wait_for(store, job.job_id, JobState.RUNNING)
        cancelling = asyncio.create_task(jobs.cancel(job.job_id))
        await asyncio.sleep(0)
        cancelling.cancel()
        await wait_for(store, job.job_id, JobState.CANCELLED)


# Failure and restart


async def test_a_job_that_fails_says_why(store: Store) -> None:
    work = Work()
    work.error = NotFound(Reason.NOT_FOUND, "the backend went")
    work.go.set()
    async with jobs_on(store, work) as jobs:
        job = await jobs.begin("1", "work")
        await wait_for(store, job.job_id, JobState.FAILED)
    problem = (await store.job(job.job_id)).problem
    assert problem is not None
    assert (problem.code, problem.message) == ("NOT_FOUND", "the backend went")


async def test_a_bug_in_a_job_fails_it_and_not_the_worker(store: Store) -> None:
    work = Work()
    work.error = ZeroDivisionError()
    work.go.set()
    async with jobs_on(store, work, job_workers=1) as jobs:
        first = await jobs.begin("1", "one")
        await wait_for(store, first.job_id, JobState.FAILED)
        work.error = None
        second = await jobs.begin("2", "two")
        await wait_for(store, second.job_id, JobState.DONE)


async def test_a_stop_leaves_jobs_to_the_next_start(store: Store) -> None:
    work = Work()
    async with jobs_on(store, work, job_workers=1) as jobs:
        running = await jobs.begin("1", "one")
        waiting = await jobs.begin("2", "two")
        await wait_for(store, running.job_id, JobState.RUNNING)
    assert [(await store.job(job.job_id)).state for job in (running, waiting)] == [JobState.WAITING] * 2
    work.go.set()
    async with jobs_on(store, work, job_workers=1):
        for job in (running, waiting):
            await wait_for(store, job.job_id, JobState.DONE)
    assert "again from the start" in (await store.job_events(running.job_id, 0))[1].message


async def test_a_job_whose_coordinator_died_is_run_again_and_says_so(store: Store) -> None:
    job, _ = await store.start_job("1", "work")
    await store.add_job_event(job.job_id, JobState.RUNNING, "started")  # and then it was killed
    work = Work()
    work.go.set()
    async with jobs_on(store, work):
        await wait_for(store, job.job_id, JobState.DONE)
    messages = [event.message for event in await store.job_events(job.job_id, 0)]
    assert "died" in messages[1]


async def test_a_job_that_kills_its_coordinator_again_and_again_fails(store: Store) -> None:
    job, _ = await store.start_job("1", "work")
    for _ in range(CRASHES):
        assert (await store.job(job.job_id)).state is JobState.WAITING
        await store.add_job_event(job.job_id, JobState.RUNNING, "started")  # killed
        jobs = Jobs(store, Work(), CoordinatorSettings(), CoordinatorMetrics())
        await jobs._take_up(await store.job(job.job_id))
    ended = await store.job(job.job_id)
    assert ended.state is JobState.FAILED
    assert ended.problem is not None


async def test_crashes_are_counted_however_much_was_told_since(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_of_jobs, "EVENT_PAGE", 1)
    job, _ = await store.start_job("1", "work")
    await store.add_job_event(job.job_id, JobState.WAITING, "died", CRASHES - 1, CRASHES, CRASH_UNIT)
    for done in range(3):
        await store.add_job_event(job.job_id, JobState.RUNNING, "on it", done, 9, "calls")
    async with jobs_on(store, Work()):
        assert (await store.job(job.job_id)).state is JobState.FAILED


async def test_stopping_on_purpose_is_no_crash(store: Store) -> None:
    job, _ = await store.start_job("1", "work")
    for _ in range(CRASHES + 1):
        async with jobs_on(store, Work()):
            await wait_for(store, job.job_id, JobState.RUNNING)
    assert (await store.job(job.job_id)).state is JobState.WAITING


async def test_a_comparison_that_was_cut_by_a_restart_comes_to_its_end(tmp_path: Path) -> None:
    slow = fake_side(step=64, step_ms=40)
    async with served(fake_side()) as (left, _), served(slow) as (right, _):
        addresses = {"torch": left, "jax": right}
        async with open_desk(tmp_path, addresses) as desk:
            job = await desk.operations.start_job(ANYONE, "first", plan(question=rolling(600)))
            await wait_for(desk.store, job.job_id, JobState.RUNNING)
        async with open_desk(tmp_path, addresses) as desk:
            events = [event async for event in desk.operations.watch_job(ANYONE, job.job_id, 2)]
            assert (await desk.operations.list_comparisons(ANYONE)).entries
    assert events[-1].job.state is JobState.DONE


def die_before_the_end_is_told(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """As if the coordinator were killed when the work is done and before anything more is written."""
    reached = asyncio.Event()

    async def hang(*_given: object) -> None:
        reached.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Jobs, "_end", hang)
    monkeypatch.setattr(Jobs, "_put_back", hang_not)
    return reached


async def hang_not(*_given: object) -> None:
    """Who is killed puts nothing back."""


async def test_a_coordinator_that_dies_after_a_comparison_is_kept_makes_no_second_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(fake_side()) as (left, _), served(fake_side()) as (right, _):
        addresses = {"torch": left, "jax": right}
        with monkeypatch.context() as dying:
            reached = die_before_the_end_is_told(dying)
            async with open_desk(tmp_path, addresses) as desk:
                job = await desk.operations.start_job(ANYONE, "first", plan())
                await asyncio.wait_for(reached.wait(), 5)
        async with open_desk(tmp_path, addresses) as desk:
            events = await desk.finish(job)
            (kept,) = (await desk.operations.list_comparisons(ANYONE)).entries
            runs = (await desk.operations.list_runs(ANYONE)).entries
    last = events[-1]
    assert (last.job.state, last.job.comparison_id, last.message) == (JobState.DONE, kept.comparison_id, "verdict PASS")
    assert len(runs) == 2


async def test_a_coordinator_that_dies_after_a_run_is_kept_makes_no_second_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(fake_side()) as (left, _):
        with monkeypatch.context() as dying:
            reached = die_before_the_end_is_told(dying)
            async with open_desk(tmp_path, {"torch": left}) as desk:
                job = await desk.operations.start_job(ANYONE, "first", RunPlan(rolling(), SideSpec("backend:torch")))
                await asyncio.wait_for(reached.wait(), 5)
        async with open_desk(tmp_path, {"torch": left}) as desk:
            last = (await desk.finish(job))[-1]
            (kept,) = (await desk.operations.list_runs(ANYONE)).entries
    assert (last.job.state, last.job.run_id) == (JobState.DONE, kept.run_id)


async def test_a_coordinator_that_dies_before_a_comparison_is_kept_leaves_neither_it_nor_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_given: object, **_named: object) -> None:
        raise ZeroDivisionError  # within the transaction, after the comparison's row

    async with desk_of(tmp_path, twins()) as desk:
        with monkeypatch.context() as dying:
            dying.setattr("coordinator.store.jobs.end", fail)
            events = await desk.finish(await desk.operations.start_job(ANYONE, "first", plan()))
        found = await desk.operations.list_comparisons(ANYONE)
        runs = await desk.operations.list_runs(ANYONE)
    assert (events[-1].job.state, found.entries, runs.entries) == (JobState.FAILED, (), ())


async def test_a_deadline_of_the_caller_does_not_bound_the_job(desk: Desk) -> None:
    caller = Caller("", time.monotonic() + 0.5)
    job = await desk.operations.start_job(caller, "first", plan())
    await asyncio.sleep(0.6)
    assert (await desk.finish(job))[-1].job.state is JobState.DONE


# The work as text

WORKS = [
    plan(),
    ComparePlan(None, SideSpec("run:run-0"), SideSpec("backend:x", Variant(mask=MaskSpec(Causal())))),
    RunPlan(rolling(3, top_k=2), SideSpec("backend:x")),
    CaseRun("smoke"),
]


@pytest.mark.parametrize("work", WORKS, ids=lambda work: type(work).__name__)
def test_work_is_read_back_as_it_was_written(work: ComparePlan | RunPlan | CaseRun) -> None:
    text = work_to_text(work)
    assert work_to_text(read_work(text)) == text


@pytest.mark.parametrize("text", ["{}", "[]", '{"kind":"dance","work":{}}', '{"kind":"case","work":{"nam":"x"}}', "x"])
def test_work_of_another_version_is_not_guessed_at(text: str) -> None:
    with pytest.raises(Problem):
        read_work(text)
