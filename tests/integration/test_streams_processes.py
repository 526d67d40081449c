"""Streams through real processes: seen while both sides still work, left in the middle, refused, taken up again.

Sides are slow, so that whatever is seen is seen before they end: their own counts of steps say so, and no clock.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing

import pytest

from dualtrace.client import Client, Connection
from dualtrace.compare.events import FirstDivergence, TokenPairs
from dualtrace.compare.tolerance import Tolerance
from dualtrace.coordinator_client import CoordinatorClient
from dualtrace.library import ComparePlan, JobEvent, JobState, RunPlan, SideSpec
from dualtrace.problems import Exhausted, Problem, Reason
from dualtrace.questions.answers import AnswerSummary
from tests.support.coordinated import House, address_of, count_steps, is_at_rest, read_metric, start_sidecar
from tests.support.processes import Processes, wait_until
from tests.support.scorers import all_events, rolling_ids

PAUSE_SECONDS = 0.02
PAUSE = f"step=1,step_ms={PAUSE_SECONDS * 1e3:g}"
LONG = 1500  # tokens: half a minute of such a side
CANCELLED = 'dualtrace_calls_total{code="CANCELLED",method="RollingLogprob"}'
ANY = Tolerance("given", 1e-9, 0.0, "the same numbers but for what was planted")
PLAN = ComparePlan(rolling_ids(LONG), SideSpec("backend:slow"), SideSpec("backend:bent"), tolerance=ANY)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("streams")
    with Processes(folder) as processes:
        yield House(processes, folder / "data", {"slow": PAUSE, "bent": f"{PAUSE},plant_at=9,plant=3"}).start()


def running_comparisons(house: House) -> float:
    assert house.coordinator is not None
    return read_metric(house.coordinator, "dualtrace_running_comparisons")


async def settled(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    return await asyncio.to_thread(wait_until, condition, seconds)


async def test_pairs_are_seen_and_a_divergence_is_told_before_either_side_is_done(house: House) -> None:
    before = {name: count_steps(side) for name, side in house.sidecars.items()}
    seen: list[int] = []
    parted: list[int] = []
    async with CoordinatorClient(Connection(house.address)) as client, aclosing(client.compare(PLAN)) as told:
        async for event in told:
            if isinstance(event, TokenPairs):
                seen += range(event.first_index, event.first_index + len(event.statuses))
            if isinstance(event, FirstDivergence):
                parted.append(event.index)
                break
        done = {name: count_steps(side) - before[name] for name, side in house.sidecars.items()}
    assert parted == [10]
    assert seen == list(range(11))  # all pairs up to there, and none was held back to come with more
    assert max(done.values()) < LONG


async def test_a_caller_who_leaves_empties_the_queues_of_both_engines(house: House) -> None:
    assert await settled(lambda: running_comparisons(house) == 0)  # those of other tests
    before = {name: read_metric(side, CANCELLED) for name, side in house.sidecars.items()}
    async with CoordinatorClient(Connection(house.address)) as client, aclosing(client.compare(PLAN)) as told:
        async for event in told:
            if isinstance(event, TokenPairs):
                break
        assert running_comparisons(house) == 1
    for name, side in house.sidecars.items():
        assert await settled(lambda: read_metric(side, CANCELLED) > before[name]), side.tell()  # noqa: B023
        assert await settled(lambda: is_at_rest(side, PAUSE_SECONDS)), side.tell()  # noqa: B023
        assert read_metric(side, "dualtrace_waiting_calls") == 0
    assert await settled(lambda: running_comparisons(house) == 0)


async def test_a_full_queue_refuses_the_next_caller_and_answers_those_it_has(processes: Processes) -> None:
    flags = ("--queue-limit", "2", "--batch-tokens", "600")
    sidecar = start_sidecar(processes, "step=20,step_ms=20", "narrow", *flags)
    async with Client(Connection(address_of(sidecar))) as client:
        running = asyncio.create_task(all_events(client, rolling_ids(40_000)))
        assert await settled(lambda: count_steps(sidecar) > 0), sidecar.tell()
        waiting = [asyncio.create_task(all_events(client, rolling_ids(600))) for _ in range(2)]  # too long to pass it
        assert await settled(lambda: read_metric(sidecar, "dualtrace_waiting_calls") == 2), sidecar.tell()
        with pytest.raises(Exhausted) as refused:
            await all_events(client, rolling_ids(600))
        running.cancel()
        answers = await asyncio.gather(*waiting)
    assert (refused.value.code_name, refused.value.reason) == ("RESOURCE_EXHAUSTED", Reason.QUEUE_FULL)
    assert [type(events[-1]) for events in answers] == [AnswerSummary, AnswerSummary]
    assert read_metric(sidecar, 'dualtrace_calls_total{code="RESOURCE_EXHAUSTED",method="RollingLogprob"}') == 1


async def kill_in_the_middle(house: House, events: AsyncIterator[JobEvent], seen: list[JobEvent]) -> None:
    async for event in events:
        seen.append(event)
        if event.done:
            house.end_coordinator(signal.SIGKILL)


async def test_a_job_is_watched_on_behind_the_last_number_seen_when_its_coordinator_was_killed(house: House) -> None:
    before: list[JobEvent] = []
    async with CoordinatorClient(Connection(house.address)) as client:
        job = await client.start_job("over-a-restart", RunPlan(rolling_ids(100), SideSpec("backend:slow")))
        with pytest.raises(Problem):
            await kill_in_the_middle(house, client.watch_job(job.job_id), before)
    house.start_coordinator()
    async with CoordinatorClient(Connection(house.address)) as client:
        after = [event async for event in client.watch_job(job.job_id, before[-1].sequence)]
        run_id = after[-1].job.run_id
        assert run_id is not None
        assert (await client.get_run(run_id)).run.complete
    numbers = [event.sequence for event in before + after]
    assert numbers == list(range(1, len(numbers) + 1))
    assert any("run again from the start" in event.message for event in after)
    assert after[-1].job.state is JobState.DONE
