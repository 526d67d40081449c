"""Runs: one side's answer, kept. Mode score asks a real backend once; mode benchmark asks many times and times it.

It knows backends, scorers and the store. It must not know comparisons, jobs or the wire.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from coordinator.backends import BackendBook
from coordinator.benchmarking import Bench, Tally, check_benchmark, check_mock, harness_scorer, mock_scorer, summarise
from coordinator.comparing import check_seconds
from coordinator.masks import check_mask
from coordinator.recording import Recipe, keep_tape, make_record, under
from coordinator.settings import CoordinatorSettings
from coordinator.sides import split_target
from coordinator.store import JobEnd, Store, new_run_id
from dualtrace.client import Client
from dualtrace.engine import int_array
from dualtrace.fanout import tell_bug
from dualtrace.library import BenchmarkPlan, Fallback, JobState, RunMode, RunPlan, RunRecord
from dualtrace.metrics import CoordinatorMetrics
from dualtrace.model_card import ModelProvenance
from dualtrace.problems import (
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    Problem,
    Reason,
    Unavailable,
)
from dualtrace.questions.answers import TokenChunk
from dualtrace.questions.asked import Input, LogprobItem, LogprobQuestion, ScoreQuestion
from dualtrace.runs.collector import RunCollector
from dualtrace.runs.run import AskedQuestion, Run
from dualtrace.scorer import Scorer
from dualtrace.tape import Tape

Progress = Callable[[int, int, str], None]
"""Told done, total (0: unknown) and the unit."""


@dataclass(frozen=True)
class RunOutcome:
    """What was kept, and why it is not whole."""

    record: RunRecord
    problem: Problem | None


@dataclass
class _Source:
    """Who answers a benchmark."""

    scorer: Scorer
    name: str  # "real", "mock" or "bench"
    provenance: ModelProvenance
    is_ours: bool  # ours to close
    tape: Tape | None = None


class Running:
    def __init__(
        self, store: Store, book: BackendBook, settings: CoordinatorSettings, metrics: CoordinatorMetrics
    ) -> None:
        self._store = store
        self._book = book
        self._settings = settings
        self._metrics = metrics

    async def run(self, plan: RunPlan, progress: Progress, job_id: str) -> RunOutcome:
        """Ask, and keep what came together with the end of the job. What brings nothing raises."""
        check_run(plan, self._settings)
        outcome = await (self._benchmark if plan.mode is RunMode.BENCHMARK else self._score)(plan, progress)
        problem = outcome.problem
        state = JobState.DONE if problem is None else JobState.FAILED
        message = "done" if problem is None else f"failed: {problem.detail.message}"
        await self._store.add_run(outcome.record, JobEnd(job_id, state, message, problem))
        self._metrics.stored_runs.inc()
        return outcome

    async def _score(self, plan: RunPlan, progress: Progress) -> RunOutcome:
        """Real backends only: one that is missing is an error, never a stand-in."""
        client = self._book.scorer(_backend_of(plan))
        tape = self._new_tape()
        deadline = time.monotonic() + self._call_seconds(plan)
        question = under(plan.question, plan.side.variant)
        provenance = (await client.describe(deadline=deadline)).provenance
        collector = RunCollector(plan.side.target, question, provenance=provenance)
        debug_collector: RunCollector | None = None
        problem: Problem | None = None
        try:
            await _collect(_taped(client, tape), question, collector, deadline, progress)
            if plan.token_debug:
                asked = own_tokens(question)
                debug_collector = RunCollector(plan.side.target, asked, provenance=provenance)
                await _collect(client, asked, debug_collector, deadline, progress)
        except Problem as error:
            problem = error
        except Exception as error:  # noqa: BLE001 - an answer that nobody foresaw is the backend's failure
            problem = tell_bug(error, plan.side.target)
        run = collector.run()
        if problem is not None and not run.entries:
            raise problem
        debug = None if debug_collector is None else debug_collector.run()
        raw = await keep_tape(self._store, tape)
        recipe = Recipe(plan.mode, token_debug=plan.token_debug)
        record = await asyncio.to_thread(make_record, new_run_id(), run, recipe, token_debug=debug, raw=raw)
        return RunOutcome(record, problem)

    async def _benchmark(self, plan: RunPlan, progress: Progress) -> RunOutcome:
        assert plan.benchmark is not None, "checked"
        begun = time.monotonic()
        question = under(plan.question, plan.side.variant)
        total = plan.benchmark.repeats + plan.benchmark.warm_up
        source = await self._find_source(plan, plan.benchmark, question)
        try:
            bench = Bench(source.scorer, plan.side.target, question, source.provenance, self._call_seconds(plan))
            most_seconds = begun + self._settings.max_job_seconds - time.monotonic()
            tally = await bench.measure(plan.benchmark, lambda done: progress(done, total, "calls"), most_seconds)
        except* Problem as group:  # of the warm-up alone: a repeat that fails is counted
            raise group.exceptions[0] from None
        finally:
            if source.is_ours:
                await source.scorer.close()
        problem = self._find_fault(tally, plan.benchmark)
        if problem is not None and not tally.repeats:
            raise problem
        run = tally.last_run or _empty_run(plan, question, source.provenance)
        figures = summarise(tally, plan.benchmark, source.name)
        raw = await keep_tape(self._store, source.tape)
        recipe = Recipe(plan.mode, benchmark=plan.benchmark)
        record = await asyncio.to_thread(make_record, new_run_id(), run, recipe, benchmark=figures, raw=raw)
        return RunOutcome(record, problem)

    async def _find_source(self, plan: RunPlan, benchmark: BenchmarkPlan, question: AskedQuestion) -> _Source:
        """Who answers: what was asked for, or what may stand in for it, which is then named as such."""
        if benchmark.fallback in {Fallback.NONE, Fallback.AUTO}:
            try:
                return await self._find_real(plan)
            except (Unavailable, FailedPrecondition):
                if benchmark.fallback is Fallback.NONE:
                    raise
        if benchmark.fallback is Fallback.BENCH:
            harness = await harness_scorer(question)
            return _Source(harness, "bench", harness.run.provenance, is_ours=True)
        mock = await asyncio.to_thread(mock_scorer, question)
        return _Source(mock, "mock", (await mock.describe()).provenance, is_ours=True)

    async def _find_real(self, plan: RunPlan) -> _Source:
        client = self._book.scorer(_backend_of(plan))
        tape = self._new_tape()
        card = await client.describe(deadline=time.monotonic() + self._call_seconds(plan))
        return _Source(_taped(client, tape), "real", card.provenance, is_ours=False, tape=tape)

    def _call_seconds(self, plan: RunPlan) -> float:
        settings = self._settings
        asked = plan.timeout_seconds or settings.call_seconds
        return min(asked, settings.max_call_seconds, settings.max_job_seconds)

    def _find_fault(self, tally: Tally, asked: BenchmarkPlan) -> Problem | None:
        """Why a benchmark is not whole."""
        if tally.is_cut:
            most = f"max_job_seconds {self._settings.max_job_seconds:g}"
            message = (
                f"the benchmark was stopped at {most}: {len(tally.latencies_ms)} of {asked.repeats} calls are timed"
            )
            return DeadlineExceeded(Reason.DEADLINE, f"{message}; ask fewer, or have the limit raised")
        if tally.latencies_ms:
            return None
        return tally.first_failure or Internal(Reason.BUG, "no call was made")

    def _new_tape(self) -> Tape | None:
        return Tape(self._settings.tape_megabytes << 20) if self._settings.tape_megabytes else None


def check_run(plan: RunPlan, settings: CoordinatorSettings) -> None:
    """What can be refused without asking anybody."""
    kind, _ = split_target(plan.side.target, "side.target")
    check_mask(plan.side, "side")
    if kind == "run":
        message = f"{plan.side.target} is stored and is not asked again; name a backend, or compare the run with one"
        raise InvalidArgument(Reason.CONFLICT, message, field="side.target", allowed="backend:NAME")
    if (plan.mode is RunMode.BENCHMARK) != (plan.benchmark is not None):
        message = "mode BENCHMARK and its options go together; in mode SCORE nothing is repeated and nothing stands in"
        raise InvalidArgument(Reason.CONFLICT, message, field="benchmark")
    if plan.benchmark is not None:
        check_benchmark(plan.benchmark, settings.max_benchmark_calls)
        if plan.benchmark.fallback in {Fallback.MOCK, Fallback.BENCH}:
            check_mock(plan.question)
    if plan.token_debug and (not isinstance(plan.question, ScoreQuestion) or plan.mode is not RunMode.SCORE):
        message = "token_debug scores the items' own tokens of a SCORE question in mode SCORE; leave it out"
        raise InvalidArgument(Reason.CONFLICT, message, field="token_debug")
    check_seconds(plan.timeout_seconds)


def own_tokens(question: AskedQuestion) -> LogprobQuestion:
    """The items' own tokens: prompt = query, completion = item. An item that stands first has nothing before it."""
    assert isinstance(question, ScoreQuestion), "checked"
    nothing = Input(text="") if question.query.text is not None else Input(ids=int_array([]))
    prompt = nothing if question.item_first else question.query
    return LogprobQuestion(
        items=tuple(LogprobItem(prompt, item) for item in question.items),
        variants=question.variants,
        deterministic=question.deterministic,
    )


async def _collect(
    scorer: Scorer, question: AskedQuestion, collector: RunCollector, deadline: float, progress: Progress
) -> None:
    asked: Any = scorer.ask(question, deadline=deadline)
    async with aclosing(asked) as told:
        async for event in told:
            collector.push(event)
            if isinstance(event, TokenChunk):
                progress(collector.scored_tokens, 0, "tokens")


def _taped(client: Client, tape: Tape | None) -> Client:
    return client if tape is None else client.taped(tape)


def _backend_of(plan: RunPlan) -> str:
    return split_target(plan.side.target, "side.target")[1]


def _empty_run(plan: RunPlan, question: AskedQuestion, provenance: ModelProvenance) -> Run:
    """Of a benchmark in which no call was answered: what was asked of whom, and nothing else."""
    return RunCollector(plan.side.target, question, provenance=provenance).run()
