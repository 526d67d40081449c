"""One comparison from its plan to its stored report: sides opened, events passed on, both runs kept.

It knows sides, the comparison and the store. It must not know the wire, jobs or who asks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

from coordinator.backends import BackendBook
from coordinator.recording import keep_tape, make_record
from coordinator.settings import CoordinatorSettings
from coordinator.sides import OpenSide, open_pair, replay_variant, split_target
from coordinator.store import Store, new_comparison_id, new_run_id
from dualtrace.compare.events import CompareEvent, SideFailed
from dualtrace.compare.report import BenchmarkReport, CompareReport, report_to_text
from dualtrace.compare.sides import SIDES, SideName
from dualtrace.comparing.comparison import CompareOptions, Comparison
from dualtrace.library import ComparePlan, ComparisonRecord
from dualtrace.metrics import CoordinatorMetrics
from dualtrace.problems import DeadlineExceeded, Exhausted, InvalidArgument, Reason
from dualtrace.runs.run import Run

SHARE_FOR_REPORT = 0.05  # of the time left: a side that is late must leave enough to judge and keep the other
MOST_FOR_REPORT_SECONDS = 2.0


@dataclass(frozen=True)
class CompareOutcome:
    """What a comparison came to. The text is the very document that was stored and is sent."""

    report: CompareReport
    report_text: str
    comparison_id: str  # "" when it was not kept


Told = CompareEvent | CompareOutcome


class Comparing:
    """Runs comparisons, at most so many at a time."""

    def __init__(
        self, store: Store, book: BackendBook, settings: CoordinatorSettings, metrics: CoordinatorMetrics
    ) -> None:
        self._store = store
        self._book = book
        self._settings = settings
        self._metrics = metrics
        self._running = 0

    async def admitted(self, plan: ComparePlan, deadline: float) -> AsyncGenerator[Told, None]:
        """`compare` for a caller who waits: refused when too many run already."""
        if self._running >= self._settings.max_comparisons:
            self._metrics.refused_comparisons.inc()
            message = f"{self._running} comparisons run already; ask again, or start a job, which waits"
            raise Exhausted(Reason.QUEUE_FULL, message, allowed=f"1-{self._settings.max_comparisons}")
        self._running += 1
        try:
            async with aclosing(self.compare(plan, deadline)) as told:
                async for one in told:
                    yield one
        finally:
            self._running -= 1

    async def compare(self, plan: ComparePlan, deadline: float) -> AsyncGenerator[Told, None]:
        """Every event as it comes, the outcome last. Leaving it leaves both sides, down to their engines' queues."""
        begun = time.monotonic()
        check_plan(plan, self._settings)
        tape_bytes = self._settings.tape_megabytes << 20 if plan.store else 0
        left, right = await open_pair(self._book, self._store, plan.left, plan.right, tape_bytes)
        if plan.question is None:
            left, right = replay_variant(left, right), replay_variant(right, left)
        ids = {name: side.spec.target.removeprefix("run:") if side.record else new_run_id()
               for name, side in zip(SIDES, (left, right), strict=True)}  # fmt: skip
        timeout = share_time(deadline, plan.timeout_seconds)
        options = CompareOptions(
            tolerance=plan.tolerance,
            policy=plan.policy,
            debug_token_limit=plan.debug_token_limit,
            benchmark=measure_both(left, right),
        )
        comparison = Comparison(plan.question, left.live(timeout), right.live(timeout), options)
        self._metrics.running_comparisons.inc()
        try:
            async with aclosing(comparison.events()) as told:
                async for one in told:
                    if isinstance(one, CompareReport):
                        yield await self._finish(plan, comparison, (left, right), ids, one)
                        self._metrics.comparisons.labels(one.verdict.value).inc()
                    else:
                        self._count_failure(one, left, right)
                        yield one
        finally:
            self._metrics.running_comparisons.dec()
            self._metrics.comparison_seconds.observe(time.monotonic() - begun)

    async def _finish(
        self, plan: ComparePlan, comparison: Comparison, sides: tuple[OpenSide, OpenSide], ids: dict[SideName, str],
        report: CompareReport,
    ) -> CompareOutcome:  # fmt: skip
        runs = (comparison.left_run, comparison.right_run)
        kept = [
            ids[name] if plan.store and (side.record is not None or run is not None) else ""
            for name, side, run in zip(SIDES, sides, runs, strict=True)
        ]
        report = replace(report, reproduce=reproduce(plan, sides, kept[0], kept[1]))
        if not plan.store:
            return CompareOutcome(report, await asyncio.to_thread(report_to_text, report), "")
        # At once: most of it is waiting for the disk.
        left, right = (self._keep_side(run_id, side, run) for run_id, side, run in zip(kept, sides, runs, strict=True))
        text, _, _ = await asyncio.gather(asyncio.to_thread(report_to_text, report), left, right)
        record = ComparisonRecord(new_comparison_id(), kept[0], kept[1], plan.case, report)
        await self._store.add_comparison(record, text)
        return CompareOutcome(report, text, record.comparison_id)

    async def _keep_side(self, run_id: str, side: OpenSide, run: Run | None) -> None:
        """Keep what came of a live side. A run that broke off is kept and says so."""
        if side.record is not None or run is None:
            return
        raw = await keep_tape(self._store, side.tape)
        await self._store.add_run(await asyncio.to_thread(make_record, run_id, run, raw=raw))
        self._metrics.stored_runs.inc()

    def _count_failure(self, event: CompareEvent, left: OpenSide, right: OpenSide) -> None:
        if isinstance(event, SideFailed) and event.problem.detail.item is None:
            side = left if event.side is SideName.LEFT else right
            name = "stored" if side.record is not None else side.spec.target.removeprefix("backend:")
            self._metrics.failed_sides.labels(name).inc()


