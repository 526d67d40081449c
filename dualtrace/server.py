"""One sidecar process: it listens, checks callers, says whether it is ready, and drains when told to stop.

It knows readiness, health and draining. It must not know questions or numbers.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from dualtrace.card import Card
from dualtrace.listening import Announce, LenientDecoding, StopSignals, TokenCheck, open_port, read_tokens
from dualtrace.metrics import Metrics, serve_metrics
from dualtrace.problems import FailedPrecondition, Reason, Unavailable, rebuild
from dualtrace.questions.asked import PreflightQuestion
from dualtrace.scorer import Scorer, ask_one
from dualtrace.settings import SidecarSettings
from dualtrace.sidecar import SERVICE_NAME, Readiness, ScoringServicer, register
from dualtrace.views import BASE, View, finetuned

MAX_CONCURRENT_CALLS = 4096


class SidecarServer:
    """A sidecar's listening half. `start`, then `make_ready`, then `drain`."""

    def __init__(self, scorer: Scorer, settings: SidecarSettings, metrics: Metrics) -> None:
        self._scorer = scorer
        self._settings = settings
        self.readiness = Readiness(metrics)
        self._health = health.aio.HealthServicer()
        tokens = read_tokens(settings.token_file)
        self._server = grpc.aio.server(
            interceptors=[*([] if tokens.is_open else [TokenCheck(tokens)]), LenientDecoding(SERVICE_NAME)],
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
        address = open_port(self._server, self._settings.host, self._settings.port, self._settings)
        await self._server.start()
        return address

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


async def serve(scorer: Scorer, settings: SidecarSettings, metrics: Metrics, announce: Announce) -> None:
    """Run until SIGTERM or SIGINT, then drain; a second signal stops at once. Closes the scorer."""
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(scorer.close)
        if settings.metrics_port is not None:
            exporter = serve_metrics(metrics, settings.host, settings.metrics_port)
            stack.callback(exporter.close)
            announce(f"metrics on http://{settings.host}:{exporter.port}/metrics")
        server = SidecarServer(scorer, settings, metrics)
        address = await server.start()
        stack.push_async_callback(server.drain, 0)  # also when the preflight fails; harmless after a drain
        signals = StopSignals()
        await server.make_ready()
        announce(f"listening on {address}")
        await signals.wait()
        await signals.drain(server.drain, settings.drain_seconds, announce)
    announce("stopped")
