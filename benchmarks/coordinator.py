"""What a coordinator adds: a comparison of two ready sides, the list of stored runs, and its memory under many.

The sides are fake sidecars in processes of their own; the coordinator runs here, so that its memory is ours.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.sidecars import sidecar
from benchmarks.table import Row, spread
from coordinator.backends import BackendBook
from coordinator.comparing import CompareOutcome
from coordinator.operations import Caller, Operations
from coordinator.settings import BackendSettings, CoordinatorSettings
from coordinator.store import Store, new_run_id
from dualtrace.client import Client, Connection
from dualtrace.engine import int_array
from dualtrace.library import ComparePlan, SideSpec
from dualtrace.metrics import CoordinatorMetrics
from dualtrace.questions.asked import Input, RollingQuestion

TOKENS = 4096
REPEATS = 15
RUNS = 1000
STREAMED = 100
LISTS = 20
ANYONE = Caller("")
# As long as a fast real side takes: fake engines that answer at once would compete with us for the two cores.
SPEC = "vocab=64,step=256,step_ms=60"


def plan(store: bool) -> ComparePlan:
    question = RollingQuestion((Input(ids=int_array([i % 50 for i in range(TOKENS)])),))
    return ComparePlan(question, SideSpec("backend:left"), SideSpec("backend:right"), store=store)


@asynccontextmanager
async def coordinator(addresses: dict[str, str]) -> AsyncIterator[tuple[Operations, Store]]:
    with tempfile.TemporaryDirectory() as folder:
        metrics = CoordinatorMetrics()
        store = await Store.open(Path(folder))
        book = BackendBook([BackendSettings(name, (address,)) for name, address in addresses.items()], metrics)
        operations = Operations(store, book, CoordinatorSettings(data=Path(folder)), metrics)
        try:
            await book.start()
            await book.settle(30)
            await operations.start()
            yield operations, store
        finally:
            await operations.close()
            await book.close()
            await store.close()


async def compare(operations: Operations, *, store: bool = True) -> CompareOutcome:
    outcome = [event async for event in operations.compare(ANYONE, plan(store))][-1]
    assert isinstance(outcome, CompareOutcome)
    return outcome


async def measure_added(
    operations: Operations, addresses: dict[str, str], *, store: bool
) -> tuple[list[float], list[float]]:
    """Per repeat: seconds of the whole comparison, and beyond what the slower side takes when it is asked directly."""
    whole, added = [], []
    for number in range(REPEATS + 2):
        alone = [await ask_directly(address) for address in addresses.values()]
        begun = time.perf_counter()
        await compare(operations, store=store)
        seconds = time.perf_counter() - begun
        if number >= 2:
            whole.append(seconds)
            added.append(seconds - max(alone))
    return whole, added


async def ask_directly(address: str) -> float:
    """Seconds of the same question to one side, over a connection that is open."""
    question = plan(store=False).question
    assert isinstance(question, RollingQuestion)
    async with Client(Connection(address)) as client:
        await client.describe()
        begun = time.perf_counter()
        async for _ in client.rolling(question):
            pass
        return time.perf_counter() - begun


async def measure_lists(operations: Operations, store: Store) -> list[float]:
    outcome = await compare(operations)
    record = await store.get_run((await store.get_comparison(outcome.comparison_id)).left_run_id)
    for _ in range(RUNS):
        await store.add_run(replace(record, run_id=new_run_id(), raw_request_ref="", raw_response_ref=""))
    seconds = []
    for _ in range(LISTS):
        begun = time.perf_counter()
        page = await operations.list_runs(ANYONE, page_size=RUNS)
        seconds.append(time.perf_counter() - begun)
        assert len(page.entries) == RUNS
    return seconds


async def measure_memory(operations: Operations) -> list[float]:
    """Resident megabytes after each of many comparisons."""
    found = []
    for _ in range(STREAMED):
        await compare(operations)
        found.append(resident_megabytes())
    return found


def resident_megabytes() -> float:
    return int(Path(f"/proc/{os.getpid()}/status").read_text().split("VmRSS:")[1].split()[0]) * 1024 / 1e6


def run(work: Callable[[Operations, Store, dict[str, str]], Awaitable[list[Row]]], spec: str) -> list[Row]:
    async def inside(addresses: dict[str, str]) -> list[Row]:
        async with coordinator(addresses) as (operations, store):
            return await work(operations, store, addresses)

    with ExitStack() as stack:
        started = {name: stack.enter_context(sidecar("fake", "--spec", spec)) for name in ("left", "right")}
        return asyncio.run(inside({name: side.address for name, side in started.items()}))


async def measure_added_time(operations: Operations, _store: Store, addresses: dict[str, str]) -> list[Row]:
    shape = f"2 × {TOKENS} tokens, ready fake sides"
    rows = []
    for name, kept in (("kept", True), ("discarded", False)):
        whole, added = await measure_added(operations, addresses, store=kept)
        rows.append(Row(f"compare, {name}, whole", shape, spread(whole)))
        aim = "<= 50 ms"
        rows.append(
            Row(f"compare, {name}, over the slower side", shape, spread(added), aim, "the same question asked directly")
        )
    return rows


async def measure_kept(operations: Operations, store: Store, _addresses: dict[str, str]) -> list[Row]:
    megabytes = await measure_memory(operations)
    settled = megabytes[STREAMED // 5 :]  # caches and the allocator fill in the first fifth
    drift = statistics.mean(settled[-10:]) - statistics.mean(settled[:10])
    note = f"{megabytes[0]:.0f} MB after the first, {max(megabytes):.0f} MB at most"
    shape = f"{STREAMED} comparisons of 2 × {TOKENS}"
    lists = await measure_lists(operations, store)
    return [
        Row("coordinator's memory, drift", shape, f"{drift:+.1f} MB", "± 20 MB", note),
        Row("list of stored runs", f"{RUNS} runs, one page", spread(lists), "< 50 ms"),
    ]


def measure() -> list[Row]:
    return run(measure_added_time, SPEC) + run(measure_kept, "vocab=64")