def check_plan(plan: ComparePlan, settings: CoordinatorSettings) -> None:
    for name, side in (("left", plan.left), ("right", plan.right)):
        split_target(side.target, f"{name}.target")
    if not 0 <= plan.debug_token_limit <= settings.debug_token_limit:
        allowed = f"0-{settings.debug_token_limit}"
        message = (
            f"debug_token_limit {plan.debug_token_limit} asked; {allowed} is allowed: pairs in the stream are not cut"
        )
        raise InvalidArgument(Reason.OUT_OF_RANGE, message, field="debug_token_limit", allowed=allowed)
    check_seconds(plan.timeout_seconds)


def check_seconds(seconds: float | None) -> None:
    if seconds is not None and not 0 < seconds < float("inf"):
        message = f"timeout_seconds {seconds} asked; it must be a finite number above 0"
        raise InvalidArgument(Reason.OUT_OF_RANGE, message, field="timeout_seconds", allowed="> 0")


def share_time(deadline: float, timeout_seconds: float | None) -> float:
    """Seconds that a side may take, so that time is left to tell what became of it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceeded(Reason.DEADLINE, "the deadline passed before the comparison began; allow more time")
    mine = left - min(MOST_FOR_REPORT_SECONDS, SHARE_FOR_REPORT * left)
    return mine if timeout_seconds is None else min(mine, timeout_seconds)


def measure_both(left: OpenSide, right: OpenSide) -> BenchmarkReport | None:
    """The latencies of two stored benchmark runs; None for any other pair."""
    figures = [None if side.record is None else side.record.benchmark for side in (left, right)]
    if figures[0] is None or figures[1] is None:
        return None
    one, other = figures[0], figures[1]
    return BenchmarkReport(
        left_samples=len(one.latencies_ms),
        right_samples=len(other.latencies_ms),
        left_p50_ms=one.p50_ms,
        right_p50_ms=other.p50_ms,
        left_p95_ms=one.p95_ms,
        right_p95_ms=other.p95_ms,
        left_failure_rate=one.failure_rate,
        right_failure_rate=other.failure_rate,
    )


def reproduce(plan: ComparePlan, sides: tuple[OpenSide, OpenSide], left_run: str, right_run: str) -> str:
    """The command that asks the same again; "" where nothing is kept that it could name.

    A kept run says what was asked. The other side is asked again where it is live and saw through the same view and
    mask, which its own target cannot say; else its kept run is compared.
    """
    if plan.case:
        return f"dualtrace case run {plan.case}"
    left, right = sides
    alike = left.record is None and right.record is None and left.spec.variant == right.spec.variant
    if left_run and (alike or right_run):
        pair = f"run:{left_run} {right.spec.target if alike else f'run:{right_run}'}"
    elif right_run and alike:
        pair = f"{left.spec.target} run:{right_run}"
    else:
        return ""
    own = plan.tolerance
    flags = f" --abs-epsilon {own.abs_epsilon!r} --rel-epsilon {own.rel_epsilon!r}" if own is not None else ""
    return f"dualtrace compare {pair}{flags}"
