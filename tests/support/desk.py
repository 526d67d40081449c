"""A coordinator's operations for tests, over fake sidecars behind real sockets and a store of its own."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.backends import BackendBook
from coordinator.comparing import CompareOutcome, Told
from coordinator.operations import Caller, Operations
from coordinator.settings import BackendSettings, CoordinatorSettings
from coordinator.store import Store
from dualtrace.engine import int_array
from dualtrace.engine_scorer import EngineScorer
from dualtrace.fake import FakeEngine, FakeSpec, fake_tokenizer
from dualtrace.library import ComparePlan, Job, JobEvent, SideSpec
from dualtrace.metrics import CoordinatorMetrics
from dualtrace.questions.asked import Input, RollingQuestion
from dualtrace.scorer import Scorer
from tests.support.scorers import served

ANYONE = Caller("")
WORDS = fake_tokenizer()  # made once: it takes longer than all the rest of a scorer
SETTLE_SECONDS = 5.0


def fake_side(**spec: Any) -> EngineScorer:
    """The fake engine behind a queue, quick to make."""
    return EngineScorer(FakeEngine(FakeSpec(**{"vocab": WORDS.size, **spec})), WORDS)


@dataclass
class Desk:
    """Everything a test may look at."""

    operations: Operations
    store: Store
    book: BackendBook
    metrics: CoordinatorMetrics
    scorers: Mapping[str, Scorer]

    async def compare(self, plan: ComparePlan, caller: Caller = ANYONE) -> tuple[list[Told], CompareOutcome]:
        told = [event async for event in self.operations.compare(caller, plan)]
        assert isinstance(told[-1], CompareOutcome)
        return told, told[-1]

    async def finish(self, job: Job) -> list[JobEvent]:
        """The job's events up to its end."""
        return [event async for event in self.operations.watch_job(ANYONE, job.job_id)]


@contextlib.asynccontextmanager
async def open_desk(
    folder: Path, addresses: dict[str, str], scorers: Mapping[str, Scorer] | None = None, **settings: Any
) -> AsyncIterator[Desk]:
    """A coordinator whose backends are at these addresses."""
    metrics = CoordinatorMetrics()
    told = CoordinatorSettings(data=folder, **settings)
    store = await Store.open(told.folder)
    book = BackendBook([BackendSettings(name, (address,)) for name, address in addresses.items()], metrics)
    operations = Operations(store, book, told, metrics)
    try:
        await book.start()
        await book.settle(SETTLE_SECONDS)
        await operations.start()
        yield Desk(operations, store, book, metrics, scorers or {})
    finally:
        await operations.close()
        await book.close()
        await store.close()


@contextlib.asynccontextmanager
async def desk_of(
    folder: Path, scorers: Mapping[str, Scorer], absent: tuple[str, ...] = (), **settings: Any
) -> AsyncIterator[Desk]:
    """A coordinator whose backends are these scorers, each behind a socket; nobody listens behind the absent ones."""
    async with contextlib.AsyncExitStack() as stack:
        addresses = dict.fromkeys(absent, "127.0.0.1:1")
        for name, scorer in scorers.items():
            addresses[name], _ = await stack.enter_async_context(served(scorer))
        yield await stack.enter_async_context(open_desk(folder, addresses, scorers, **settings))


def twins(**right: Any) -> dict[str, Scorer]:
    """Two backends of the same numbers, but for what is planted in the right one."""
    return {"torch": fake_side(), "jax": fake_side(**right)}


def rolling(count: int = 300, **fields: Any) -> RollingQuestion:
    return RollingQuestion(inputs=(Input(ids=int_array([i % 250 for i in range(count)])),), **fields)


def plan(left: str = "backend:torch", right: str = "backend:jax", **fields: Any) -> ComparePlan:
    return ComparePlan(**{"question": rolling(), "left": SideSpec(left), "right": SideSpec(right), **fields})


async def wait_until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        await asyncio.sleep(0.01)
