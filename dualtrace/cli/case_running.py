"""Running cases one after the other: in this process, or by the coordinator that knows their sides.

It knows cases, comparisons and the coordinator's client. It must not know options or how a result is shown.
"""

from __future__ import annotations

import asyncio
import secrets
import shlex
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from dualtrace.cli.case_results import Ended
from dualtrace.cli.comparing import late_sides
from dualtrace.cli.doors import Doors, open_doors
from dualtrace.cli.output import Tell
from dualtrace.compare.events import TokenPairs
from dualtrace.compare.report import CompareReport, Verdict
from dualtrace.comparing.comparison import CompareOptions, Comparison, LiveSide
from dualtrace.coordinator_client import CompareOutcome, CoordinatorClient
from dualtrace.library import Case, ComparePlan, JobState, SideSpec
from dualtrace.problems import Cancelled, DeadlineExceeded, Internal, InvalidArgument, Problem, Reason
from dualtrace.runs.run import restore_problem
from dualtrace.targets import TargetOptions


@dataclass(frozen=True)
class Planned:
    """A case that is to be run, its targets already those of this machine."""

    case: Case
    source: str  # file or coordinator
    reproduce: str
    kept_by_coordinator: bool = False  # it is the coordinator's own: run there by its name

    @property
    def is_coordinated(self) -> bool:
        """Whether a coordinator asks both sides."""
        sides = (self.case.left.target, self.case.right.target)
        return self.kept_by_coordinator or any(target.startswith("backend:") for target in sides)

    @property
    def needs_coordinator(self) -> bool:
        """Whether one is asked at all: a stored run may stand beside a side that is asked from here."""
        sides = (self.case.left.target, self.case.right.target)
        return self.is_coordinated or any(target.startswith("run:") for target in sides)


@dataclass(frozen=True)
class RunOptions:
    targets: TargetOptions
    timeout_seconds: float | None  # of one case
    fail_fast: bool
    connect: Callable[[], CoordinatorClient]  # called when a case needs it


async def run_cases(planned: Sequence[Planned], options: RunOptions, tell: Tell) -> AsyncIterator[Ended]:
    """Each case as it ends. With `fail_fast` those after the first that did not pass are told as skipped."""
    local = [one.case for one in planned if not one.is_coordinated]
    targets = [side.target for case in local for side in (case.left, case.right)]
    client = options.connect() if any(one.is_coordinated for one in planned) else None
    failed = False
    try:
        async with open_doors(targets, options.targets) as doors:
            for index, one in enumerate(planned):
                if failed and options.fail_fast:
                    yield Ended(one.case, one.source, reproduce=one.reproduce, skipped=True)
                    continue
                tell(f"case {index + 1} of {len(planned)}: {one.case.name}")
                ended = await _run_one(one, doors, client, options.timeout_seconds, tell)
                failed = failed or ended.verdict is not Verdict.PASS
                yield ended
    finally:
        if client is not None:
            await client.close()


async def _run_one(
    one: Planned, doors: Doors, client: CoordinatorClient | None, timeout_seconds: float | None, tell: Tell
) -> Ended:
    begun = time.monotonic()
    comparison_id = ""
    report: CompareReport | None = None
    problem: Problem | None = None
    try:
        if one.is_coordinated:
            assert client is not None
            _refuse_mixed(one.case)
            report, comparison_id = await _run_there(one, client, timeout_seconds, tell)
        else:
            left, right = [await _live(side, doors, timeout_seconds) for side in (one.case.left, one.case.right)]
            begun = time.monotonic()  # an engine that was still loading is no part of the case
            report = await _run_here(one, left, right, tell)
            for target in late_sides(report):
                doors.abandon(target)
    except Problem as caught:
        problem = caught
    seconds = time.monotonic() - begun
    return Ended(one.case, one.source, seconds, report, problem, comparison_id, one.reproduce)


def _refuse_mixed(case: Case) -> None:
    for name, side in (("left", case.left), ("right", case.right)):
        if not side.target.startswith(("backend:", "run:")):
            message = (
                f"the {name} side of case {case.name} is {side.target}, and the other one is a coordinator's, which "
                "opens nothing that a caller names; write backend:NAME or run:ID for both, or neither"
            )
            raise InvalidArgument(Reason.CONFLICT, message, field=f"{case.name}.{name}")


async def _run_here(one: Planned, left: LiveSide, right: LiveSide, tell: Tell) -> CompareReport:
    case = one.case
    comparison = Comparison(
        case.question, left, right, CompareOptions(case.tolerance, case.policy, reproduce=one.reproduce)
    )
    pairs = 0
    async with aclosing(comparison.events()) as events:
        async for event in events:
            if isinstance(event, CompareReport):
                return event
            if isinstance(event, TokenPairs):
                pairs += len(event.token_ids)
                tell(f"{case.name}: {pairs} tokens on both sides")
    raise Internal(Reason.BUG, f"the comparison of case {case.name} ended without a report")


async def _live(side: SideSpec, doors: Doors, timeout_seconds: float | None) -> LiveSide:
    return LiveSide(side.target, await doors.open(side.target), side.variant, timeout_seconds)


async def _run_there(
    one: Planned, client: CoordinatorClient, timeout_seconds: float | None, tell: Tell
) -> tuple[CompareReport, str]:
    if one.kept_by_coordinator:
        report, comparison_id, _seconds = await run_kept(one.case.name, client, timeout_seconds, tell)
        return report, comparison_id
    case = one.case
    plan = ComparePlan(case.question, case.left, case.right, case.tolerance, case.policy)
    # The call's own deadline: the coordinator leaves itself a share of it to tell what became of a late side.
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    async with aclosing(client.compare(plan, deadline=deadline)) as events:
        async for event in events:
            if isinstance(event, CompareOutcome):
                return event.report, event.comparison_id
            tell(f"{case.name}: {type(event).__name__}")
    raise Internal(Reason.BUG, f"the coordinator ended case {case.name} without a report")


async def run_kept(
    name: str, client: CoordinatorClient, timeout_seconds: float | None, tell: Tell
) -> tuple[CompareReport, str, float]:
    """The report, its id and the seconds of a saved case, run as a job: one that is stopped when its time has passed,
    but goes on, and is kept, when this command is ended."""
    begun = time.monotonic()
    job = await client.start_job(f"case-{name[:60]}-{secrets.token_hex(8)}", name)
    tell(f"{name}: job {job.job_id}")
    try:
        async with asyncio.timeout(timeout_seconds), aclosing(client.watch_job(job.job_id)) as events:
            async for event in events:
                job = event.job
                tell(f"{name}: {event.message}")
    except TimeoutError:
        await client.cancel_job(job.job_id)
        message = f"case {name} took more than {timeout_seconds:g} s; allow more with --timeout"
        raise DeadlineExceeded(Reason.DEADLINE, message) from None
    if job.comparison_id:
        report = await client.get_comparison(job.comparison_id)
        return report, job.comparison_id, time.monotonic() - begun
    if job.problem is not None:
        raise restore_problem(job.problem)
    if job.state is JobState.CANCELLED:
        raise Cancelled(Reason.CANCELLED, f"the job {job.job_id} of case {name} was cancelled")
    raise Internal(Reason.BUG, f"the job {job.job_id} of case {name} ended as {job.state} without a comparison")


def write_command(parts: Sequence[str | Path]) -> str:
    """A command line that a shell reads back."""
    return shlex.join(["dualtrace", *map(str, parts)])
