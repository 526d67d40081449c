"""One sidecar process: it listens, checks callers, says whether it is ready, and drains when told to stop.

It listens before its engine is loaded, so that whoever watches health can tell a slow start from a dead process. It
knows readiness, health and draining. It must not know questions or numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from dualtrace.card import Card
from dualtrace.listening import (
    SERVER_OPTIONS,
    Announce,
    LenientDecoding,
    StopSignals,
    TokenCheck,
    end_at_once,
    open_port,
    read_tokens,
    run_aside,
)
from dualtrace.metrics import Metrics, serve_metrics
from dualtrace.problems import FailedPrecondition, Reason, Unavailable, rebuild
from dualtrace.questions.answers import AnswerEvent
from dualtrace.questions.asked import PreflightQuestion, Question
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
            options=SERVER_OPTIONS,
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

    def tell_progress(self, announce: Announce) -> Announce:
        """What is announced so is also what a caller who comes too early is told."""

        def tell(message: str) -> None:
            refusal = f"the sidecar is not ready yet ({message}); watch health and retry soon"
            self.readiness.refuse(Unavailable(Reason.NOT_READY, refusal))
            announce(message)

        return tell

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


class ScorerToCome:
    """Stands where a scorer will stand when its engine is loaded; until then every question is refused."""

    def __init__(self) -> None:
        self._scorer: Scorer | None = None

    def arrive(self, scorer: Scorer) -> None:
        self._scorer = scorer

    async def describe(self) -> Card:
        return await self._find().describe()

    def ask(self, question: Question, *, deadline: float | None = None) -> AsyncIterator[AnswerEvent]:
        return self._find().ask(question, deadline=deadline)

    async def close(self) -> None:
        if self._scorer is not None:
            await self._scorer.close()

    def _find(self) -> Scorer:
        if self._scorer is None:
            raise Unavailable(Reason.NOT_READY, "the model is not loaded yet; watch health and retry soon")
        return self._scorer


Load = Callable[[Announce], Scorer]
"""Makes the scorer, for as long as that takes, and says how far it is."""


async def serve(load: Load, settings: SidecarSettings, metrics: Metrics, announce: Announce) -> None:
    """Run until SIGTERM or SIGINT, then drain; a second signal stops at once.

    The port is open while `load` runs: health says NOT_SERVING, and calls are refused with how far it is. That it
    listens is announced when it is ready.
    """
    async with contextlib.AsyncExitStack() as stack:
        scorer = ScorerToCome()
        stack.push_async_callback(scorer.close)
        if settings.metrics_port is not None:
            exporter = serve_metrics(metrics, settings.host, settings.metrics_port)
            stack.callback(exporter.close)
            announce(f"metrics on http://{settings.host}:{exporter.port}/metrics")
        server = SidecarServer(scorer, settings, metrics)
        address = await server.start()
        stack.push_async_callback(server.drain, 0)  # also when loading fails; harmless after a drain
        announce(f"health on {address}, not serving yet")
        signals = StopSignals()
        loading = run_aside(lambda: load(server.tell_progress(announce)), "dualtrace-load")
        await _end_if_stopped(signals, loading, server, announce)
        scorer.arrive(loading.result())
        if settings.preflight:
            server.tell_progress(announce)("checking the model's numbers")
        checking = asyncio.ensure_future(server.make_ready())
        await _end_if_stopped(signals, checking, server, announce)
        await checking
        announce(f"listening on {address}")
        await signals.wait()
        await signals.drain(server.drain, settings.drain_seconds, announce)
    announce("stopped")


async def _end_if_stopped(
    signals: StopSignals, work: asyncio.Future[Any], server: SidecarServer, announce: Announce
) -> None:
    """Wait for work that cannot be broken off; a signal meanwhile ends the process."""
    if await signals.come_first(work):
        await server.drain(0)
        announce("stopped while loading")
        end_at_once()
