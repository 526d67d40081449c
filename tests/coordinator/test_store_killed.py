"""kill -9 at any moment loses nothing that was finished, and leaves nothing half that looks finished."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from coordinator.store import Store, new_comparison_id
from dualtrace.library import JobState, Page
from dualtrace.problems import Problem
from tests.support.stored import make_comparison, make_record

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
KILLS = 20
MOST_REPORTED = 2  # comparisons that a writer may report before its end draws near
LONGEST_SECONDS = 0.08  # from then on: several times what one comparison takes
SEED = 20261121


@contextmanager
def open_nursery(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.support.killed_writer", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as nursery:
        yield nursery
        assert nursery.stdin is not None
        nursery.stdin.close()


def kill_one_writer(nursery: subprocess.Popen[str], after_reports: int, after_seconds: float) -> list[str]:
    """The ids that a writer had reported when it was killed: after 0 runs, while it opens the store."""
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    nursery.stdin.write("go\n")
    nursery.stdin.flush()
    pid = int(nursery.stdout.readline().removeprefix("pid "))
    reported = [nursery.stdout.readline().strip() for _ in range(after_reports)]
    time.sleep(after_seconds)
    os.kill(pid, signal.SIGKILL)
    while (line := nursery.stdout.readline().strip()) != "ended":
        reported.append(line)
    return reported


async def list_all(turn: Callable[[int, str], Awaitable[Page[T]]]) -> list[T]:
    page = await turn(1000, "")
    found = list(page.entries)
    while page.next_page_token:
        page = await turn(1000, page.next_page_token)
        found += page.entries
    return found


async def find_faults(folder: Path, reported: list[str], checked: set[str]) -> list[str]:
    """Opens the store as a coordinator that starts again would. What is lost or half, of what was not checked yet."""
    store = await Store.open(folder)
    runs = [entry.run_id for entry in await list_all(store.list_runs)]
    stored = [entry.comparison_id for entry in await list_all(store.list_comparisons)]
    faults = [f"{one} was reported and is lost" for one in reported if one not in stored]
    named: set[str] = set()
    for comparison_id in stored:
        if comparison_id not in checked:
            faults += await check_job(store, comparison_id)
            record = await store.get_comparison(comparison_id)
            named |= {record.left_run_id, record.right_run_id}
    for run_id in set(runs) - checked:
        faults += await check_run(store, run_id)
    faults += [f"{run_id} belongs to no comparison" for run_id in set(runs) - checked - named]
    checked.update(runs, stored)
    await store.close()
    files = sum(path.is_file() for path in (folder / "artifacts").rglob("*"))
    if files != 2 * len(runs):
        faults.append(f"{files} files of artifacts for {len(runs)} runs of two each")
    return faults


async def check_job(store: Store, comparison_id: str) -> list[str]:
    job, _ = await store.start_job(comparison_id, "work")
    if (job.state, job.comparison_id) == (JobState.DONE, comparison_id):
        return []
    return [f"{comparison_id} is kept and its job is {job.state.value}"]


async def check_run(store: Store, run_id: str) -> list[str]:
    try:
        record = await store.get_run(run_id)
        for digest in filter(None, (record.raw_request_ref, record.raw_response_ref)):
            async for _ in store.artifacts.read(digest):
                pass
    except Problem as problem:
        return [f"{run_id}: {problem}"]
    return []


async def test_killed_at_random_moments_it_loses_nothing_finished_and_keeps_nothing_half(tmp_path: Path) -> None:
    chance, faults, reported = random.Random(SEED), [], []
    checked: set[str] = set()
    with open_nursery(tmp_path) as nursery:
        for _ in range(KILLS):
            after_reports, after_seconds = chance.randint(0, MOST_REPORTED), chance.uniform(0, LONGEST_SECONDS)
            reported += kill_one_writer(nursery, after_reports, after_seconds)
            faults += await find_faults(tmp_path, reported, checked)
    assert faults == []


async def test_a_comparison_that_was_reported_and_never_stored_is_found(tmp_path: Path) -> None:
    assert len(await find_faults(tmp_path, [new_comparison_id()], set())) == 1


async def test_a_comparison_without_the_end_of_its_job_is_found(tmp_path: Path) -> None:
    store = await Store.open(tmp_path)
    record = make_comparison()
    await store.start_job(record.comparison_id, "work")
    await store.add_comparison(record)
    await store.close()
    faults = await find_faults(tmp_path, [], set())
    assert [fault for fault in faults if "its job is WAITING" in fault] == faults != []


async def test_a_run_without_its_artifact_is_found(tmp_path: Path) -> None:
    store = await Store.open(tmp_path)
    digest = await store.artifacts.put(b"x")
    record = make_record(raw_request_ref=digest, raw_response_ref=digest)
    await store.add_run(record)
    await store.close()
    next(path for path in (tmp_path / "artifacts").rglob("*") if path.is_file()).unlink()
    assert any(record.run_id in fault for fault in await find_faults(tmp_path, [], set()))
