"""Everything that a coordinator can do, free of transport: both faces call this, so they cannot differ.

It knows callers, plans, the store, backends and jobs. It must not know gRPC, HTTP or messages.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from coordinator.backends import BackendBook
from coordinator.comparing import CompareOutcome, Comparing, check_plan
from coordinator.jobs import JobResult, Jobs, Progress
from coordinator.masks import check_mask
from coordinator.running import Running, check_run
from coordinator.settings import CoordinatorSettings
from coordinator.sides import check_side, split_target
from coordinator.store import Store
from coordinator.work import CaseRun, Work, read_work, work_to_text
from dualtrace.compare.events import CompareEvent, TokenPairs
from dualtrace.compare.report import Verdict
from dualtrace.library import (
    Backend,
    Case,
    ComparePlan,
    ComparisonRecord,
    ComparisonSummary,
    Fallback,
    Job,
    JobEvent,
    Page,
    RunPlan,
    RunRecord,
    RunSummary,
)
from dualtrace.metrics import CoordinatorMetrics
from dualtrace.problems import DeadlineExceeded, InvalidArgument, Reason
from dualtrace.questions.answers import TokenizeAnswer
from dualtrace.questions.asked import Input, TokenizeQuestion
from dualtrace.scorer import ask_one

__all__ = ["Caller", "CaseRun", "CompareOutcome", "Operations"]

T = TypeVar("T")


@dataclass(frozen=True)
class Caller:
    """Who calls, and until when they wait."""

    identity: str  # "" when callers are not told apart
    deadline: float | None = None  # on the clock of time.monotonic; None: the coordinator's own


class Operations:
    """`start` takes up unfinished jobs, `close` leaves them to the next start. Store and book belong to the caller."""

    def __init__(
        self, store: Store, book: BackendBook, settings: CoordinatorSettings, metrics: CoordinatorMetrics
    ) -> None:
        self._store = store
        self._book = book
        self._settings = settings
        self._comparing = Comparing(store, book, settings, metrics)
        self._running = Running(store, book, settings, metrics)
        self._jobs = Jobs(store, self._perform, settings, metrics)

    async def start(self) -> None:
        await self._jobs.start()

    async def close(self) -> None:
        await self._jobs.close()

    # Comparisons

    async def compare(self, caller: Caller, plan: ComparePlan) -> AsyncGenerator[CompareEvent | CompareOutcome, None]:
        """Token pairs as soon as both sides have them, the outcome last. Leaving it leaves both sides."""
        async with aclosing(self._comparing.admitted(plan, self._deadline(caller))) as told:
            async for one in told:
                yield one

    async def list_comparisons(
        self, caller: Caller, page_size: int = 100, page_token: str = "", case: str = "", verdict: Verdict | None = None
    ) -> Page[ComparisonSummary]:
        return await self._within(caller, self._store.list_comparisons(page_size, page_token, case, verdict))

    async def get_comparison(self, caller: Caller, comparison_id: str) -> ComparisonRecord:
        return await self._within(caller, self._store.get_comparison(comparison_id))

    async def get_comparison_text(self, caller: Caller, comparison_id: str) -> str:
        return await self._within(caller, self._store.get_comparison_text(comparison_id))

    # Runs

    async def list_runs(
        self, caller: Caller, page_size: int = 100, page_token: str = "", identity: str = "", target: str = ""
    ) -> Page[RunSummary]:
        return await self._within(caller, self._store.list_runs(page_size, page_token, identity, target))

    async def get_run(self, caller: Caller, run_id: str) -> RunRecord:
        return await self._within(caller, self._store.get_run(run_id))

    async def get_run_text(self, caller: Caller, run_id: str) -> str:
        return await self._within(caller, self._store.get_run_text(run_id))

    async def read_artifact(self, caller: Caller, digest: str) -> AsyncGenerator[bytes, None]:
        """The bytes behind a digest, in parts."""
        deadline = self._deadline(caller)
        async with aclosing(self._store.artifacts.read(digest)) as parts:
            async for part in parts:
                if time.monotonic() > deadline:
                    raise _too_late("the artifact was read")
                yield part

    # Jobs

    async def start_job(self, caller: Caller, request_id: str, work: Work) -> Job:
        """The same request id with the same work returns the same job."""
        await self._within(caller, self._check_work(work))
        text = await asyncio.to_thread(work_to_text, work)
        return await self._within(caller, self._jobs.begin(request_id, text))

    async def get_job(self, caller: Caller, job_id: str) -> Job:
        return await self._within(caller, self._store.job(job_id))

    async def watch_job(self, caller: Caller, job_id: str, after_sequence: int = 0) -> AsyncGenerator[JobEvent, None]:
        """Events after this number, until the job's last. Without a deadline it goes on as long as any call may."""
        longest = time.monotonic() + self._settings.max_call_seconds
        deadline = longest if caller.deadline is None else min(caller.deadline, longest)
        async with aclosing(self._jobs.watch(job_id, after_sequence, deadline)) as events:
            async for event in events:
                yield event

    async def cancel_job(self, caller: Caller, job_id: str) -> Job:
        return await self._within(caller, self._jobs.cancel(job_id))

    # Backends

    async def list_backends(self, caller: Caller) -> tuple[Backend, ...]:
        return self._book.list()

    async def tokenize(self, caller: Caller, backend: str, texts: Sequence[str]) -> TokenizeAnswer:
        """Texts as a backend's tokenizer cuts them: callers have none, and write questions in ids with it."""
        question = TokenizeQuestion(tuple(Input(text=text) for text in texts))
        scorer = self._book.scorer(backend)
        return await self._within(caller, ask_one(scorer, question, deadline=self._deadline(caller)))

    # Cases

    async def list_cases(self, caller: Caller, page_size: int = 100, page_token: str = "", tag: str = "") -> Page[Case]:
        return await self._within(caller, self._store.list_cases(page_size, page_token, tag))

    async def get_case(self, caller: Caller, name: str) -> Case:
        return await self._within(caller, self._store.get_case(name))

    async def create_case(self, caller: Caller, case: Case) -> Case:
        check_case(case)
        return await self._within(caller, self._store.create_case(case))

    async def update_case(self, caller: Caller, case: Case, expected_revision: int) -> Case:
        check_case(case)
        return await self._within(caller, self._store.update_case(case, expected_revision))

    async def delete_case(self, caller: Caller, name: str, expected_revision: int) -> None:
        await self._within(caller, self._store.delete_case(name, expected_revision))

    # Within

    def _deadline(self, caller: Caller) -> float:
        """Something bounds every call."""
        now = time.monotonic()
        asked = now + self._settings.call_seconds if caller.deadline is None else caller.deadline
        return min(asked, now + self._settings.max_call_seconds)

    async def _within(self, caller: Caller, work: Awaitable[T]) -> T:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(loop.time() + self._deadline(caller) - time.monotonic()):
                return await work
        except TimeoutError:
            raise _too_late("this was done") from None

    async def _check_work(self, work: Work) -> None:
        """What can be refused now is not left to a job."""
        match work:
            case CaseRun():
                work = plan_of(await self._store.get_case(work.name))
            case RunPlan():
                check_run(work, self._settings)
                if work.benchmark is None or work.benchmark.fallback in {Fallback.NONE, Fallback.AUTO}:
                    await check_side(self._book, self._store, work.side, "side")
                return
            case ComparePlan():
                if not work.store:
                    message = "a job that keeps nothing has no result; leave `discard` out, or call Compare"
                    raise InvalidArgument(Reason.CONFLICT, message, field="discard")
        check_plan(work, self._settings)
        await check_side(self._book, self._store, work.left, "left")
        await check_side(self._book, self._store, work.right, "right")

    async def _perform(self, job_id: str, text: str, progress: Progress) -> JobResult:
        """The work of a job."""
        work = await asyncio.to_thread(read_work, text)
        if isinstance(work, RunPlan):
            outcome = await self._running.run(work, progress, job_id)
            return JobResult("", problem=outcome.problem, is_kept=True)
        plan = plan_of(await self._store.get_case(work.name)) if isinstance(work, CaseRun) else work
        return await self._compare_for_job(job_id, plan, progress)

    async def _compare_for_job(self, job_id: str, plan: ComparePlan, progress: Progress) -> JobResult:
        deadline = time.monotonic() + min(self._settings.max_call_seconds, self._settings.max_job_seconds)
        tokens = 0
        async with aclosing(self._comparing.compare(plan, deadline, job_id)) as told:
            async for one in told:
                if isinstance(one, TokenPairs):
                    tokens += len(one.token_ids)
                    progress(tokens, 0, "tokens on both sides")
        return JobResult("", is_kept=True)


def plan_of(case: Case) -> ComparePlan:
    return ComparePlan(
        question=case.question,
        left=case.left,
        right=case.right,
        tolerance=case.tolerance,
        policy=case.policy,
        case=case.name,
    )


def check_case(case: Case) -> None:
    """A coordinator can only run what it knows by name."""
    for name, side in (("left", case.left), ("right", case.right)):
        split_target(side.target, f"{name}.target")
        check_mask(side, name)


def _too_late(what: str) -> DeadlineExceeded:
    return DeadlineExceeded(Reason.DEADLINE, f"the deadline passed before {what}; allow more time, then ask again")
