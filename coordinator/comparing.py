"""One comparison from its plan to its stored report: sides opened, events passed on, both runs kept.

It knows sides, the comparison and the store. It must not know the wire, jobs or who asks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from coordinator.backends import BackendBook
from coordinator.masks import check_mask
from coordinator.recording import RawBytes, make_record
from coordinator.settings import CoordinatorSettings
from coordinator.sides import OpenSide, open_pair, replay_variant, split_target
from coordinator.store import JobEnd, Store, new_comparison_id, new_run_id
from dualtrace.compare.events import CompareEvent, SideFailed
from dualtrace.compare.gates import DEFAULT_GATES
from dualtrace.compare.report import BenchmarkReport, CompareReport, report_to_text
from dualtrace.compare.sides import SIDES, SideName
from dualtrace.comparing.comparison import CompareOptions, Comparison
from dualtrace.json_text import FloatTexts
from dualtrace.library import ComparePlan, ComparisonRecord, JobState
from dualtrace.metrics import CoordinatorMetrics
from dualtrace.problems import DeadlineExceeded, Exhausted, InvalidArgument, Reason
from dualtrace.runs.run import Run

log = logging.getLogger(__name__)

SHARE_FOR_REPORT = 0.05  # of the time left: a side that is late must leave enough to judge and keep the other
MOST_FOR_REPORT_SECONDS = 2.0


@dataclass(frozen=True)
class CompareOutcome:
    """What a comparison came to. The text is the very document that was stored and is sent."""

    report: CompareReport
    report_text: str
    comparison_id: str  # "" when it was not kept


@dataclass(frozen=True, eq=False)
class _NewRun:
    """What came of a live side."""

    run_id: str
    run: Run
    raw: RawBytes | None


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

    async def compare(self, plan: ComparePlan, deadline: float, job_id: str = "") -> AsyncGenerator[Told, None]:
        """Every event as it comes, the outcome last. Leaving it leaves both sides, down to their engines' queues.

        `job_id`: of the job whose work this is; its end is kept with the comparison.
        """
        begun = time.monotonic()
        check_plan(plan, self._settings)
        tape_bytes = self._settings.tape_megabytes << 20 if plan.store else 0
        texts = FloatTexts()
        left, right = await open_pair(self._book, self._store, plan.left, plan.right, tape_bytes, texts)
        if plan.question is None:
            left, right = replay_variant(left, right), replay_variant(right, left)
        ids = {name: side.spec.target.removeprefix("run:") if side.record else new_run_id()
               for name, side in zip(SIDES, (left, right), strict=True)}  # fmt: skip
        timeout = share_time(deadline, plan.timeout_seconds)
        options = CompareOptions(
            tolerance=plan.tolerance,
            policy=plan.policy,
            debug_token_limit=find_debug_limit(plan, self._settings),
            benchmark=measure_both(left, right),
        )
        comparison = Comparison(plan.question, left.live(timeout), right.live(timeout), options)
        self._metrics.running_comparisons.inc()
        try:
            async with aclosing(comparison.events()) as told:
                async for one in told:
                    if isinstance(one, CompareReport):
                        yield await self._finish(plan, comparison, (left, right), ids, one, texts, job_id)
                        self._metrics.comparisons.labels(one.verdict.value).inc()
                    else:
                        self._count_failure(one, left, right)
                        yield one
        finally:
            self._metrics.running_comparisons.dec()
            self._metrics.comparison_seconds.observe(time.monotonic() - begun)
            for side in (left, right):
                await _drop_bytes(side)

    async def _finish(
        self, plan: ComparePlan, comparison: Comparison, sides: tuple[OpenSide, OpenSide], ids: dict[SideName, str],
        report: CompareReport, texts: FloatTexts, job_id: str,
    ) -> CompareOutcome:  # fmt: skip
        runs = (comparison.left_run, comparison.right_run)
        kept = [
            ids[name] if plan.store and (side.record is not None or run is not None) else ""
            for name, side, run in zip(SIDES, sides, runs, strict=True)
        ]
        report = replace(report, reproduce=reproduce(plan, sides, kept[0], kept[1]))
        if not plan.store:
            return CompareOutcome(report, await asyncio.to_thread(report_to_text, report, texts), "")
        # A run that broke off is kept and says so.
        new = [
            _NewRun(run_id, run, side.raw)
            for run_id, run, side in zip(kept, runs, sides, strict=True) if side.record is None and run is not None
        ]  # fmt: skip
        record = ComparisonRecord(new_comparison_id(), kept[0], kept[1], plan.case, report)
        return await self._keep(record, new, texts, job_id)

    async def _keep(
        self, record: ComparisonRecord, new: Sequence[_NewRun], texts: FloatTexts, job_id: str
    ) -> CompareOutcome:
        """The comparison, its new runs and the end of its job, in one transaction."""
        raws = {one.raw for one in new if one.raw is not None}
        # At once: most of it is waiting for the disk.
        keeping = asyncio.gather(*(raw.keep() for raw in raws))
        text, digests = await asyncio.gather(asyncio.to_thread(report_to_text, record.report, texts), keeping)
        named = dict(zip(raws, digests, strict=True))
        records = [make_record(one.run_id, one.run, raw=named[one.raw] if one.raw else ("", "")) for one in new]
        end = JobEnd(job_id, JobState.DONE, tell_verdict(record.report)) if job_id else None
        await self._store.add_comparison(record, text, records, end, texts)
        self._metrics.stored_runs.inc(len(records))
        return CompareOutcome(record.report, text, record.comparison_id)

    def _count_failure(self, event: CompareEvent, left: OpenSide, right: OpenSide) -> None:
        if isinstance(event, SideFailed) and event.problem.detail.item is None:
            side = left if event.side is SideName.LEFT else right
            name = "stored" if side.record is not None else side.spec.target.removeprefix("backend:")
            self._metrics.failed_sides.labels(name).inc()


async def _drop_bytes(side: OpenSide) -> None:
    """What is not kept goes. The comparison is over, whatever the disk says; the next start sweeps what is left."""
    if side.raw is None:
        return
    try:
        await side.raw.close()
    except Exception:
        log.warning("the raw bytes of %s could not be dropped", side.spec.target, exc_info=True)


def tell_verdict(report: CompareReport) -> str:
    """What a job says in the end."""
    return f"verdict {report.verdict.value}"


def check_plan(plan: ComparePlan, settings: CoordinatorSettings) -> None:
    for name, side in (("left", plan.left), ("right", plan.right)):
        split_target(side.target, f"{name}.target")
        check_mask(side, name)
    limit = find_debug_limit(plan, settings)
    if not 0 <= limit <= settings.debug_token_limit:
        allowed = f"0-{settings.debug_token_limit}"
        message = f"debug_token_limit {limit} asked; {allowed} is allowed: pairs in the stream are not cut"
        raise InvalidArgument(Reason.OUT_OF_RANGE, message, field="debug_token_limit", allowed=allowed)
    check_seconds(plan.timeout_seconds)


def find_debug_limit(plan: ComparePlan, settings: CoordinatorSettings) -> int:
    """Tokens a side kept in the report: as asked, else the default or what the coordinator allows."""
    if plan.debug_token_limit is not None:
        return plan.debug_token_limit
    return min(CompareOptions.debug_token_limit, settings.debug_token_limit)


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
        return f"dualtrace case run --name {plan.case}"
    left, right = sides
    alike = left.record is None and right.record is None and left.spec.variant == right.spec.variant
    if left_run and (alike or right_run):
        pair = f"run:{left_run} {right.spec.target if alike else f'run:{right_run}'}"
    elif right_run and alike:
        pair = f"{left.spec.target} run:{right_run}"
    else:
        return ""
    return f"dualtrace compare {pair}{_judging_flags(plan)}"


def _judging_flags(plan: ComparePlan) -> str:
    """How the command is told to judge alike: whatever is not the default."""
    own, policy = plan.tolerance, plan.policy
    given = {} if own is None else {"--abs-epsilon": own.abs_epsilon, "--rel-epsilon": own.rel_epsilon}
    given |= {
        flag: getattr(policy, name)
        for flag, name in (
            ("--max-mismatches", "max_token_mismatches"), ("--score-max", "score_max_abs_diff"),
            ("--score-mean", "score_mean_abs_diff"), ("--max-failures", "max_failure_rate"),
        )
        if getattr(policy, name) != getattr(DEFAULT_GATES, name)
    }  # fmt: skip
    return "".join(f" {flag} {value!r}" for flag, value in given.items())
