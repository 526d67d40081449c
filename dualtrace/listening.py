"""How a process of ours listens: ports, TLS, bearer tokens, lenient decoding, and stopping when it is told to.

Shared by the sidecar and the coordinator. It knows sockets, callers and signals. It must not know what is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import os
import signal
import ssl
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeAlias, TypeVar

import grpc
from grpc_health.v1 import health
from grpc_status import rpc_status

from dualtrace.problems import Exhausted, InvalidArgument, Problem, Reason, Unauthenticated, Unavailable
from dualtrace.wire.problem import to_status
from dualtrace.wire.strict import decode_leniently

HEALTH_PREFIX = f"/{health.SERVICE_NAME}/"
ANYBODY = "anybody"
"""Who calls where no token is asked for."""

T = TypeVar("T")
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Announce = Callable[[str], None]

MAX_STRANGERS_WATCHES = 256
SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # else a second server on our port would share our callers
    # gRPC would drop whoever asks more often than every five minutes whether we are still there.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


class TlsSettings(Protocol):
    """The settings of TLS, as every server of ours has them."""

    @property
    def tls_certificate(self) -> Path | None: ...
    @property
    def tls_key(self) -> Path | None: ...
    @property
    def tls_client_ca(self) -> Path | None: ...


# Callers


class Tokens:
    """The accepted bearer tokens; without any, everybody is let in."""

    def __init__(self, accepted: frozenset[str]) -> None:
        self._accepted = {token.encode(): _name_of(token) for token in accepted}

    @property
    def is_open(self) -> bool:
        return not self._accepted

    def identify(self, authorization: Iterable[str | bytes]) -> str:
        """Who calls, by the values of the `authorization` header: a name that tells nothing of the token itself."""
        if self.is_open:
            return ANYBODY
        for value in authorization:
            given = value if isinstance(value, bytes) else value.encode(errors="replace")
            # Every token is compared, in constant time, so that timing tells nothing.
            matches = [name for token, name in self._accepted.items() if hmac.compare_digest(b"Bearer " + token, given)]
            # Only the first header counts: a proxy and a server that pick different ones would disagree on who calls.
            if matches:
                return matches[0]
            break
        raise Unauthenticated(Reason.BAD_TOKEN, "send an accepted token: authorization: Bearer ...")


def _name_of(token: str) -> str:
    return "token-" + hashlib.sha256(token.encode()).hexdigest()[:12]


class TokenCheck(grpc.aio.ServerInterceptor):
    """Lets only callers with an accepted bearer token through; health checks need none.

    A health watch lasts as long as its caller likes, so those without a token have few places of their own: they could
    take every place of the server.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._watches = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        try:
            self._tokens.identify(authorization_of(handler_call_details.invocation_metadata))
        except Unauthenticated as problem:
            if not handler_call_details.method.startswith(HEALTH_PREFIX):
                return _refusing_handler(problem)
            return self._count_watches(await continuation(handler_call_details))
        return await continuation(handler_call_details)

    def _count_watches(self, handler: Any) -> Handler | None:
        if handler is None or handler.unary_stream is None:
            return handler  # type: ignore[no-any-return]  # Check: over at once

        async def watch(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            if self._watches >= MAX_STRANGERS_WATCHES:
                message = f"{self._watches} health watches without a token run already; send one, or call Check"
                problem = Exhausted(Reason.TOO_MANY, message, allowed=f"0-{MAX_STRANGERS_WATCHES}")
                await context.abort_with_status(rpc_status.to_status(to_status(problem)))
            self._watches += 1
            try:
                await handler.unary_stream(request, context)
            finally:
                self._watches -= 1

        counted: Handler = handler._replace(unary_stream=watch)
        return counted


def authorization_of(metadata: Iterable[tuple[str, str | bytes]]) -> list[str | bytes]:
    """The values of the authorization header in a call's metadata."""
    return [value for key, value in metadata if key == "authorization"]


def read_tokens(file: Path | None) -> Tokens:
    """Accepted bearer tokens, one a line. A file without any is a mistake: it would lock or open everything."""
    if file is None:
        return Tokens(frozenset())
    lines = _read(file, "token_file").decode(errors="strict").splitlines()
    tokens = frozenset(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not tokens:
        raise InvalidArgument(Reason.EMPTY, f"{file} holds no token; write one a line", field="token_file")
    return Tokens(tokens)


# gRPC


class LenientDecoding(grpc.aio.ServerInterceptor):
    """Lets the services refuse bytes that are no message, so that this failure too has its reason and code."""

    def __init__(self, *services: str) -> None:
        self._prefixes = tuple(f"/{service}/" for service in services)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefixes):
            return handler  # type: ignore[no-any-return]
        lenient: Handler = handler._replace(request_deserializer=decode_leniently(handler.request_deserializer))
        return lenient


def _refusing_handler(problem: Problem) -> Handler:
    async def refuse(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await context.abort_with_status(rpc_status.to_status(to_status(problem)))

    handler: Handler = grpc.unary_unary_rpc_method_handler(refuse)
    return handler


def join_address(host: str, port: int | str) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def open_port(server: grpc.aio.Server, host: str, port: int, tls: TlsSettings) -> str:
    """Take the port, 0 for any free one. Returns the address really taken."""
    address = join_address(host, port)
    credentials = read_credentials(tls)
    try:
        if credentials is None:
            taken = server.add_insecure_port(address)
        else:
            taken = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        message = f"cannot listen on {address}: is the port taken? Choose another with --port, or 0 for any"
        raise Unavailable(Reason.UNREACHABLE, message, field="port") from error
    return join_address(host, taken)


def read_credentials(tls: TlsSettings) -> grpc.ServerCredentials | None:
    certificate, key, client_ca = tls.tls_certificate, tls.tls_key, tls.tls_client_ca
    if certificate is None and key is None:
        if client_ca is not None:
            message = "client certificates need TLS: give tls_certificate and tls_key too"
            raise InvalidArgument(Reason.CONFLICT, message, field="tls_client_ca")
        return None
    if certificate is None or key is None:
        message = "TLS needs both a certificate and its key"
        raise InvalidArgument(Reason.CONFLICT, message, field="tls_certificate" if certificate is None else "tls_key")
    pair = (_read(key, "tls_key"), _read(certificate, "tls_certificate"))
    _check_pair(certificate, key)
    ca = None if client_ca is None else _read(client_ca, "tls_client_ca")
    return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)


def _check_pair(certificate: Path, key: Path) -> None:
    """gRPC itself would only say that it cannot take the port. A pipe cannot be read a second time."""
    if not (certificate.is_file() and key.is_file()):
        return
    try:
        # An encrypted key must not make a server ask its terminal for the password.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        message = f"{certificate} and {key} are no certificate with its own, unencrypted key in PEM form: {error}"
        raise InvalidArgument(Reason.MALFORMED, message, field="tls_certificate") from error


def _read(file: Path, field: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidArgument(Reason.NOT_FOUND, f"cannot read {file}: {error.strerror}", field=field) from error


# Stopping


class StopSignals:
    """SIGTERM and SIGINT, heard from when it is made. Wait for the first; drain until done or until the second."""

    def __init__(self) -> None:
        self._heard = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._heard.set)

    async def wait(self) -> None:
        await self._heard.wait()
        self._heard.clear()

    async def come_first(self, work: asyncio.Future[Any]) -> bool:
        """Wait for the work or the first signal; whether it was the signal."""
        heard = asyncio.create_task(self.wait())
        await asyncio.wait({work, heard}, return_when=asyncio.FIRST_COMPLETED)
        stopped = heard.done()  # it has taken the signal, even where the work ended in the same moment
        heard.cancel()
        return stopped

    async def drain(self, drain: Callable[[float], Awaitable[None]], seconds: float, announce: Announce) -> None:
        """`drain(seconds)`, and at once `drain(0)` beside it when a second signal comes."""
        announce(f"draining for at most {seconds:g} s; a second signal stops at once")
        draining = asyncio.ensure_future(drain(seconds))
        hurry = asyncio.create_task(self._heard.wait())
        await asyncio.wait({draining, hurry}, return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            await drain(0)
        await draining
        hurry.cancel()


def run_aside(function: Callable[[], T], name: str) -> asyncio.Future[T]:
    """Run on a daemon thread of its own: the loop's executor would make the process wait for it when it is stopped."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_it: Callable[[Any], None], value: object) -> None:
        if not future.done():  # nobody waits any more when it was cancelled
            set_it(value)

    def run() -> None:
        outcome: tuple[Callable[[Any], None], object]
        try:
            outcome = future.set_result, function()
        except BaseException as error:  # noqa: BLE001 - it is raised where the future is awaited
            outcome = future.set_exception, error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def end_at_once() -> NoReturn:
    """End the process well, with threads in the middle of native code, which an orderly end would wait for or break."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def stop_with_stdin() -> None:
    """Stop as by SIGTERM when standard input ends: whoever started us holds its other end, and may be killed."""
    threading.Thread(target=_watch_stdin, name="dualtrace-stdin", daemon=True).start()


def _watch_stdin() -> None:
    while os.read(0, 4096):  # not sys.stdin: a thread inside a buffered read spoils the interpreter's end
        pass
    os.kill(os.getpid(), signal.SIGTERM)
