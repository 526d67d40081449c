"""A watched replica: one that freezes, vanishes or tells nonsense is seen, and no watch ends before it is closed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any
from unittest import mock

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coordinator import addresses, backends, replicas
from coordinator.backends import BackendBook, NamedBackend
from coordinator.replicas import ReplicaWatch
from coordinator.settings import BackendSettings
from dualtrace.client import Client, Connection
from dualtrace.problems import Unavailable
from dualtrace.server import SidecarServer
from tests.support.desk import fake_side, wait_until
from tests.support.scorers import served


@contextlib.asynccontextmanager
async def watched(address: str) -> AsyncIterator[ReplicaWatch]:
    watch = ReplicaWatch(address, Connection(address), lambda: None)
    watch.start()
    try:
        yield watch
    finally:
        await watch.close()


@pytest.fixture
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "ROUND_SECONDS", 0.3)
    monkeypatch.setattr(replicas, "FIRST_WORD_SECONDS", 0.3)
    monkeypatch.setattr(replicas, "RETRY_SECONDS", 0.02)


class FreezingHealth(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # it has no types
    """Says SERVING, until it is frozen: then it takes calls and says nothing, as a stopped process does."""

    def __init__(self) -> None:
        self.is_frozen = False
        self.rounds = 0

    async def Watch(self, request: Any, context: Any) -> None:
        self.rounds += 1
        if not self.is_frozen:
            await context.write(health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING))
        await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def freezing() -> AsyncIterator[tuple[str, FreezingHealth]]:
    health = FreezingHealth()
    with mock.patch.object(health_pb2_grpc, "add_HealthServicer_to_server", _registering(health)):
        async with served(fake_side()) as (address, _):
            yield address, health


def _registering(health: FreezingHealth) -> Callable[[Any, Any], None]:
    register = health_pb2_grpc.add_HealthServicer_to_server
    return lambda _own, server: register(health, server)


@pytest.mark.usefixtures("short_rounds")
async def test_a_replica_that_freezes_no_longer_serves() -> None:
    async with freezing() as (address, health), watched(address) as watch:
        await wait_until(lambda: watch.replica.serving)
        health.is_frozen = True
        await wait_until(lambda: not watch.replica.serving)
        assert "says nothing" in watch.replica.problem


@pytest.mark.usefixtures("short_rounds")
async def test_a_replica_that_thaws_serves_again() -> None:
    async with freezing() as (address, health), watched(address) as watch:
        health.is_frozen = True
        await wait_until(lambda: watch.replica.problem)
        health.is_frozen = False
        await wait_until(lambda: watch.replica.serving)


@pytest.mark.usefixtures("short_rounds")
async def test_a_replica_that_answers_every_round_never_stops_serving() -> None:
    async with freezing() as (address, health):
        seen: list[bool] = []
        watch = ReplicaWatch(address, Connection(address), lambda: seen.append(watch.replica.serving))
        watch.start()
        await wait_until(lambda: health.rounds > 3)
        await watch.close()
        assert set(seen) == {True}


def option(options: backends.Options, name: str) -> object:
    return dict(options)[name]


@pytest.mark.parametrize("options", [backends.RECONNECT, backends.BALANCED])
def test_a_machine_that_vanishes_in_the_middle_of_a_call_is_noticed_by_pings(options: backends.Options) -> None:
    assert (option(options, "grpc.keepalive_time_ms"), option(options, "grpc.http2.max_pings_without_data")) == (
        330_000,
        0,
    )


def test_no_server_is_pinged_more_often_than_grpc_lets_strangers() -> None:
    """It would drop whoever pings more often than every five minutes, and every call of theirs."""
    assert dict(backends.BALANCED)["grpc.keepalive_time_ms"] > 300_000  # type: ignore[operator]


async def test_a_sidecar_takes_the_pings_of_clients_that_are_more_anxious() -> None:
    with mock.patch.object(grpc.aio, "server", wraps=grpc.aio.server) as made:
        async with served(fake_side()):
            pass
    told = dict(made.call_args.kwargs["options"])
    assert told["grpc.http2.min_ping_interval_without_data_ms"] <= 20_000


# Watches that go on


@pytest.mark.usefixtures("short_rounds")
async def test_a_description_that_nobody_foresaw_is_a_problem_and_not_the_end_of_the_watch() -> None:
    async with served(fake_side()) as (address, _):
        with mock.patch.object(Client, "describe", side_effect=ValueError("bad card")):
            async with watched(address) as watch:
                await wait_until(lambda: watch.is_settled)
                assert "ValueError" in watch.replica.problem


@pytest.mark.usefixtures("short_rounds")
async def test_a_replica_that_told_nonsense_once_serves_when_it_tells_sense() -> None:
    async with served(fake_side()) as (address, _):
        with mock.patch.object(Client, "describe", side_effect=ValueError("bad card")):
            watch = ReplicaWatch(address, Connection(address), lambda: None)
            watch.start()
            await wait_until(lambda: watch.is_settled)
        await wait_until(lambda: watch.replica.serving)
        await watch.close()


@contextlib.asynccontextmanager
async def without_health() -> AsyncIterator[tuple[str, SidecarServer]]:
    with mock.patch.object(health_pb2_grpc, "add_HealthServicer_to_server"):
        async with served(fake_side()) as (address, server):
            yield address, server


@pytest.mark.usefixtures("short_rounds")
async def test_a_replica_without_a_health_service_serves_when_it_describes_itself() -> None:
    async with without_health() as (address, _), watched(address) as watch:
        await wait_until(lambda: watch.replica.serving)


@pytest.mark.usefixtures("short_rounds")
async def test_a_replica_without_a_health_service_that_goes_no_longer_serves() -> None:
    async with without_health() as (address, server), watched(address) as watch:
        await wait_until(lambda: watch.replica.serving)
        await server.drain(0)
        await wait_until(lambda: not watch.replica.serving and watch.replica.problem)


# Names


async def test_a_name_that_cannot_be_written_as_one_is_a_problem_of_that_name() -> None:
    with pytest.raises(Unavailable, match="looked up"):
        await addresses.look_up("a..b:1")


async def test_a_name_service_that_does_not_answer_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(addresses, "LOOK_UP_SECONDS", 0.05)

    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_given, **_named: answered.wait(60))
    try:
        with pytest.raises(Unavailable, match=r"within 0.05 s"):
            await addresses.look_up("somewhere:1")
    finally:
        answered.set()


async def test_all_names_are_looked_up_at_once() -> None:
    together = asyncio.Barrier(2)

    async def look_up(_address: str) -> tuple[tuple[str, int], ...]:
        async with asyncio.timeout(2):
            await together.wait()
        return (("127.0.0.1", 1),)

    book = BackendBook([BackendSettings(name, ("localhost:1",)) for name in ("one", "other")])
    with mock.patch.object(backends, "look_up", look_up):
        await book.start()
    await book.close()


class Answers:
    """A name that means another address each time."""

    def __init__(self) -> None:
        self.count = 0

    async def __call__(self, _address: str) -> tuple[tuple[str, int], ...]:
        self.count += 1
        return ((f"127.0.0.{1 + self.count % 7}", 1),)


async def test_a_channel_that_was_replaced_is_let_go_when_no_call_can_be_on_it_any_more() -> None:
    with mock.patch.object(backends, "look_up", Answers()):
        backend = NamedBackend(BackendSettings("x", ("hosta:1", "hostb:1")), lambda _: None, longest_call_seconds=0.05)
        await backend.start()
        channels = []
        for _ in range(3):
            assert backend._client is not None
            channels.append(weakref.ref(backend._client._channel))
            await backend._look_up()
        await wait_until(lambda: not backend._retired)
        gc.collect()
        await backend.close()
    assert [channel() for channel in channels] == [None] * 3


async def test_a_call_on_a_channel_that_was_replaced_may_end() -> None:
    async with served(fake_side()) as (address, _):
        port = int(address.rpartition(":")[2])
        backend = NamedBackend(BackendSettings("x", (address, "hostb:1")), lambda _: None, longest_call_seconds=60)

        async def look_up(asked: str) -> tuple[tuple[str, int], ...]:
            return (("127.0.0.1", port),) if asked == address else ((f"127.0.0.{next(numbers)}", 1),)

        numbers = iter(range(2, 9))
        with mock.patch.object(backends, "look_up", look_up):
            await backend.start()
            held = backend._client
            await backend._look_up()
            assert held is not None
            assert held is not backend._client
            card = await held.describe()
            await backend.close()
        assert card.provenance.synthetic


@pytest.mark.usefixtures("short_rounds")
async def test_a_look_up_that_fails_in_a_way_nobody_foresaw_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "LOOK_UP_SECONDS", 0.02)
    asked = 0

    async def look_up(_address: str) -> tuple[tuple[str, int], ...]:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise RuntimeError("nobody foresaw it")
        return (("127.0.0.1", 1),)

    with mock.patch.object(backends, "look_up", look_up):
        backend = NamedBackend(BackendSettings("x", ("dns:///somewhere:1",)), lambda _: None)
        await backend.start()
        await wait_until(lambda: asked > 3)
        await backend.close()
