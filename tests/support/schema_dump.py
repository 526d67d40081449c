"""Writes the database of a small store as SQL text: `python -m tests.support.schema_dump FILE`.

Once for each released schema, kept in tests/coordinator/released and never written again: every later release must
migrate it forward. It knows what stands in it.
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from coordinator.store import Store
from coordinator.store.sqlite import FILE
from dualtrace.library import JobState
from dualtrace.problems import Internal, Reason
from tests.support.stored import make_case, make_comparison, make_full_record, make_record

RUNS = ("run-" + "0" * 25 + "1", "run-" + "0" * 25 + "2")
COMPARISON = "cmp-" + "0" * 26
CASE = "first"
DELETED_CASE = "gone"
REQUESTS = ("request-1", "request-2")


async def fill(store: Store) -> None:
    await store.add_run(make_record(run_id=RUNS[0]))
    await store.add_run(make_full_record(run_id=RUNS[1], target="backend:b"))
    await store.add_comparison(make_comparison(*RUNS, case=CASE, comparison_id=COMPARISON))
    await store.create_case(make_case(CASE))
    await store.update_case(make_case(CASE, description="changed"), 1)
    await store.create_case(make_case(DELETED_CASE))
    await store.delete_case(DELETED_CASE, 1)
    done, _ = await store.start_job(REQUESTS[0], "the work")
    await store.add_job_event(done.job_id, JobState.RUNNING, "half", 1, 2, "tokens", run_id=RUNS[0])
    await store.add_job_event(done.job_id, JobState.FAILED, problem=Internal(Reason.BUG, "it broke"))
    await store.start_job(REQUESTS[1], "other work")


async def dump() -> str:
    with tempfile.TemporaryDirectory() as folder:
        store = await Store.open(Path(folder))
        await fill(store)
        await store.close()
        with closing(sqlite3.connect(Path(folder) / FILE)) as connection:
            # The key of this store's page tokens is nobody's secret here, but looks like one.
            connection.execute("UPDATE facts SET value = ?", ("00" * 32,))
            return "\n".join(connection.iterdump()) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(asyncio.run(dump()), encoding="utf-8")
