"""A process that keeps making processes which store runs without end, each to be killed by whoever started it.

Forked from one that has imported everything, a writer stores its first run within milliseconds, so that many can be
killed in a short test. On stdout: "pid N" for a writer that starts, the id of each run that is stored, "ended" when
the writer is gone. Each line on stdin starts one. It must not know what is checked afterwards.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import tempfile
from pathlib import Path

from coordinator.store import Store
from tests.support.stored import make_record

MAX_RUNS = 200  # a writer that nobody kills ends by itself


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


async def write_runs(folder: Path) -> None:
    store = await Store.open(folder)
    for _ in range(MAX_RUNS):
        request = await store.artifacts.put(secrets.token_bytes(50_000))
        response = await store.artifacts.put(secrets.token_bytes(600_000))
        record = make_record(tokens=300, raw_request_ref=request, raw_response_ref=response)
        await store.add_run(record)
        say(record.run_id)


async def warm_up() -> None:
    """Import what is imported late, so that no writer has to."""
    with tempfile.TemporaryDirectory() as folder:
        store = await Store.open(Path(folder))
        await store.add_run(make_record())
        await store.close()


def main() -> None:
    folder = Path(sys.argv[1])
    asyncio.run(warm_up())
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            say(f"pid {os.getpid()}")
            asyncio.run(write_runs(folder))
            os._exit(0)
        os.waitpid(pid, 0)
        say("ended")


if __name__ == "__main__":
    main()
