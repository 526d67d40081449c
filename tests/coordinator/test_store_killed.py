"""kill -9 at any moment loses no finished run and leaves no half run that looks finished."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coordinator.store import Store, new_run_id
from dualtrace.problems import Problem
from tests.support.stored import make_record

ROOT = Path(__file__).parents[2]
KILLS = 20
MOST_RUNS = 4  # that a writer may report before its end draws near
LONGEST_SECONDS = 0.08  # from then on: several times what one run takes
SEED = 20261121


@contextmanager
def open_nursery(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.support.killed_writer", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as nursery:
        yield nursery
        assert nursery.stdin is not None
        nursery.stdin.close()


def kill_one_writer(nursery: subprocess.Popen[str], after_runs: int, after_seconds: float) -> list[str]:
    """The ids that a writer had reported when it was killed: after 0 runs, while it opens the store."""
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    nursery.stdin.write("go\n")
    nursery.stdin.flush()
    pid = int(nursery.stdout.readline().removeprefix("pid "))
    reported = [nursery.stdout.readline().strip() for _ in range(after_runs)]
    time.sleep(after_seconds)
    os.kill(pid, signal.SIGKILL)
    while (line := nursery.stdout.readline().strip()) != "ended":
        reported.append(line)
    return reported


async def list_all(store: Store) -> list[str]:
    page = await store.list_runs(1000)
    ids = [entry.run_id for entry in page.entries]
    while page.next_page_token:
        page = await store.list_runs(1000, page.next_page_token)
        ids += [entry.run_id for entry in page.entries]
    return ids


async def find_faults(folder: Path, reported: list[str], checked: set[str]) -> list[str]:
    """Opens the store as a coordinator that starts again would. What is lost or half, of what was not checked yet."""
    store = await Store.open(folder)
    stored = await list_all(store)
    faults = [f"{run_id} was reported and is lost" for run_id in reported if run_id not in stored]
    for run_id in set(stored) - checked:
        try:
            record = await store.get_run(run_id)
            for digest in filter(None, (record.raw_request_ref, record.raw_response_ref)):
                async for _ in store.artifacts.read(digest):
                    pass
        except Problem as problem:
            faults.append(f"{run_id}: {problem}")
    checked.update(stored)
    await store.close()
    files = sum(path.is_file() for path in (folder / "artifacts").rglob("*"))
    if files != 2 * len(stored):
        faults.append(f"{files} files of artifacts for {len(stored)} runs of two each")
    return faults


async def test_killed_at_random_moments_it_loses_no_finished_run_and_keeps_no_half_one(tmp_path: Path) -> None:
    chance, faults, reported = random.Random(SEED), [], []
    checked: set[str] = set()
    with open_nursery(tmp_path) as nursery:
        for _ in range(KILLS):
            after_runs, after_seconds = chance.randint(0, MOST_RUNS), chance.uniform(0, LONGEST_SECONDS)
            reported += kill_one_writer(nursery, after_runs, after_seconds)
            faults += await find_faults(tmp_path, reported, checked)
    assert faults == []


async def test_a_run_that_was_reported_and_never_stored_is_found(tmp_path: Path) -> None:
    assert len(await find_faults(tmp_path, [new_run_id()], set())) == 1


async def test_a_run_without_its_artifact_is_found(tmp_path: Path) -> None:
    store = await Store.open(tmp_path)
    digest = await store.artifacts.put(b"x")
    record = make_record(raw_request_ref=digest, raw_response_ref=digest)
    await store.add_run(record)
    await store.close()
    next(path for path in (tmp_path / "artifacts").rglob("*") if path.is_file()).unlink()
    assert any(record.run_id in fault for fault in await find_faults(tmp_path, [], set()))
