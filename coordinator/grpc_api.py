"""The gRPC face: both services on grpc.aio, beside health and reflection. It must not know what a method does."""

from __future__ import annotations

import math
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from coordinator.calls import LATE_SECONDS, Calls, Credentials
from coordinator.methods import METHODS, SERVICE_NAMES, Method
from dualtrace.listening import (
    SERVER_OPTIONS,
    LenientDecoding,
    TlsSettings,
    TokenCheck,
    Tokens,
    authorization_of,
    open_port,
)
from dualtrace.problems import Problem
from dualtrace.wire.problem import to_status

MAX_CONCURRENT_CALLS = 4096

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class GrpcFace:
    """`start`, then `say` SERVING when calls are accepted, then `stop`."""

    def __init__(self, calls: Calls, tokens: Tokens, max_call_seconds: float) -> None:
        self._calls = calls
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[*([] if tokens.is_open else [TokenCheck(tokens)]), LenientDecoding(*SERVICE_NAMES)],
            maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS,
            options=(*SERVER_OPTIONS, *_limit_connections(max_call_seconds)),
        )
        for service in SERVICE_NAMES:
            handlers = {method.name: self._handler(method) for method in METHODS if method.service == service}
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (*SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    async def start(self, host: str, port: int, tls: TlsSettings) -> str:
        """Listen, not serving yet. Returns the address really taken."""
        await self.say(serving=False)
        address = open_port(self._server, host, port, tls)
        await self._server.start()
        return address

    async def say(self, *, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *SERVICE_NAMES):
            await self._health.set(service, status)

    async def stop(self, grace_seconds: float) -> None:
        """Take no new calls, let running ones end for so long."""
        await self._server.stop(grace_seconds)

    def _handler(self, method: Method) -> Any:
        async def unary(request: Any, context: Context) -> Any:
            try:
                return await self._calls.answer(method, request, _credentials(context))
            except Problem as problem:
                await _abort(context, problem)

        async def streamed(request: Any, context: Context) -> None:
            # Written to the context and not yielded: then a call that is dropped is cancelled inside our code, also
            # while it waits for a slow reader.
            credentials = _credentials(context)
            try:
                async with (
                    self._calls.within(method, credentials),
                    aclosing(self._calls.stream(method, request, credentials)) as responses,
                ):
                    async for response in responses:
                        await context.write(response)
            except Problem as problem:
                await _abort(context, problem)

        make = grpc.unary_unary_rpc_method_handler if method.unary else grpc.unary_stream_rpc_method_handler
        return make(
            unary if method.unary else streamed,
            request_deserializer=method.request.FromString,
            response_serializer=method.response.SerializeToString,
        )


def _limit_connections(max_call_seconds: float) -> tuple[tuple[str, int], ...]:
    """The status of a call waits behind what was written of it, and so does its place. Whoever does not read loses the
    connection in the end: it is replaced after so long, and its calls, none of which lasts longer, may end before."""
    longest_ms = math.ceil((max_call_seconds + 2 * LATE_SECONDS) * 1e3)
    return (("grpc.max_connection_age_ms", longest_ms), ("grpc.max_connection_age_grace_ms", longest_ms))


def _credentials(context: Context) -> Credentials:
    return Credentials(tuple(authorization_of(context.invocation_metadata() or ())), context.time_remaining())


async def _abort(context: Context, problem: Problem) -> None:
    await context.abort_with_status(rpc_status.to_status(to_status(problem)))
