"""A sidecar whose model takes its time: it can be watched from the first moment, refuses, and then serves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dualtrace.client import Client, Connection
from dualtrace.fake import FakeEngine, FakeSpec
from dualtrace.listening import Announce, StopSignals
from dualtrace.metrics import Metrics
from dualtrace.preparing import warm_up
from dualtrace.problems import InvalidArgument, Problem, Reason, Unavailable
from dualtrace.questions.asked import Input, NextTokenQuestion
from dualtrace.scorer import Scorer
from dualtrace.server import serve
from dualtrace.settings import SidecarSettings
from dualtrace.sidecar import SERVICE_NAME
from tests.support.processes import Processes, run_command, wait_until
from tests.support.scorers import fake_scorer
from tests.unit.test_preparing import CompilingEngine
from tests.unit.test_scheduler import until

QUESTION = NextTokenQuestion((Input(text="one two"),))
SECONDS = 20.0


@dataclass
class Start:
    """A sidecar that starts in this process, as far as the test lets it."""

    may_load: threading.Event = field(default_factory=threading.Event)
    said: list[str] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)
    engine: FakeEngine = field(default_factory=lambda: FakeEngine(FakeSpec()))
    failure: Exception | None = None

    def load(self, tell: Announce) -> Scorer:
        tell("loading what takes its time")
        assert self.may_load.wait(SECONDS), "a test forgot to let the model load"
        if self.failure is not None:
            raise self.failure
        warm_up(self.engine, self.metrics, tell)
        return fake_scorer(self.engine)

    @property
    def address(self) -> str:
        return next(found[1] for line in self.said if (found := re.match(r"health on (\S+),", line)))

    @property
    def listens(self) -> bool:
        return any(line.startswith("listening on ") for line in self.said)


@contextlib.asynccontextmanager
async def starting(start: Start) -> AsyncIterator[asyncio.Task[None]]:
    """Until its port is open; ended with the block."""
    serving = asyncio.create_task(serve(start.load, SidecarSettings(port=0), start.metrics, start.said.append))
    try:
        await until(lambda: any(line.startswith("loading") for line in start.said))
        yield serving
    finally:
        start.may_load.set()
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError, Problem):
            await serving


async def health_of(address: str, service: str = "") -> str:
    async with grpc.aio.insecure_channel(address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service=service), timeout=SECONDS
        )
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


@pytest.mark.parametrize("turns", range(5))
async def test_a_signal_that_comes_as_loading_ends_is_not_lost(turns: int) -> None:
    signals = StopSignals()
    work: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    first = asyncio.create_task(signals.come_first(work))
    await asyncio.sleep(0)
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(turns):
        await asyncio.sleep(0)
    work.set_result(None)
    if not await first:
        await asyncio.wait_for(signals.wait(), SECONDS)


def test_told_to_stop_in_its_preflight_it_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dualtrace.cli", "serve", "fake", "--spec", "step=1,step_ms=60000", "--port", "0"]
    with Processes(tmp_path) as processes:
        sidecar = processes.start(command, name="sidecar")
        assert wait_until(lambda: "checking the model" in sidecar.stderr, SECONDS), sidecar.tell()
        sidecar.send(signal.SIGTERM)
        assert sidecar.wait(SECONDS) == 0


@pytest.mark.parametrize("service", ["", SERVICE_NAME])
async def test_health_says_not_serving_while_the_model_loads(service: str) -> None:
    start = Start()
    async with starting(start):
        assert await health_of(start.address, service) == "NOT_SERVING"


@pytest.mark.parametrize("service", ["", SERVICE_NAME])
async def test_health_says_serving_once_it_is_announced(service: str) -> None:
    start = Start()
    async with starting(start):
        start.may_load.set()
        await until(lambda: start.listens)
        assert await health_of(start.address, service) == "SERVING"


async def test_who_watches_health_hears_when_it_begins_to_serve() -> None:
    start = Start()
    async with starting(start), grpc.aio.insecure_channel(start.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watched = stub.Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        first = await watched.read()
        start.may_load.set()
        assert [first.status, (await watched.read()).status] == [2, 1]  # NOT_SERVING, SERVING
        watched.cancel()


async def test_a_question_that_comes_too_early_is_refused_with_how_far_it_is() -> None:
    start = Start()
    async with starting(start), Client(Connection(start.address)) as client:
        with pytest.raises(Unavailable, match="loading what takes its time") as caught:
            await client.next_token(QUESTION)
        assert caught.value.reason is Reason.NOT_READY


async def test_nothing_is_described_before_it_is_loaded() -> None:
    start = Start()
    async with starting(start), Client(Connection(start.address)) as client:
        with pytest.raises(Unavailable, match="not loaded yet") as caught:
            await client.describe()
        assert caught.value.reason is Reason.NOT_READY


async def test_a_question_while_it_warms_up_is_refused_with_how_far_it_is() -> None:
    engine = CompilingEngine()
    start = Start(engine=engine)
    async with starting(start), Client(Connection(start.address)) as client:
        start.may_load.set()
        await until(lambda: bool(engine.begun))
        with pytest.raises(Unavailable, match="warming up 1 of 2: forward 8"):
            await client.next_token(QUESTION)
        engine.may_compile.set()


async def test_the_question_is_answered_when_it_is_asked_again_later() -> None:
    start = Start()
    async with starting(start), Client(Connection(start.address)) as client:
        start.may_load.set()
        await until(lambda: start.listens)
        assert len((await client.next_token(QUESTION)).results) == 1


async def test_the_metrics_say_that_it_is_not_ready_while_it_loads() -> None:
    start = Start()
    async with starting(start):
        assert start.metrics.registry.get_sample_value("dualtrace_ready") == 0


async def test_a_model_that_cannot_be_loaded_ends_it_with_that_problem() -> None:
    start = Start(failure=InvalidArgument(Reason.MODEL_INVALID, "half a file"))
    async with starting(start) as serving:
        start.may_load.set()
        with pytest.raises(InvalidArgument, match="half a file"):
            await serving


SLOW_START = """
import asyncio, sys, time
from dualtrace.metrics import Metrics
from dualtrace.server import serve
from dualtrace.settings import SidecarSettings

def load(tell):
    tell("loading")
    time.sleep(600)

announce = lambda message: print(message, file=sys.stderr)
asyncio.run(serve(load, SidecarSettings(port=0), Metrics(), announce))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_sidecar_told_to_stop_while_it_loads_ends_at_once_and_well(
    processes: Processes, number: signal.Signals
) -> None:
    process = processes.start([sys.executable, "-c", SLOW_START], name="sidecar", ready=r"^loading")
    process.send(number)
    assert process.wait(5) == 0
    assert process.stderr.endswith("stopped while loading\n")


def test_a_taken_port_is_told_before_anything_is_loaded(processes: Processes) -> None:
    command = [sys.executable, "-m", "dualtrace.cli", "serve", "fake", "--port"]
    first = processes.start([*command, "0"], name="sidecar", ready=r"listening on \S+:(\d+)")
    assert first.ready is not None
    second = run_command([*command, first.ready[1]])
    assert (second.returncode, b"loading" in second.stderr) == (3, False)


def test_only_a_sidecar_that_is_ready_says_that_it_listens(processes: Processes) -> None:
    process = processes.start([sys.executable, "-c", SLOW_START], name="sidecar", ready=r"^loading")
    assert not wait_until(lambda: "listening on" in process.stdout + process.stderr, 0.3)
