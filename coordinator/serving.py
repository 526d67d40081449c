"""One coordinator process: its store, backends and operations behind both faces, until it is told to stop.

It knows the order in which things are started and ended. It must not know what any of them does.
"""

from __future__ import annotations

import asyncio
import contextlib

from coordinator.backends import BackendBook
from coordinator.calls import Calls
from coordinator.grpc_api import GrpcFace
from coordinator.http_api import HttpFace
from coordinator.operations import Operations
from coordinator.origins import Names
from coordinator.settings import Configuration, CoordinatorSettings
from coordinator.store import Store
from dualtrace import __version__
from dualtrace.listening import Announce, StopSignals, read_tokens
from dualtrace.metrics import CoordinatorMetrics
from dualtrace.problems import Reason, Unavailable
from dualtrace.sidecar import Readiness


class Faces:
    """Both faces over the same calls. `start`, `make_ready`, `drain`."""

    def __init__(self, operations: Operations, settings: CoordinatorSettings, metrics: CoordinatorMetrics) -> None:
        self._settings = settings
        self._readiness = Readiness(metrics, "the coordinator is still starting")
        tokens = read_tokens(settings.token_file)
        self._calls = Calls(operations, tokens, self._readiness, metrics, settings)
        self._grpc = GrpcFace(self._calls, tokens, settings.max_call_seconds)
        is_guarded = not tokens.is_open or settings.tls_certificate is not None
        names = Names(settings.host, settings.split_http_names(), is_guarded=is_guarded)
        self._http = None if settings.http_port is None else HttpFace(self._calls, names, metrics.registry)

    async def start(self) -> str:
        """Listen, not ready yet. Returns where, in words."""
        settings = self._settings
        where = f"grpc {await self._grpc.start(settings.host, settings.port, settings)}"
        if self._http is None or settings.http_port is None:
            return where
        return f"{where} http {await self._http.start(settings.host, settings.http_port, settings)}"

    async def make_ready(self) -> None:
        self._readiness.accept()
        await self._grpc.say(serving=True)

    async def drain(self, seconds: float) -> None:
        """Refuse new calls, end what only waits, let running comparisons end for so long, then stop."""
        self._readiness.refuse(Unavailable(Reason.DRAINING, "the coordinator is shutting down; ask again soon"))
        self._calls.release_watchers()
        await self._grpc.say(serving=False)
        stops = [self._grpc.stop(seconds)]
        if self._http is not None:
            stops.append(self._http.stop(seconds))
        await asyncio.gather(*stops)


async def serve(configuration: Configuration, announce: Announce) -> None:
    """Run until SIGTERM or SIGINT, then drain; a second signal stops at once."""
    settings = configuration.settings
    async with contextlib.AsyncExitStack() as stack:
        metrics = CoordinatorMetrics()
        metrics.describe_build(version=__version__, framework="coordinator", dtype="")
        # First: what is wrong in it is said before files are made.
        book = BackendBook(configuration.backends, metrics, settings.max_call_seconds)
        store = await Store.open(settings.folder)
        stack.push_async_callback(store.close)
        stack.push_async_callback(book.close)
        await book.start()
        operations = Operations(store, book, settings, metrics)
        faces = Faces(operations, settings, metrics)
        stack.push_async_callback(faces.drain, 0)  # also when the start fails; harmless after a drain
        where = await faces.start()
        stack.push_async_callback(operations.close)
        await operations.start()
        signals = StopSignals()
        announce(f"keeping runs, comparisons and cases in {settings.folder}")
        await faces.make_ready()
        announce(f"listening on {where}")
        await signals.wait()
        await signals.drain(faces.drain, settings.drain_seconds, announce)
    announce("stopped")
