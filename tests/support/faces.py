"""Both faces of a coordinator on free ports, operations that do as they are told, and a plain HTTP caller.

It knows how to reach a face from outside. It must not know how a face is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from coordinator.operations import Caller, CompareOutcome
from coordinator.serving import Faces
from coordinator.settings import CoordinatorSettings
from dualtrace.client import Connection
from dualtrace.compare.events import CompareEvent, FirstDivergence
from dualtrace.compare.report import report_to_text
from dualtrace.coordinator_client import CoordinatorClient
from dualtrace.library import Backend, ComparePlan, ComparisonSummary, Job, JobEvent, JobState, Page
from dualtrace.metrics import CoordinatorMetrics
from tests.support.stored import make_report

JOB = Job("job-1", "night", JobState.RUNNING, 1)


def outcome(**changed: Any) -> CompareOutcome:
    report = make_report(**changed)
    return CompareOutcome(report, report_to_text(report), "cmp-1")


@dataclass
class ScriptedOperations:
    """Operations that tell what a test wants, and remember who asked."""

    told: tuple[CompareEvent | CompareOutcome, ...] = (FirstDivergence(0, 3, -1.0, -2.0), outcome())
    failure: Exception | None = None  # raised by whatever is asked, streams after what they told
    endless: bool = False  # streams wait for ever after what they told
    text: str = "{}"
    callers: list[Caller] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)  # a stream was left before its end
    cancelled_jobs: list[str] = field(default_factory=list)

    async def compare(self, caller: Caller, plan: ComparePlan) -> AsyncGenerator[CompareEvent | CompareOutcome, None]:
        self.callers.append(caller)
        with self._noting_a_leaver():
            for event in self.told:
                yield event
            await self._end()

    async def watch_job(self, caller: Caller, job_id: str, after_sequence: int) -> AsyncGenerator[JobEvent, None]:
        self.callers.append(caller)
        with self._noting_a_leaver():
            yield JobEvent(after_sequence + 1, JOB, "started", 0, 0, "")
            await self._end()

    @contextlib.contextmanager
    def _noting_a_leaver(self) -> Iterator[None]:
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            self.left.set()
            raise

    async def _end(self) -> None:
        if self.endless:
            await asyncio.Event().wait()
        if self.failure is not None:
            raise self.failure

    async def cancel_job(self, caller: Caller, job_id: str) -> Job:
        self.cancelled_jobs.append(job_id)
        return JOB

    async def list_backends(self, caller: Caller) -> tuple[Backend, ...]:
        self.callers.append(caller)
        if self.failure is not None:
            raise self.failure
        return (Backend("torch", (), None),)

    async def list_comparisons(self, caller: Caller, **_asked: Any) -> Page[ComparisonSummary]:
        return Page((), "")

    async def get_run_text(self, caller: Caller, run_id: str) -> str:
        return self.text


class Slow(ScriptedOperations):
    """A comparison that tells a little now and then, for ever."""

    async def compare(self, caller: Any, plan: ComparePlan) -> Any:
        while True:
            yield FirstDivergence(0, 1, -1.0, -2.0)
            await asyncio.sleep(0.05)


@dataclass
class OpenFaces:
    """Where the faces listen."""

    faces: Faces
    grpc: str
    http: str
    metrics: CoordinatorMetrics


@contextlib.asynccontextmanager
async def open_faces(operations: Any, *, ready: bool = True, **settings: Any) -> AsyncIterator[OpenFaces]:
    metrics = CoordinatorMetrics()
    told = CoordinatorSettings(**{"port": 0, "http_port": 0, **settings})
    faces = Faces(operations, told, metrics)
    try:
        _, grpc, _, http = (await faces.start()).split()
        if ready:
            await faces.make_ready()
        yield OpenFaces(faces, grpc, http, metrics)
    finally:
        await faces.drain(0)


@contextlib.asynccontextmanager
async def client_of(operations: Any, *, token: str | None = None, **settings: Any) -> AsyncIterator[CoordinatorClient]:
    """A client over the gRPC face."""
    async with (
        open_faces(operations, **settings) as opened,
        CoordinatorClient(Connection(opened.grpc, token=token)) as client,
    ):
        yield client


# HTTP, by the standard library: nothing of what the face itself is made of


@dataclass
class Reply:
    status: int
    headers: dict[str, str]  # lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def frames(self) -> list[Any]:
        """The JSON messages of a stream; the last one is its end."""
        found, rest = [], self.body
        while rest:
            _flags, size = struct.unpack(">BI", rest[:5])
            found.append(json.loads(rest[5 : 5 + size]))
            rest = rest[5 + size :]
        return found


def enveloped(body: bytes) -> bytes:
    """A message as a stream carries it."""
    return struct.pack(">BI", 0, len(body)) + body


async def call_http(
    address: str, path: str, body: bytes | None = b"{}", *, method: str = "POST", **headers: str
) -> Reply:
    """One HTTP request; header names with underscores for dashes."""
    return await asyncio.to_thread(_call, address, path, body, method, headers)


def _call(address: str, path: str, body: bytes | None, method: str, headers: dict[str, str]) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection(address, timeout=20)
    try:
        connection.request(method, path, body, {"content-type": "application/json", **named})
        response = connection.getresponse()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()
