"""The typed client of a sidecar: asks over gRPC, answers in the words of `questions.answers`.

`Client` is async and is a `Scorer` itself; `BlockingClient` is the same for scripts and notebooks. It knows the wire.
It must not know how a sidecar works inside.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from grpc_status import rpc_status

from dualtrace.artifacts import digest_of
from dualtrace.card import Card
from dualtrace.model_views import AsyncView, BlockingView, Model
from dualtrace.problems import Detail, Internal, InvalidArgument, NotFound, Problem, Reason, rebuild
from dualtrace.questions.answers import (
    AnswerEvent,
    AnswerSummary,
    ArtifactKept,
    MaskExplanation,
    NextTokenAnswer,
    PreflightAnswer,
    ScoreAnswer,
    StreamEvent,
    TokenizeAnswer,
)
from dualtrace.questions.asked import (
    ArtifactQuestion,
    ExplainMaskQuestion,
    LogprobQuestion,
    MaskedForwardQuestion,
    NextTokenQuestion,
    PreflightQuestion,
    Question,
    RollingQuestion,
    ScoreQuestion,
    StreamQuestion,
    TokenizeQuestion,
)
from dualtrace.scorer import ask_one
from dualtrace.tape import Tape, TapedChannel
from dualtrace.v1 import scoring_pb2 as pb
from dualtrace.v1 import scoring_pb2_grpc
from dualtrace.wire import answers, events, questions
from dualtrace.wire.artifact import artifact_to_pb
from dualtrace.wire.model import card_from_pb
from dualtrace.wire.problem import from_status

T = TypeVar("T")

REASON_OF_CODE = {
    grpc.StatusCode.CANCELLED: Reason.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.DEADLINE,
    grpc.StatusCode.UNAVAILABLE: Reason.UNREACHABLE,
    grpc.StatusCode.UNIMPLEMENTED: Reason.NOT_IMPLEMENTED,
    grpc.StatusCode.UNAUTHENTICATED: Reason.BAD_TOKEN,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Reason.TOO_MANY,
}
"""For failures that carry no Problem: they come from gRPC itself, a proxy or another server."""


@dataclass(frozen=True)
class Connection:
    """Where a sidecar is and how to be let in."""

    address: str  # host:port, or any name that gRPC resolves
    tls: bool = False
    ca_file: Path | None = None  # None: the system's authorities
    certificate_file: Path | None = None  # our own, for mTLS
    key_file: Path | None = None
    token: str | None = None
    options: tuple[tuple[str, str | int], ...] = ()  # of the gRPC channel: balancing, retries, certificate name

    def __repr__(self) -> str:
        return f"Connection({self.address!r}, tls={self.tls}, token={'***' if self.token else None})"


class Client:
    """One sidecar, asked asynchronously. A `Scorer`."""

    def __init__(self, connection: Connection, channel: Any = None) -> None:
        """`channel`: one that somebody else opened and closes; None opens one."""
        self._connection = connection
        self._metadata = (("authorization", f"Bearer {connection.token}"),) if connection.token else ()
        self._is_owner = channel is None
        self._channel: Any = open_channel(connection) if channel is None else channel
        self._stub = scoring_pb2_grpc.ScoringServiceStub(self._channel)
        self._model = Model(lambda door, view: AsyncView(self, door, view))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._is_owner:
            await self._channel.close()

    def taped(self, tape: Tape) -> Client:
        """The same sidecar over the same channel, whose questions also go onto the tape. Close the original."""
        return Client(self._connection, TapedChannel(self._channel, tape))

    def model(self) -> Model[AsyncView]:
        """The model by its views: `async with client.model().as_finetuned("x") as tuned:`; one view at a time."""
        return self._model

    async def describe(self, *, deadline: float | None = None) -> Card:
        response = await self._call(self._stub.Describe, pb.DescribeRequest(), deadline)
        return card_from_pb(response.card)

    async def tokenize(self, question: TokenizeQuestion, *, deadline: float | None = None) -> TokenizeAnswer:
        return await ask_one(self, question, deadline=deadline)

    async def score(self, question: ScoreQuestion, *, deadline: float | None = None) -> ScoreAnswer:
        return await ask_one(self, question, deadline=deadline)

    async def next_token(self, question: NextTokenQuestion, *, deadline: float | None = None) -> NextTokenAnswer:
        return await ask_one(self, question, deadline=deadline)

    async def preflight(
        self, question: PreflightQuestion | None = None, *, deadline: float | None = None
    ) -> PreflightAnswer:
        return await ask_one(self, question or PreflightQuestion(), deadline=deadline)

    def logprob(self, question: LogprobQuestion, *, deadline: float | None = None) -> AsyncIterator[StreamEvent]:
        return self._stream(question, deadline)

    def rolling(self, question: RollingQuestion, *, deadline: float | None = None) -> AsyncIterator[StreamEvent]:
        return self._stream(question, deadline)

    def masked_forward(
        self, question: MaskedForwardQuestion, *, deadline: float | None = None
    ) -> AsyncIterator[StreamEvent]:
        return self._stream(question, deadline)

    async def explain_mask(self, question: ExplainMaskQuestion, *, deadline: float | None = None) -> MaskExplanation:
        return await ask_one(self, question, deadline=deadline)

    async def put_artifact(self, data: bytes, *, deadline: float | None = None) -> str:
        """Send an NPY array ahead; returns the digest that masks may name it by."""
        kept = await ask_one(self, ArtifactQuestion(data, digest_of(data)), deadline=deadline)
        return kept.digest

    def ask(self, question: Question, *, deadline: float | None = None) -> AsyncIterator[AnswerEvent]:
        if isinstance(question, StreamQuestion):
            return self._stream(question, deadline)
        return self._ask_unary(question, deadline)

    async def _ask_unary(
        self,
        question: NextTokenQuestion
        | ScoreQuestion
        | TokenizeQuestion
        | PreflightQuestion
        | ExplainMaskQuestion
        | ArtifactQuestion,
        deadline: float | None,
    ) -> AsyncIterator[AnswerEvent]:
        match question:
            case NextTokenQuestion():
                request = questions.next_token_to_pb(question)
                yield answers.next_token_from_pb(await self._call(self._stub.NextTokenDist, request, deadline))
            case ScoreQuestion():
                yield answers.score_from_pb(
                    await self._call(self._stub.Score, questions.score_to_pb(question), deadline)
                )
            case TokenizeQuestion():
                asked = questions.tokenize_to_pb(question)
                yield answers.tokenize_from_pb(await self._call(self._stub.Tokenize, asked, deadline))
            case PreflightQuestion():
                checked = questions.preflight_to_pb(question)
                yield answers.preflight_from_pb(await self._call(self._stub.Preflight, checked, deadline))
            case ExplainMaskQuestion():
                explained = questions.explain_to_pb(question)
                yield answers.explanation_from_pb(await self._call(self._stub.ExplainMask, explained, deadline))
            case ArtifactQuestion():
                kept = await self._call(self._stub.PutArtifact, artifact_to_pb(question), deadline)
                yield ArtifactKept(kept.digest, kept.size_bytes)

    async def _call(self, method: Any, request: Any, deadline: float | None) -> Any:
        try:
            return await method(request, timeout=seconds_left(deadline), metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise problem_of(error, self._connection.address) from None

    async def _stream(self, question: StreamQuestion, deadline: float | None) -> AsyncIterator[StreamEvent]:
        """Events in order; a stream that ends without its Summary, or skips a number, is an error."""
        method, request = self._stream_method(question)
        call: Any = method(request, timeout=seconds_left(deadline), metadata=self._metadata)
        expected = 0
        complete = False
        try:
            async for response in call:
                if response.event.sequence != expected:
                    message = f"event {response.event.sequence} came where {expected} was due; the answer has a hole"
                    raise Internal(Reason.INCOMPLETE_STREAM, message)
                expected += 1
                event = events.event_from_pb(response.event)
                complete = complete or isinstance(event, AnswerSummary)
                if event is not None:
                    yield event
        except grpc.aio.AioRpcError as error:
            raise problem_of(error, self._connection.address) from None
        finally:
            call.cancel()  # harmless when it has ended
        if not complete:
            raise Internal(Reason.INCOMPLETE_STREAM, "the stream ended without its Summary; the answer is incomplete")

    def _stream_method(self, question: StreamQuestion) -> tuple[Any, Any]:
        match question:
            case LogprobQuestion():
                return self._stub.Logprob, questions.logprob_to_pb(question)
            case RollingQuestion():
                return self._stub.RollingLogprob, questions.rolling_to_pb(question)
            case MaskedForwardQuestion():
                return self._stub.MaskedForward, questions.masked_forward_to_pb(question)


def problem_of(error: grpc.aio.AioRpcError, address: str, who: str = "a sidecar") -> Problem:
    """The Problem that a failed call carries, or what gRPC itself says of it. `who` is expected at the address."""
    status = rpc_status.from_call(error)
    known = from_status(status) if status is not None else None
    if known is not None:
        return known
    code = error.code()
    reason = REASON_OF_CODE.get(code, Reason.BUG)
    message = f"{address}: {code.name}: {error.details()}"
    if code == grpc.StatusCode.UNAVAILABLE:
        message = f"cannot reach {address}: {error.details()}; is {who} running there?"
    return rebuild(int(code.value[0]), Detail(reason, message))


def open_channel(connection: Connection) -> grpc.aio.Channel:
    """The channel to a sidecar, for whoever calls another service of it (health). Nothing is contacted yet."""
    names = ("ca_file", "key_file", "certificate_file")  # in the order that gRPC takes them
    files = {name: getattr(connection, name) for name in names}
    if not connection.tls:
        for name, file in files.items():
            if file is not None:
                raise InvalidArgument(Reason.CONFLICT, f"{name} is for TLS; use grpcs:// as well", field=name)
        return grpc.aio.insecure_channel(connection.address, options=connection.options)
    if (files["key_file"] is None) != (files["certificate_file"] is None):
        missing = "key_file" if files["key_file"] is None else "certificate_file"
        message = f"a certificate of our own and its key go together; {missing} is not set"
        raise InvalidArgument(Reason.CONFLICT, message, field=missing)
    parts = [None if file is None else _read_pem(file, name) for name, file in files.items()]
    credentials = grpc.ssl_channel_credentials(*parts)
    return grpc.aio.secure_channel(connection.address, credentials, options=connection.options)


def _read_pem(file: Path, field: str) -> bytes:
    """gRPC itself only logs what is wrong with a certificate, and then cannot connect for no stated reason."""
    try:
        content = file.read_bytes()
    except OSError as error:
        kind = NotFound if isinstance(error, FileNotFoundError) else InvalidArgument
        message = f"cannot read {file}: {error.strerror or error}"
        raise kind(Reason.NOT_FOUND, message, field=field) from None
    wanted = b"PRIVATE KEY-----" if field == "key_file" else b"-----BEGIN CERTIFICATE-----"
    if wanted not in content:
        what = "private key" if field == "key_file" else "certificate"
        message = f"{file} holds no {what} in PEM form (a line with -----BEGIN ...); name another file"
        raise InvalidArgument(Reason.MALFORMED, message, field=field)
    return content


def seconds_left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.001, deadline - time.monotonic())


class BlockingClient:
    """`Client` for code without an event loop: the same methods, waiting. One thread runs the loop."""

    def __init__(self, connection: Connection) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dualtrace-client", daemon=True)
        self._thread.start()
        self._client = self._run(_make(connection))
        self._model = Model(lambda door, view: BlockingView(self, door, view))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def model(self) -> Model[BlockingView]:
        """The model by its views: `with client.model().as_finetuned("x") as tuned:`; one view at a time."""
        return self._model

    def describe(self, *, timeout: float | None = None) -> Card:
        return self._run(self._client.describe(deadline=_deadline(timeout)))

    def tokenize(self, question: TokenizeQuestion, *, timeout: float | None = None) -> TokenizeAnswer:
        return self._run(self._client.tokenize(question, deadline=_deadline(timeout)))

    def score(self, question: ScoreQuestion, *, timeout: float | None = None) -> ScoreAnswer:
        return self._run(self._client.score(question, deadline=_deadline(timeout)))

    def next_token(self, question: NextTokenQuestion, *, timeout: float | None = None) -> NextTokenAnswer:
        return self._run(self._client.next_token(question, deadline=_deadline(timeout)))

    def preflight(self, question: PreflightQuestion | None = None, *, timeout: float | None = None) -> PreflightAnswer:
        return self._run(self._client.preflight(question, deadline=_deadline(timeout)))

    def logprob(self, question: LogprobQuestion, *, timeout: float | None = None) -> Iterator[StreamEvent]:
        return self._iterate(lambda: self._client.logprob(question, deadline=_deadline(timeout)))

    def rolling(self, question: RollingQuestion, *, timeout: float | None = None) -> Iterator[StreamEvent]:
        return self._iterate(lambda: self._client.rolling(question, deadline=_deadline(timeout)))

    def masked_forward(self, question: MaskedForwardQuestion, *, timeout: float | None = None) -> Iterator[StreamEvent]:
        return self._iterate(lambda: self._client.masked_forward(question, deadline=_deadline(timeout)))

    def explain_mask(self, question: ExplainMaskQuestion, *, timeout: float | None = None) -> MaskExplanation:
        return self._run(self._client.explain_mask(question, deadline=_deadline(timeout)))

    def put_artifact(self, data: bytes, *, timeout: float | None = None) -> str:
        return self._run(self._client.put_artifact(data, deadline=_deadline(timeout)))

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _iterate(self, start: Callable[[], AsyncIterator[StreamEvent]]) -> Iterator[StreamEvent]:
        events: Any = start()
        try:
            while True:
                event = self._run(_next(events))
                if event is None:
                    return
                yield event
        finally:
            self._run(events.aclose())


async def _next(events: AsyncIterator[StreamEvent]) -> StreamEvent | None:
    return await anext(events, None)


async def _make(connection: Connection) -> Client:
    return Client(connection)


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout
