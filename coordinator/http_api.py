"""The HTTP face: both services by the Connect protocol for curl and browsers, and /metrics, /healthz, /readyz.

The one module that knows `connectrpc`, and with `connections` the one that knows uvicorn. Endpoints are made by hand
from the very messages of the gRPC face (docs/decisions/0007). It must not know what a method does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast

import uvicorn
from connectrpc.code import Code
from connectrpc.codec import Codec
from connectrpc.errors import ConnectError, ErrorDetail
from connectrpc.method import IdempotencyLevel, MethodInfo, StreamType
from connectrpc.request import RequestContext
from connectrpc.server import ConnectASGIApplication, Endpoint
from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from protobuf.wkt import Any as PackedDetail

from coordinator.calls import LATE_SECONDS, Calls, Credentials
from coordinator.connections import CONNECTION, TimedConnection
from coordinator.methods import METHODS, Method
from coordinator.origins import Names
from dualtrace.listening import TlsSettings, join_address
from dualtrace.problems import Exhausted, InvalidArgument, Problem, Reason, Unavailable
from dualtrace.wire.problem import to_status

MAX_BODY_BYTES = 4 << 20
"""Of one request, after decompression: gRPC's own limit on the other face."""

MAX_JSON_BYTES = 1 << 20
"""Of a JSON request: where it is most dense, so much takes a second to read."""
MAX_BYTES_READ_AT_ONCE = 4 << 10
"""Of JSON that is read in the event loop, for some milliseconds; more is read in a thread."""

MAX_CONNECTIONS = 4096
TIMEOUT_HEADER = b"connect-timeout-ms"
TIMEOUT = re.compile(rb"[0-9]{1,10}")

M = TypeVar("M", bound=Message)
Scope: TypeAlias = dict[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[dict[str, Any]]]
Send: TypeAlias = Callable[[dict[str, Any]], Awaitable[None]]
Context: TypeAlias = "RequestContext[Any, Any]"


# Messages and errors


class BinaryCodec:
    """The wire form. Fields of a later version are kept, and refused where the request is read."""

    def name(self) -> str:
        return "proto"

    def encode(self, message: Message) -> bytes:
        return message.SerializeToString()

    def decode(self, data: bytes | bytearray, message_class: type[M]) -> M:
        try:
            return message_class.FromString(bytes(data))
        except DecodeError as error:
            raise to_connect_error(_malformed(f"the request is not a protobuf message: {error}")) from None


class JsonCodec:
    """The JSON form. Unknown names are refused here: unlike unknown field numbers they would be lost."""

    def name(self) -> str:
        return "json"

    def encode(self, message: Message) -> bytes:
        return json_format.MessageToJson(message, indent=None).encode("ascii")

    def decode(self, data: bytes | bytearray, message_class: type[Message]) -> UnreadJson:
        """Not read yet: here the event loop would wait for it."""
        if len(data) > MAX_JSON_BYTES:
            message = (
                f"the request is {len(data)} bytes of JSON; at most {MAX_JSON_BYTES} are read: send the binary form "
                "(content-type application/proto), or ask less at once"
            )
            raise to_connect_error(Exhausted(Reason.TOO_MANY, message, allowed=f"0-{MAX_JSON_BYTES} bytes"))
        return UnreadJson(bytes(data), message_class)


@dataclass(frozen=True)
class UnreadJson:
    data: bytes
    message_class: type[Message]

    def read(self) -> Message:
        try:
            return json_format.Parse(self.data, self.message_class())
        except (json_format.ParseError, ValueError, RecursionError) as error:
            raise _malformed(f"the request is not the JSON of a message: {error}") from None


async def _read(request: Message | UnreadJson) -> Message:
    if not isinstance(request, UnreadJson):
        return request
    return request.read() if len(request.data) <= MAX_BYTES_READ_AT_ONCE else await asyncio.to_thread(request.read)


def _malformed(message: str) -> InvalidArgument:
    # The parser says only in words what it stumbled over.
    named = "no field named" in message
    valued = "Invalid enum value" in message or "enum" in message.lower()
    reason = Reason.UNKNOWN_FIELD if named else Reason.UNKNOWN_ENUM_VALUE if valued else Reason.MALFORMED
    return InvalidArgument(reason, message[:1000])


def to_connect_error(problem: Problem) -> ConnectError:
    """The Problem as Connect tells it: the same message and the same details as the status of the gRPC face."""
    status = to_status(problem)
    details = [ErrorDetail(PackedDetail(type_url=one.type_url, value=one.value)) for one in status.details]
    name = "canceled" if problem.code_name == "CANCELLED" else problem.code_name.lower()
    return ConnectError(Code(name), status.message, details)


@contextlib.contextmanager
def _connect_errors() -> Iterator[None]:
    try:
        yield
    except Problem as problem:
        raise to_connect_error(problem) from None


# Endpoints


_named_no_deadline: ContextVar[bool] = ContextVar("_named_no_deadline", default=False)
"""Of the caller of this request: the deadline in its headers is ours."""


def _credentials(context: Context) -> Credentials:
    left = None if _named_no_deadline.get() else context.timeout_ms
    values = tuple(value for name, value in context.request_headers.allitems() if name.lower() == "authorization")
    return Credentials(values, None if left is None else left / 1e3)


class _Admission:
    """Asks for the token before a body is read."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def on_start(self, context: Context) -> None:
        with _connect_errors():
            self._calls.admit(_credentials(context))

    async def on_end(self, _token: None, _context: Context, _error: Exception | None) -> None:
        """Nothing was opened."""


class _Connect(ConnectASGIApplication[Calls]):
    @property
    def path(self) -> str:
        return "/"


def _make_application(calls: Calls) -> _Connect:
    codecs: list[Codec[Any, Any]] = [BinaryCodec(), JsonCodec()]
    return _Connect(
        service=calls,
        endpoints=lambda calls: {method.path: _endpoint(calls, method) for method in METHODS},
        interceptors=[_Admission(calls)],
        read_max_bytes=MAX_BODY_BYTES,
        codecs=codecs,
    )


def _endpoint(calls: Calls, method: Method) -> Any:
    info: MethodInfo[Any, Any] = MethodInfo(
        name=method.name,
        service_name=method.service,
        input=method.request,
        output=method.response,
        idempotency_level=IdempotencyLevel.UNKNOWN,  # no GET: a link must not be able to call
        stream_type=StreamType.UNARY if method.unary else StreamType.SERVER_STREAM,
    )

    async def unary(request: Any, context: Context) -> Message:
        with _connect_errors():
            return await calls.answer(method, await _read(request), _credentials(context))

    async def streamed(request: Any, context: Context) -> AsyncIterator[Message]:
        with _connect_errors():
            read = await _read(request)
            async with contextlib.aclosing(calls.stream(method, read, _credentials(context))) as responses:
                async for response in responses:
                    yield response

    return Endpoint.unary(info, unary) if method.unary else Endpoint.server_stream(info, streamed)


class Application:
    """The paths of the face, as an ASGI application."""

    def __init__(self, calls: Calls, names: Names, registry: CollectorRegistry) -> None:
        self._calls = calls
        self._names = names
        self._registry = registry
        self._connect: Any = _make_application(calls)
        self._methods = {method.path: method for method in METHODS}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if path in self._methods:
            fault = self._names.find_fault(scope["headers"])
            if fault is not None:
                await _say(send, 403, fault)
            elif _content_type(scope).startswith(b"application/grpc"):
                await _say(send, 415, "gRPC is served on the port of its own; here speak the Connect protocol")
            else:
                await self._call(self._methods[path], scope, receive, send)
        elif path not in {"/healthz", "/readyz", "/metrics"}:
            await _say(send, 404, "nothing is here; docs/http.md lists the paths")
        elif method not in {"GET", "HEAD"}:
            await _say(send, 405, "only GET and HEAD", ((b"allow", b"GET, HEAD"),))
        elif path == "/metrics":
            kind = ((b"content-type", CONTENT_TYPE_LATEST.encode()),)
            await _send(send, 200, generate_latest(self._registry), kind)
        else:
            refusal = self._calls.readiness.refusal if path == "/readyz" else None
            await _say(send, 200 if refusal is None else 503, "ok" if refusal is None else refusal.detail.message)

    async def _call(self, method: Method, scope: Scope, receive: Receive, send: Send) -> None:
        """One call, which ends in time also when its caller reads nothing of the answer."""
        named = next((value for name, value in scope["headers"] if name == TIMEOUT_HEADER), None)
        asked = int(named) / 1e3 if named is not None and TIMEOUT.fullmatch(named) else None
        longest = self._calls.longest_seconds(method, asked)
        _named_no_deadline.set(named is None)  # always: the context of a kept-alive connection holds the last call's
        if named is None or (asked is not None and asked > longest):  # what is no number is refused where it is read
            scope = _set_timeout(scope, longest + LATE_SECONDS)
        end = asyncio.get_running_loop().time() + longest + 2 * LATE_SECONDS
        connection: TimedConnection = scope["state"][CONNECTION]
        has_ended = False

        async def send_in_time(message: dict[str, Any]) -> None:
            nonlocal has_ended
            if connection.is_gone:
                await asyncio.sleep(0)  # uvicorn takes it at once; let the loop say so to whoever goes on telling
            async with asyncio.timeout_at(end):
                await send(message)
            has_ended = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await self._connect(scope, receive, send_in_time)
        except (TimeoutError, asyncio.CancelledError):
            # Nobody reads, or we are stopping: no failure of ours, which uvicorn would log it as.
            if not has_ended:
                await _drop(connection, receive)


def _content_type(scope: Scope) -> bytes:
    return next((value for name, value in scope["headers"] if name == b"content-type"), b"")


def _set_timeout(scope: Scope, seconds: float) -> Scope:
    others = [(name, value) for name, value in scope["headers"] if name != TIMEOUT_HEADER]
    return {**scope, "headers": [*others, (TIMEOUT_HEADER, str(math.ceil(seconds * 1e3)).encode())]}


async def _drop(connection: TimedConnection, receive: Receive) -> None:
    """End the connection, and wait until it has: before that, uvicorn would log an answer without its end."""
    connection.drop()
    while (await receive())["type"] != "http.disconnect":
        pass


async def _say(send: Send, status: int, message: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
    body = json.dumps({"message": message}).encode("ascii")
    await _send(send, status, body, ((b"content-type", b"application/json"), *headers))


async def _send(send: Send, status: int, body: bytes, headers: tuple[tuple[bytes, bytes], ...]) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


# Listening


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process has one place that hears signals, and it is not here."""
        yield


