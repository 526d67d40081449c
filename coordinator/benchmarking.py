"""The same question many times, timed: warm-up apart, so many at a time, figures of the repeats alone.

It knows Scorers and clocks. It must not know where an answer is kept or who asks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dualtrace.comparing.tokenized_question import inputs_of
from dualtrace.engine_scorer import EngineScorer
from dualtrace.fake import FakeEngine, FakeSpec, fake_tokenizer
from dualtrace.fanout import tell_bug
from dualtrace.library import BenchmarkFigures, BenchmarkPlan
from dualtrace.model_card import ModelProvenance
from dualtrace.problems import InvalidArgument, Problem, Reason
from dualtrace.questions.asked import (
    ForwardQuestion,
    Input,
    MaskedForwardQuestion,
    NextTokenQuestion,
    ScoreQuestion,
    TokenizeQuestion,
)
from dualtrace.runs.collector import RunCollector
from dualtrace.runs.run import AskedQuestion, Run, TokenizedEntry, store_problem
from dualtrace.runs.stored_scorer import StoredScorer
from dualtrace.scorer import Scorer

MAX_CONCURRENCY = 256
MAX_FAKE_VOCABULARY = 1_000_000

Tell = Callable[[int], None]
"""Told the number of calls that have ended, warm-up included."""


def check_benchmark(plan: BenchmarkPlan, most_calls: int) -> None:
    limits = (("repeats", 1, most_calls), ("warm_up", 0, most_calls), ("concurrency", 1, MAX_CONCURRENCY))
    for name, low, high in limits:
        value = getattr(plan, name)
        if not low <= value <= high:
            message = f"benchmark.{name} {value} asked; {low} to {high} are allowed"
            raise InvalidArgument(Reason.OUT_OF_RANGE, message, field=f"benchmark.{name}", allowed=f"{low}-{high}")


@dataclass
class Tally:
    """What is known so far."""

    warm_up_ms: list[float] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)
    failures: int = 0
    first_failure: Problem | None = None
    tokens: int = 0  # of prompts as composed, in repeats that were answered
    last_run: Run | None = None
    seconds: float = 0.0  # of all repeats together

    @property
    def calls(self) -> int:
        return len(self.warm_up_ms) + len(self.latencies_ms) + self.failures


class Bench:
    """One scorer, one question, many calls."""

    def __init__(
        self, scorer: Scorer, target: str, question: AskedQuestion, provenance: ModelProvenance, call_seconds: float
    ) -> None:
        self._scorer = scorer
        self._target = target
        self._question = question
        self._provenance = provenance
        self._call_seconds = call_seconds

    async def measure(self, plan: BenchmarkPlan, tell: Tell) -> Tally:
        tally = Tally()
        for _ in range(plan.warm_up):
            seconds, run = await self._call()
            tally.warm_up_ms.append(seconds * 1e3)
            tally.last_run = run
            tell(tally.calls)
        begun = time.monotonic()
        left = iter(range(plan.repeats))
        async with asyncio.TaskGroup() as group:
            for _ in range(min(plan.concurrency, plan.repeats)):
                group.create_task(self._repeat(left, tally, tell))
        tally.seconds = time.monotonic() - begun
        return tally

    async def _repeat(self, left: Any, tally: Tally, tell: Tell) -> None:
        for _ in left:
            try:
                seconds, run = await self._call()
            except Exception as error:  # noqa: BLE001 - an answer that nobody foresaw is a failed call too
                problem = error if isinstance(error, Problem) else tell_bug(error, self._target)
                tally.failures += 1
                tally.first_failure = tally.first_failure or problem
            else:
                tally.latencies_ms.append(seconds * 1e3)
                tally.tokens += count_tokens(run)
                tally.last_run = run
            tell(tally.calls)

    async def _call(self) -> tuple[float, Run]:
        """Seconds from the question to its last event. An answer is collected after the clock has stopped."""
        begun = time.monotonic()
        events = []
        asked: Any = self._scorer.ask(self._question, deadline=begun + self._call_seconds)
        async with aclosing(asked) as told:
            async for event in told:
                events.append(event)
        seconds = time.monotonic() - begun
        collector = RunCollector(self._target, self._question, provenance=self._provenance)
        for event in events:
            collector.push(event)
        return seconds, collector.run()


def count_tokens(run: Run) -> int:
    if run.usage is not None:
        return run.usage.prompt_tokens
    return sum(len(entry.token_ids) for entry in run.entries if isinstance(entry, TokenizedEntry))


def summarise(tally: Tally, plan: BenchmarkPlan, source: str) -> BenchmarkFigures:
    latencies = tally.latencies_ms
    p50, p95, p99 = (float(one) for one in np.percentile(latencies, (50, 95, 99))) if latencies else (None,) * 3
    return BenchmarkFigures(
        source=source,
        concurrency=plan.concurrency,
        warm_up_ms=tuple(tally.warm_up_ms),
        latencies_ms=tuple(latencies),
        failures=tally.failures,
        first_failure=None if tally.first_failure is None else store_problem(tally.first_failure),
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        failure_rate=tally.failures / plan.repeats,
        calls_per_second=len(latencies) / tally.seconds if tally.seconds > 0 else 0.0,
        tokens_per_second=tally.tokens / tally.seconds if tally.seconds > 0 else 0.0,
    )


def mock_scorer(question: AskedQuestion) -> EngineScorer:
    """The fake engine, wide enough for every id that the question names."""
    words = fake_tokenizer()
    width = max([words.size, *(one + 1 for one in _ids_of(question))])
    if width > MAX_FAKE_VOCABULARY:
        message = f"id {width - 1} asked; the fake engine goes up to {MAX_FAKE_VOCABULARY - 1}"
        raise InvalidArgument(Reason.TOKEN_OUT_OF_RANGE, message, allowed=f"0-{MAX_FAKE_VOCABULARY - 1}")
    return EngineScorer(FakeEngine(FakeSpec(vocab=width)), words)


def _ids_of(question: AskedQuestion) -> list[int]:
    found = [int(one) for given in all_inputs(question) if given.ids is not None for one in given.ids]
    if isinstance(question, ScoreQuestion):
        found += [*(question.labels or ()), *(one for labels in question.item_labels or () for one in labels)]
    if isinstance(question, NextTokenQuestion):
        found += question.extra_token_ids
    return found


def all_inputs(question: AskedQuestion) -> tuple[Input, ...]:
    return question.inputs if isinstance(question, TokenizeQuestion) else tuple(inputs_of(question))


async def harness_scorer(question: AskedQuestion) -> StoredScorer:
    """No model and no scorer: one answer made beforehand and told again and again, to time ourselves."""
    if not isinstance(question, ForwardQuestion) or isinstance(question, MaskedForwardQuestion):
        message = (
            f"{question.kind.value} asked; the timing harness replays LOGPROB, ROLLING_LOGPROB, NEXT_TOKEN_DIST, SCORE"
        )
        raise InvalidArgument(Reason.CONFLICT, message, field="benchmark.fallback")
    scorer = mock_scorer(question)
    try:
        collector = RunCollector("bench", question)
        async for event in scorer.ask(question):
            collector.push(event)
    finally:
        await scorer.close()
    made = collector.run()
    return StoredScorer(replace(made, provenance=replace(made.provenance, model_id="bench")), "the timing harness", 0)
