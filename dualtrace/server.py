"""One sidecar process: it listens, checks callers, says whether it is ready, and drains when told to stop.

It knows sockets, TLS, tokens and signals. It must not know questions or numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from dualtrace.card import Card
from dualtrace.metrics import Metrics, serve_metrics
from dualtrace.problems import (
    FailedPrecondition,
    InvalidArgument,
    Problem,
    Reason,
    Unauthenticated,
    Unavailable,
    rebuild,
)
from dualtrace.questions.asked import PreflightQuestion
from dualtrace.scorer import Scorer, ask_one
from dualtrace.settings import SidecarSettings
from dualtrace.sidecar import SERVICE_NAME, Readiness, ScoringServicer, register
from dualtrace.views import BASE, View, finetuned
from dualtrace.wire.problem import to_status
from dualtrace.wire.strict import decode_leniently

HEALTH_PREFIX = f"/{health.SERVICE_NAME}/"
MAX_CONCURRENT_CALLS = 4096

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class TokenCheck(grpc.aio.ServerInterceptor):
    """Lets only callers with an accepted bearer token through; health checks need none."""

    def __init__(self, tokens: frozenset[str]) -> None:
        self._tokens = [token.encode() for token in tokens]

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        if handler_call_details.method.startswith(HEALTH_PREFIX) or self._is_known(handler_call_details):
            return await continuation(handler_call_details)
        return _refusing_handler(Unauthenticated(Reason.BAD_TOKEN, "send an accepted token: authorization: Bearer ..."))

    def _is_known(self, details: grpc.HandlerCallDetails) -> bool:
        for key, value in details.invocation_metadata:
            if key == "authorization":
                given = value if isinstance(value, bytes) else value.encode()
                # Every token is compared, in constant time, so that timing tells nothing.
                matches = [hmac.compare_digest(b"Bearer " + token, given) for token in self._tokens]
                return any(matches)
        return False


class LenientDecoding(grpc.aio.ServerInterceptor):
    """Lets the servicer refuse bytes that are no message, so that this failure too has its reason and code."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(f"/{SERVICE_NAME}/"):
            return handler  # type: ignore[no-any-return]
        lenient: Handler = handler._replace(request_deserializer=decode_leniently(handler.request_deserializer))
        return lenient


def _refusing_handler(problem: Problem) -> Handler:
    async def refuse(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await context.abort_with_status(rpc_status.to_status(to_status(problem)))

    handler: Handler = grpc.unary_unary_rpc_method_handler(refuse)
    return handler


class SidecarServer:
    """A sidecar's listening half. `start`, then `make_ready`, then `drain`."""

    def __init__(self, scorer: Scorer, settings: SidecarSettings, metrics: Metrics) -> None:
        self._scorer = scorer
        self._settings = settings
        self.readiness = Readiness(metrics)
        self._health = health.aio.HealthServicer()
        tokens = read_tokens(settings.token_file)
        self._server = grpc.aio.server(
            interceptors=[*([TokenCheck(tokens)] if tokens else []), LenientDecoding()],
            maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS,
            options=[("grpc.so_reuseport", 0)],  # else a second sidecar on our port would share our callers
        )
        register(self._server, ScoringServicer(scorer, self.readiness, metrics))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self) -> str:
        """Listen, not ready yet. Returns the address really taken."""
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        host, port = self._settings.host, self._settings.port
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        credentials = read_credentials(self._settings)
        try:
            if credentials is None:
                taken = self._server.add_insecure_port(address)
            else:
                taken = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            message = f"cannot listen on {address}: is the port taken? Choose another with --port, or 0 for any"
            raise Unavailable(Reason.UNREACHABLE, message) from error
        await self._server.start()
        return address.rsplit(":", 1)[0] + f":{taken}"

    async def make_ready(self) -> None:
        """Check the model's numbers once, in every view that has an adapter of its own, then accept calls."""
        if self._settings.preflight:
            for view in served_views(await self._scorer.describe()):
                await self._check_view(view)
        self.readiness.accept()
        await self._say(health_pb2.HealthCheckResponse.SERVING)

    async def _check_view(self, view: View) -> None:
        answer = await ask_one(self._scorer, PreflightQuestion((view,)))
        for problem in (result.problem for result in answer.results):
            if problem is not None:
                self.readiness.refuse(
                    FailedPrecondition(Reason.NOT_READY, f"the preflight of {view} failed: {problem}")
                )
                message = f"the preflight of view {view} failed: {problem.detail.message}"
                raise rebuild(problem.code, replace(problem.detail, message=message))

    async def drain(self, seconds: float) -> None:
        """Refuse new calls, let running ones end for so long, then stop."""
        self.readiness.refuse(Unavailable(Reason.DRAINING, "the sidecar is shutting down; ask another replica"))
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.stop(seconds)

    async def _say(self, status: Any) -> None:
        for service in ("", SERVICE_NAME):
            await self._health.set(service, status)


def served_views(card: Card) -> tuple[View, ...]:
    """The views whose weights differ: the base, and each adapter fully on."""
    return (BASE, *(finetuned(name) for name in card.adapters))


def read_tokens(file: Path | None) -> frozenset[str]:
    """Accepted bearer tokens, one a line. A file without any is a mistake: it would lock or open everything."""
    if file is None:
        return frozenset()
    lines = _read(file, "token_file").decode(errors="strict").splitlines()
    tokens = frozenset(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not tokens:
        raise InvalidArgument(Reason.EMPTY, f"{file} holds no token; write one a line", field="token_file")
    return tokens


def read_credentials(settings: SidecarSettings) -> grpc.ServerCredentials | None:
    certificate, key, client_ca = settings.tls_certificate, settings.tls_key, settings.tls_client_ca
    if certificate is None and key is None:
        if client_ca is not None:
            message = "client certificates need TLS: give tls_certificate and tls_key too"
            raise InvalidArgument(Reason.CONFLICT, message, field="tls_client_ca")
        return None
    if certificate is None or key is None:
        message = "TLS needs both a certificate and its key"
        raise InvalidArgument(Reason.CONFLICT, message, field="tls_certificate" if certificate is None else "tls_key")
    pair = (_read(key, "tls_key"), _read(certificate, "tls_certificate"))
    ca = None if client_ca is None else _read(client_ca, "tls_client_ca")
    return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)


def _read(file: Path, field: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidArgument(Reason.NOT_FOUND, f"cannot read {file}: {error.strerror}", field=field) from error


async def serve(scorer: Scorer, settings: SidecarSettings, metrics: Metrics, announce: Callable[[str], None]) -> None:
    """Run until SIGTERM or SIGINT, then drain; a second signal stops at once. Closes the scorer."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals: list[int] = []

    def on_signal(number: int) -> None:
        signals.append(number)
        stop.set()

    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(scorer.close)
        if settings.metrics_port is not None:
            exporter = serve_metrics(metrics, settings.host, settings.metrics_port)
            stack.callback(exporter.close)
            announce(f"metrics on http://{settings.host}:{exporter.port}/metrics")
        server = SidecarServer(scorer, settings, metrics)
        address = await server.start()
        stack.push_async_callback(server.drain, 0)  # also when the preflight fails; harmless after a drain
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number)
        await server.make_ready()
        announce(f"listening on {address}")
        await stop.wait()
        announce(f"draining for at most {settings.drain_seconds:g} s; a second signal stops at once")
        stop.clear()
        draining = asyncio.create_task(server.drain(settings.drain_seconds))
        hurry = asyncio.create_task(stop.wait())
        await asyncio.wait({draining, hurry}, return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            await server.drain(0)
        await draining
        hurry.cancel()
    announce("stopped")
