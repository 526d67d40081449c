"""A process that keeps making processes which store comparisons without end, each to be killed by whoever started it.

Forked from one that has imported everything, a writer stores its first one within milliseconds, so that many can be
killed in a short test. On stdout: "pid N" for a writer that starts, the id of each comparison that is stored with its
two runs and the end of its job, "ended" when the writer is gone. Each line on stdin starts one. The job's request id is
the comparison's id. It must not know what is checked afterwards.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import tempfile
from pathlib import Path

from coordinator.store import JobEnd, Store
from dualtrace.library import JobState
from tests.support.stored import make_comparison, make_record

MAX_COMPARISONS = 200  # a writer that nobody kills ends by itself


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


async def write_comparisons(folder: Path) -> None:
    store = await Store.open(folder)
    for _ in range(MAX_COMPARISONS):
        say(await write_one(store))


async def write_one(store: Store) -> str:
    runs = []
    for _ in range(2):
        staged = await asyncio.gather(*(store.artifacts.stage(secrets.token_bytes(size)) for size in (20_000, 300_000)))
        await store.artifacts.keep(staged)
        request, response = (one.digest for one in staged)
        runs.append(make_record(tokens=300, raw_request_ref=request, raw_response_ref=response))
    comparison = make_comparison(runs[0].run_id, runs[1].run_id)
    job, _ = await store.start_job(comparison.comparison_id, "work")
    await store.add_comparison(comparison, None, runs, JobEnd(job.job_id, JobState.DONE, "verdict"))
    return comparison.comparison_id


async def warm_up() -> None:
    """Import what is imported late, so that no writer has to."""
    with tempfile.TemporaryDirectory() as folder:
        store = await Store.open(Path(folder))
        await write_one(store)
        await store.close()


def main() -> None:
    folder = Path(sys.argv[1])
    asyncio.run(warm_up())
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            say(f"pid {os.getpid()}")
            asyncio.run(write_comparisons(folder))
            os._exit(0)
        os.waitpid(pid, 0)
        say("ended")


if __name__ == "__main__":
    main()
