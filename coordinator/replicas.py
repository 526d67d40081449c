"""One replica of a backend, watched: does it serve, and what does it say of itself?

It knows the health service and Describe. It must not know names of backends, balancing or who asks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dualtrace.card import Card
from dualtrace.client import Client, Connection, open_channel
from dualtrace.library import Replica
from dualtrace.problems import Problem
from dualtrace.sidecar import SERVICE_NAME

RETRY_SECONDS = 0.5
DESCRIBE_SECONDS = 10.0
ROUND_SECONDS = 30.0
"""A health watch is opened anew so often, with a Describe: a machine that vanished says nothing, for ever."""

SERVING = health_pb2.HealthCheckResponse.SERVING


class ReplicaWatch:
    """Watches from `start` to `close`. `tell` is called after every change."""

    def __init__(self, address: str, connection: Connection, tell: Callable[[], None]) -> None:
        self._connection = connection
        self._tell = tell
        self._task: asyncio.Task[None] | None = None
        self.replica = Replica(address, serving=False, problem="")
        self.card: Card | None = None

    @property
    def is_settled(self) -> bool:
        """Whether anything is known yet, good or bad."""
        return self.replica.serving or bool(self.replica.problem)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"watch {self.replica.address}")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        async with open_channel(self._connection) as channel:
            client = Client(self._connection, channel)
            health: Any = health_pb2_grpc.HealthStub(channel)
            while True:
                try:
                    await self._watch(health, client)
                except Problem as problem:
                    self._say(False, problem.detail.message)
                except grpc.aio.AioRpcError as error:
                    if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                        await self._poll(client)
                    elif error.code() == grpc.StatusCode.DEADLINE_EXCEEDED and self.replica.serving:
                        continue  # a round is over, nothing changed
                    else:
                        self._say(False, f"{error.code().name}: {error.details()}")
                await asyncio.sleep(RETRY_SECONDS)

    async def _watch(self, health: Any, client: Client) -> None:
        """One round of the health service's own stream."""
        call = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=ROUND_SECONDS)
        try:
            async for response in call:
                if response.status == SERVING:
                    await self._describe(client)
                else:
                    name = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
                    self._say(False, f"health says {name}: it is starting or draining")
        finally:
            call.cancel()
        self._say(False, "the health stream ended")

    async def _poll(self, client: Client) -> None:
        """Where there is no health service, whoever can describe itself serves."""
        await self._describe(client)
        await asyncio.sleep(ROUND_SECONDS)

    async def _describe(self, client: Client) -> None:
        self.card = await client.describe(deadline=time.monotonic() + DESCRIBE_SECONDS)
        self._say(True, "")

    def _say(self, serving: bool, problem: str) -> None:
        new = Replica(self.replica.address, serving, problem)
        changed, self.replica = new != self.replica, new
        if changed or serving:  # the card may be another one
            self._tell()
