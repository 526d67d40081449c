"""Scorers and servers for tests, over the fake engine. Everything opened here is closed by the test that opened it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from dualtrace.client import Client, Connection
from dualtrace.engine import Engine, int_array
from dualtrace.engine_scorer import EngineScorer, StreamPace
from dualtrace.fake import FakeEngine, FakeSpec, fake_tokenizer
from dualtrace.metrics import Metrics
from dualtrace.questions.answers import AnswerEvent
from dualtrace.questions.asked import Input, LogprobItem, LogprobQuestion, Question, RollingQuestion
from dualtrace.scheduler import SchedulerLimits
from dualtrace.scorer import Scorer
from dualtrace.server import SidecarServer
from dualtrace.settings import SidecarSettings

T = TypeVar("T")


def fake_scorer(
    engine: Engine | None = None, *, scheduling: SchedulerLimits | None = None, **spec: Any
) -> EngineScorer:
    made = engine or FakeEngine(FakeSpec(**spec))
    return EngineScorer(made, fake_tokenizer(), scheduling=scheduling, pace=StreamPace())


@contextlib.asynccontextmanager
async def served(scorer: Scorer, **settings: Any) -> AsyncIterator[tuple[str, SidecarServer]]:
    """The scorer behind a real socket on a free port; (address, server). The scorer is closed at the end."""
    server = SidecarServer(scorer, SidecarSettings(port=0, **settings), Metrics())
    try:
        address = await server.start()
        await server.make_ready()
        yield address, server
    finally:
        await server.drain(0)
        await scorer.close()


@contextlib.asynccontextmanager
async def connected(scorer: Scorer, **settings: Any) -> AsyncIterator[Client]:
    """A client of the scorer behind a real socket."""
    async with served(scorer, **settings) as (address, _server), Client(Connection(address)) as client:
        yield client


def rolling_ids(count: int, **fields: Any) -> RollingQuestion:
    """A rolling question over `count` ids."""
    return RollingQuestion(inputs=(Input(ids=int_array([i % 250 for i in range(count)])),), **fields)


def logprob_text(prompt: str, *completions: str, **fields: Any) -> LogprobQuestion:
    items = tuple(LogprobItem(Input(text=prompt), Input(text=completion)) for completion in completions)
    return LogprobQuestion(items=items, **fields)


async def all_events(scorer: Scorer, question: Question, deadline: float | None = None) -> list[AnswerEvent]:
    return [event async for event in scorer.ask(question, deadline=deadline)]


def only(events: list[Any], kind: type[T]) -> list[T]:
    return [event for event in events if isinstance(event, kind)]
