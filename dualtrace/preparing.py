"""Threads on which batches are made ready, so that the engine thread never compiles: it answers others meanwhile.

It knows what an engine says is missing. It must not know rows, calls or the queue.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from dualtrace.engine import Engine, Preparation, Preparing
from dualtrace.metrics import Metrics

THREADS = 2
"""One batch that needs much must not hold up another that needs little."""


class Preparer:
    """Runs preparations in the background. `close` lets those that run end and drops the others."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="dualtrace-prepare")

    def start(
        self, missing: Sequence[Preparation], wanted: Callable[[], bool], done: Callable[[Exception | None], None]
    ) -> None:
        """Run all of them in order, while they are wanted, then say so, on that thread; with what went wrong, if
        anything did."""
        self._pool.submit(self._run, missing, wanted, done)

    def close(self) -> None:
        self._closing.set()
        self._pool.shutdown(cancel_futures=True)

    def _run(
        self, missing: Sequence[Preparation], wanted: Callable[[], bool], done: Callable[[Exception | None], None]
    ) -> None:
        try:
            for preparation in missing:
                if self._closing.is_set():
                    return
                if not wanted():
                    break
                run_timed(preparation, self._metrics)
        except Exception as error:  # noqa: BLE001 - the batch fails with it, on the engine thread
            done(error)
        else:
            done(None)


def run_timed(preparation: Preparation, metrics: Metrics) -> None:
    begun = time.perf_counter()
    preparation.run()
    metrics.prepare_seconds.observe(time.perf_counter() - begun)


def warm_up(engine: Engine, metrics: Metrics, announce: Callable[[str], None]) -> None:
    """Everything that usual batches need, before the first caller comes. Engines that compile nothing are ready."""
    if not isinstance(engine, Preparing):
        return
    usual = engine.list_usual()
    begun = time.perf_counter()
    for number, preparation in enumerate(usual, start=1):
        announce(f"warming up {number} of {len(usual)}: {preparation.name}")
        run_timed(preparation, metrics)
    announce(f"warmed up in {time.perf_counter() - begun:.1f} s")