class HttpFace:
    """`start`, then `stop`."""

    def __init__(self, calls: Calls, names: Names, registry: CollectorRegistry) -> None:
        self._application = Application(calls, names, registry)
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int, tls: TlsSettings) -> str:
        """Listen in this very event loop. Returns the address really taken."""
        config = _configure(self._application, tls)
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, port), family=family, backlog=config.backlog)
        except OSError as error:
            message = (
                f"cannot listen for HTTP on {join_address(host, port)} ({error.strerror or error}); "
                "choose another with --http-port, or 0 for any"
            )
            raise Unavailable(Reason.UNREACHABLE, message, field="http_port") from error
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:
            if self._serving.done():
                self._serving.result()
            await asyncio.sleep(0.005)
        return join_address(host, listener.getsockname()[1])

    async def stop(self, grace_seconds: float) -> None:
        """Take no new calls, let running ones end for so long, then cancel them. Asked again, hurry."""
        if self._server is None or self._serving is None:
            return
        running = self._server.server_state.tasks
        self._server.should_exit = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_seconds):
                await asyncio.shield(self._serving)
        cancelled = list(running)
        for task in cancelled:
            task.cancel()
        self._server.force_exit = True
        if cancelled:
            await asyncio.wait(cancelled, timeout=LATE_SECONDS)  # to tell their callers, where they read
        for connection in list(self._server.server_state.connections):
            cast(TimedConnection, connection).drop()
        await asyncio.gather(*cancelled, return_exceptions=True)
        await self._serving


def _configure(application: Application, tls: TlsSettings) -> uvicorn.Config:
    config = uvicorn.Config(
        application,
        interface="asgi3",
        http=TimedConnection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        ssl_certfile=tls.tls_certificate,
        ssl_keyfile=tls.tls_key,
        ssl_ca_certs=None if tls.tls_client_ca is None else str(tls.tls_client_ca),
        ssl_cert_reqs=ssl.CERT_NONE if tls.tls_client_ca is None else ssl.CERT_REQUIRED,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        message = f"the certificate or its key cannot be used: {error}"
        raise InvalidArgument(Reason.MALFORMED, message, field="tls_certificate") from error
    return config
