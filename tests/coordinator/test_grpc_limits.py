"""What one caller of the gRPC face can take from the others: a place for as long as they like, and no more of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coordinator import grpc_api
from dualtrace import listening
from dualtrace.client import Connection
from dualtrace.compare.events import FirstDivergence
from dualtrace.coordinator_client import CoordinatorClient
from dualtrace.library import ComparePlan, SideSpec
from dualtrace.problems import DeadlineExceeded, Exhausted, Problem
from dualtrace.wire.compare import compare_plan_to_pb
from tests.support.desk import rolling
from tests.support.faces import ScriptedOperations, Slow, open_faces, outcome

PLAN = ComparePlan(rolling(20), SideSpec("backend:torch"), SideSpec("backend:jax"))
COMPARE = "/dualtrace.v1.CompareService/Compare"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text("sesame\n")
    return file


async def watch_health(channel: grpc.aio.Channel, count: int, **named: Any) -> list[Any]:
    """So many watches that have been taken, or refused."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    watches = [stub.Watch(health_pb2.HealthCheckRequest(), **named) for _ in range(count)]
    for watch in watches:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await watch.read()
    return watches


# Health


@pytest.fixture
def few_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_api, "MAX_CONCURRENT_CALLS", 6)
    monkeypatch.setattr(listening, "MAX_STRANGERS_WATCHES", 3)


@pytest.mark.usefixtures("few_places")
async def test_health_watches_of_strangers_leave_places_for_callers(token_file: Path) -> None:
    async with (
        open_faces(ScriptedOperations(), token_file=token_file) as opened,
        grpc.aio.insecure_channel(opened.grpc) as channel,
        CoordinatorClient(Connection(opened.grpc, token="sesame")) as client,
    ):
        watches = await watch_health(channel, 12)
        found = await client.list_backends()
        assert (len(found), sum(watch.done() for watch in watches)) == (1, 9)


@pytest.mark.usefixtures("few_places")
async def test_a_health_watch_that_ends_gives_its_place_back(token_file: Path) -> None:
    async with (
        open_faces(ScriptedOperations(), token_file=token_file) as opened,
        grpc.aio.insecure_channel(opened.grpc) as channel,
    ):
        for watch in await watch_health(channel, 3):
            watch.cancel()
        await asyncio.sleep(0.1)
        (again,) = await watch_health(channel, 1)
        assert not again.done()


@pytest.mark.usefixtures("few_places")
async def test_a_health_watch_with_a_token_is_not_one_of_the_few(token_file: Path) -> None:
    async with (
        open_faces(ScriptedOperations(), token_file=token_file) as opened,
        grpc.aio.insecure_channel(opened.grpc) as channel,
    ):
        await watch_health(channel, 3)
        (own,) = await watch_health(channel, 1, metadata=(("authorization", "Bearer sesame"),))
        assert not own.done()


# Callers who do not read


async def stall(channel: grpc.aio.Channel) -> Any:
    """A comparison whose caller reads its first message and then no more."""
    compare: Any = channel.unary_stream(COMPARE)
    call = compare(compare_plan_to_pb(PLAN).SerializeToString())
    await call.read()
    return call


class Endless(ScriptedOperations):
    """A comparison that never runs out of things to tell."""

    async def compare(self, caller: Any, plan: ComparePlan) -> Any:
        with self._noting_a_leaver():
            while True:
                yield outcome(reproduce="x" * (1 << 20))


async def test_a_caller_who_does_not_read_is_left_when_the_time_of_a_call_is_over() -> None:
    operations = Endless()
    async with (
        open_faces(operations, call_seconds=0.3, max_call_seconds=0.3) as opened,
        grpc.aio.insecure_channel(opened.grpc) as channel,
    ):
        call = await stall(channel)
        await asyncio.wait_for(operations.left.wait(), 5)
        call.cancel()


async def test_a_caller_who_does_not_read_and_has_a_long_deadline_is_left_at_the_coordinator_s_own() -> None:
    operations = Endless()
    async with (
        open_faces(operations, call_seconds=0.2, max_call_seconds=0.4) as opened,
        grpc.aio.insecure_channel(opened.grpc) as channel,
    ):
        compare: Any = channel.unary_stream(COMPARE)
        call = compare(compare_plan_to_pb(PLAN).SerializeToString(), timeout=60)
        await call.read()
        await asyncio.wait_for(operations.left.wait(), 5)
        call.cancel()


async def test_a_caller_who_does_not_read_loses_the_place_of_a_call_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_api, "MAX_CONCURRENT_CALLS", 1)
    async with (
        open_faces(Endless(), call_seconds=0.3, max_call_seconds=0.3) as opened,
        grpc.aio.insecure_channel(opened.grpc) as channel,
        CoordinatorClient(Connection(opened.grpc)) as client,
    ):
        call = await stall(channel)
        end = time.monotonic() + 8
        while True:
            try:
                await client.list_backends()
                break
            except Exhausted:
                assert time.monotonic() < end, "the place is still taken"
                await asyncio.sleep(0.05)
        call.cancel()


async def test_a_caller_who_reads_is_told_that_the_time_of_a_call_is_over() -> None:
    async with (
        open_faces(Slow(), call_seconds=0.3, max_call_seconds=0.3) as opened,
        CoordinatorClient(Connection(opened.grpc)) as client,
    ):
        with pytest.raises(Problem) as caught:
            async for _ in client.compare(PLAN):
                pass
        assert isinstance(caught.value, DeadlineExceeded)


async def test_what_is_told_in_time_is_not_cut() -> None:
    events = tuple(FirstDivergence(0, one, -1.0, -2.0) for one in range(50))
    operations = ScriptedOperations(told=(*events, outcome()))
    async with (
        open_faces(operations, call_seconds=5.0, max_call_seconds=5.0) as opened,
        CoordinatorClient(Connection(opened.grpc)) as client,
    ):
        assert len([event async for event in client.compare(PLAN)]) == 51
