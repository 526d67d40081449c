"""One replica of a backend, watched: does it serve, and what does it say of itself?

It knows the health service and Describe. It must not know names of backends, balancing or who asks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dualtrace.card import Card
from dualtrace.client import Client, Connection, open_channel
from dualtrace.library import Replica
from dualtrace.problems import Problem, Reason, Unavailable
from dualtrace.sidecar import SERVICE_NAME

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.5
DESCRIBE_SECONDS = 10.0
ROUND_SECONDS = 30.0
"""A health watch is opened anew so often, with a Describe: a machine that vanished says nothing, for ever."""
FIRST_WORD_SECONDS = 10.0

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
                if not await self._look(health, client):
                    await asyncio.sleep(RETRY_SECONDS)

    async def _look(self, health: Any, client: Client) -> bool:
        """One round, however it ends; whether the next one may follow at once."""
        try:
            return await self._watch_or_poll(health, client)
        except Problem as problem:
            self._say(False, problem.detail.message)
        except grpc.aio.AioRpcError as error:
            self._say(False, f"{error.code().name}: {error.details()}")
        except Exception as error:
            # A watch that ended here would leave the replica as it was last seen, for ever.
            log.exception("the watch of %s failed", self.replica.address)
            self.card = None
            self._say(False, f"it told what cannot be read ({type(error).__name__}); the coordinator's log has it")
        return False

    async def _watch_or_poll(self, health: Any, client: Client) -> bool:
        try:
            return await self._watch(health, client)
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.UNIMPLEMENTED:
                raise
        # Where there is no health service, whoever can describe itself serves.
        await self._describe(client)
        await asyncio.sleep(ROUND_SECONDS)
        return True

    async def _watch(self, health: Any, client: Client) -> bool:
        """One round of the health service's own stream; whether it went by without the stream's end."""
        request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
        token = self._connection.token  # not needed, but without it watches are few
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        call = health.Watch(request, timeout=ROUND_SECONDS, metadata=metadata)
        heard = False
        try:
            while (response := await self._read(call, heard)) is not grpc.aio.EOF:
                heard = True
                await self._hear(response, client)
        except grpc.aio.AioRpcError as error:
            if heard and error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                return True  # the round is over, nothing changed
            raise
        finally:
            call.cancel()
        self._say(False, "the health stream ended")
        return False

    async def _read(self, call: Any, heard: bool) -> Any:
        """The next word. The first is due at once: a process that is frozen still takes calls."""
        try:
            async with asyncio.timeout(None if heard else FIRST_WORD_SECONDS):
                return await call.read()
        except TimeoutError:
            message = f"it says nothing: no word of its health came in {FIRST_WORD_SECONDS:g} s"
            raise Unavailable(Reason.UNREACHABLE, message) from None

    async def _hear(self, response: Any, client: Client) -> None:
        if response.status == SERVING:
            await self._describe(client)
        else:
            name = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
            self._say(False, f"health says {name}: it is starting or draining")

    async def _describe(self, client: Client) -> None:
        self.card = await client.describe(deadline=time.monotonic() + DESCRIBE_SECONDS)
        self._say(True, "")

    def _say(self, serving: bool, problem: str) -> None:
        new = Replica(self.replica.address, serving, problem)
        changed, self.replica = new != self.replica, new
        if changed or serving:  # the card may be another one
            self._tell()
