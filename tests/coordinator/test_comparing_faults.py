"""A comparison whose store is in trouble, or whose sides read other tokens: told with its reason, nothing half kept."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from coordinator.store.sqlite import FILE
from dualtrace.compare.events import TokenPairs
from dualtrace.compare.report import Verdict
from dualtrace.library import JobState
from dualtrace.problems import Exhausted, Problem, Reason, Unavailable
from tests.support.desk import ANYONE, Desk, desk_of, fake_side, plan, twins
from tests.support.scorers import only

BUSY_MS = 50


async def ask_the_writer(desk: Desk, statement: str) -> Any:
    async def work(connection: AsyncConnection) -> Any:
        return await connection.scalar(text(statement))

    return await desk.store._database.write(work)


async def fill_the_disk(desk: Desk) -> None:
    """As if there were no room for a single page more."""
    pages = await ask_the_writer(desk, "PRAGMA page_count")
    await ask_the_writer(desk, f"PRAGMA max_page_count = {pages}")


async def fail(desk: Desk) -> tuple[list[Any], Problem, float]:
    """What a comparison told before it failed, the problem, and the seconds that it took."""
    begun = time.monotonic()
    told: list[Any] = []

    async def listen() -> None:
        async for event in desk.operations.compare(ANYONE, plan()):
            told.append(event)

    with pytest.raises(Problem) as caught:
        await listen()
    return told, caught.value, time.monotonic() - begun


async def count_kept(desk: Desk) -> tuple[int, int]:
    runs, comparisons = await desk.operations.list_runs(ANYONE), await desk.operations.list_comparisons(ANYONE)
    return len(runs.entries), len(comparisons.entries)


async def test_a_full_disk_ends_a_comparison_with_its_reason_and_leaves_nothing_half(tmp_path: Path) -> None:
    async with desk_of(tmp_path, twins()) as desk:
        await desk.compare(plan())
        await fill_the_disk(desk)
        told, problem, _ = await fail(desk)
        assert await count_kept(desk) == (2, 1)
    assert isinstance(problem, Exhausted)
    assert problem.reason is Reason.STORAGE_FULL
    assert only(told, TokenPairs), "what was compared is told all the same"


async def test_a_full_disk_takes_no_place_away_from_later_comparisons(tmp_path: Path) -> None:
    async with desk_of(tmp_path, twins(), max_comparisons=1) as desk:
        await fill_the_disk(desk)
        await fail(desk)
        await ask_the_writer(desk, "PRAGMA max_page_count = 1000000")
        _, outcome = await desk.compare(plan())
    assert outcome.report.verdict is Verdict.PASS


async def test_a_comparison_that_could_not_be_kept_leaves_no_bytes_behind(tmp_path: Path) -> None:
    async with desk_of(tmp_path, {"torch": fake_side()}, absent=("jax",)) as desk:
        async for event in desk.operations.compare(ANYONE, plan()):
            assert event is not None
            break  # left before its end
        incoming = list((tmp_path / "artifacts" / "incoming").iterdir())
    assert incoming == []


async def test_a_locked_database_ends_a_comparison_in_time_and_the_next_one_is_kept(tmp_path: Path) -> None:
    async with desk_of(tmp_path, twins()) as desk:
        await ask_the_writer(desk, f"PRAGMA busy_timeout = {BUSY_MS}")
        with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            _, problem, seconds = await fail(desk)
            other.execute("ROLLBACK")
        assert await count_kept(desk) == (0, 0)
        await desk.compare(plan())
        assert await count_kept(desk) == (2, 1)
    assert isinstance(problem, Unavailable)
    assert (problem.reason, seconds < 5.0) == (Reason.STORAGE_BUSY, True)


async def test_a_job_on_a_full_disk_fails_with_the_reason_once_there_is_room_to_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_given: object, **_named: object) -> None:
        raise Exhausted(Reason.STORAGE_FULL, "no room is left")

    async with desk_of(tmp_path, twins()) as desk:
        monkeypatch.setattr("coordinator.store.comparisons.add", refuse)
        job = (await desk.finish(await desk.operations.start_job(ANYONE, "first", plan())))[-1].job
        assert await count_kept(desk) == (0, 0)
    assert job.state is JobState.FAILED
    assert job.problem is not None
    assert job.problem.reason == Reason.STORAGE_FULL.value
