"""One call, the same through either face: is it let in, who calls and until when, what it gave, how it failed.

It knows callers, readiness, metrics and problems. It must not know gRPC or HTTP: a face hands in what the caller
sent, and tells the Problem in its own way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from coordinator.methods import Method
from coordinator.operations import Caller, Operations
from coordinator.settings import CoordinatorSettings
from dualtrace.listening import Tokens
from dualtrace.metrics import ProcessMetrics
from dualtrace.problems import DeadlineExceeded, Problem, Reason, Unavailable
from dualtrace.sidecar import Readiness, as_problem

LATE_SECONDS = 0.5
"""What is asked keeps the deadline itself and knows more of why; whoever does not is left so much later."""


@dataclass(frozen=True)
class Credentials:
    """What a caller sent beside the request."""

    authorization: tuple[str | bytes, ...]  # the header's values
    remaining_seconds: float | None  # of the caller's deadline; None: it named none


class Calls:
    """Answers methods for both faces. Only Problems, and the cancelling of a caller that left, come out of it."""

    def __init__(
        self,
        operations: Operations,
        tokens: Tokens,
        readiness: Readiness,
        metrics: ProcessMetrics,
        settings: CoordinatorSettings,
    ) -> None:
        self._operations = operations
        self._settings = settings
        self._tokens = tokens
        self._metrics = metrics
        self._released = asyncio.Event()
        self.readiness = readiness

    def release_watchers(self) -> None:
        """End the streams that only wait for something to happen: nobody is to wait for them."""
        self._released.set()

    def admit(self, credentials: Credentials) -> Caller:
        """The one place where a call becomes a Caller."""
        identity = self._tokens.identify(credentials.authorization)
        remaining = credentials.remaining_seconds
        if remaining is None:
            return Caller(identity, None)
        if remaining <= 0:
            raise DeadlineExceeded(Reason.DEADLINE, "the deadline had passed when the call arrived")
        return Caller(identity, time.monotonic() + remaining)

    def longest_seconds(self, method: Method, remaining: float | None) -> float:
        """How long a call may last, the reading of its answer included. `remaining`: of the caller's own deadline."""
        longest = self._settings.max_call_seconds
        if remaining is None:
            return longest if method.waits else self._settings.call_seconds
        return min(remaining, longest)

    @asynccontextmanager
    async def within(self, method: Method, credentials: Credentials) -> AsyncIterator[None]:
        """Bounds a stream, the writing of it included: a caller who does not read must not hold a place for ever."""
        seconds = self.longest_seconds(method, credentials.remaining_seconds)
        try:
            async with asyncio.timeout(seconds + LATE_SECONDS) as bound:
                yield
        except TimeoutError:
            if not bound.expired():
                raise
            message = f"the answer was not read within {seconds:.3g} s; read faster, ask less, or allow more time"
            raise DeadlineExceeded(Reason.DEADLINE, message) from None

    async def answer(self, method: Method, request: Any, credentials: Credentials) -> Message:
        assert method.unary is not None
        with self._told(method):
            return await method.unary(self._operations, self._enter(credentials), request)

    async def stream(self, method: Method, request: Any, credentials: Credentials) -> AsyncGenerator[Message, None]:
        """Leaving the iterator early leaves the operation: a comparison is cancelled, a watched job goes on."""
        assert method.streamed is not None
        with self._told(method):
            responses = method.streamed(self._operations, self._enter(credentials), request)
            if method.waits:
                responses = _until(responses, self._released)
            async with aclosing(responses):
                async for response in responses:
                    yield response

    def _enter(self, credentials: Credentials) -> Caller:
        caller = self.admit(credentials)
        if self.readiness.refusal is not None:
            raise self.readiness.refusal
        return caller

    @contextmanager
    def _told(self, method: Method) -> Iterator[None]:
        """Count the call; let every failure out as a Problem."""
        begun = time.monotonic()
        code = "OK"
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            code = "CANCELLED"
            raise
        except Exception as error:  # noqa: BLE001 - the one place where failures become problems
            problem = as_problem(error)
            code = problem.code_name
            raise _bare(problem) from None
        finally:
            self._metrics.calls.labels(method=method.name, code=code).inc()
            self._metrics.call_seconds.labels(method=method.name).observe(time.monotonic() - begun)


async def _until(responses: AsyncGenerator[Message, None], released: asyncio.Event) -> AsyncGenerator[Message, None]:
    """The responses until the event is set; what had come by then is told."""
    stop = asyncio.ensure_future(released.wait())
    try:
        while True:
            upcoming = asyncio.ensure_future(anext(responses, None))
            try:
                await asyncio.wait({upcoming, stop}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not upcoming.done():
                    upcoming.cancel()
                    await asyncio.wait({upcoming})
            if upcoming.cancelled():
                message = "the coordinator is shutting down, the job will go on; watch it again after the last number"
                raise Unavailable(Reason.DRAINING, message)
            response = upcoming.result()
            if response is None:
                return
            yield response
    finally:
        stop.cancel()
        await responses.aclose()


def _bare(problem: Problem) -> Problem:
    """A readiness' refusal is one object for many calls: without this its traceback would grow with each."""
    return problem.with_traceback(None)
