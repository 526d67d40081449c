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
MAX_FAKE_VOCABULARY = 1 << 18  # ids: no tokenizer in use has more
MAX_FAKE_LOGITS = 1 << 28  # of one call, ids times tokens: some seconds of one core
LEAST_WIDTH = 512  # what the fake engine's own tokenizer needs, at least
STEP_LOGITS = 1 << 21  # of one step: 16 MiB

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
    is_cut: bool = False  # the time was up before all calls were made

    @property
    def repeats(self) -> int:
        return len(self.latencies_ms) + self.failures

    @property
    def calls(self) -> int:
        return len(self.warm_up_ms) + self.repeats


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

    async def measure(self, plan: BenchmarkPlan, tell: Tell, seconds: float) -> Tally:
        """So many calls as can be made in `seconds`. Those that were under way at their end count as not made."""
        tally = Tally()
        try:
            async with asyncio.timeout(seconds) as time_left:
                await self._measure(plan, tell, tally)
        except TimeoutError:
            if not time_left.expired():
                raise
            tally.is_cut = True
        return tally

    async def _measure(self, plan: BenchmarkPlan, tell: Tell, tally: Tally) -> None:
        for _ in range(plan.warm_up):
            seconds, run = await self._call()
            tally.warm_up_ms.append(seconds * 1e3)
            tally.last_run = run
            tell(tally.calls)
        begun = time.monotonic()
        left = iter(range(plan.repeats))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(plan.concurrency, plan.repeats)):
                    group.create_task(self._repeat(left, tally, tell))
        finally:
            tally.seconds = time.monotonic() - begun

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
        await asyncio.sleep(0)  # the timing harness waits for nothing: let others have their turn
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
        failure_rate=tally.failures / tally.repeats,
        calls_per_second=len(latencies) / tally.seconds if tally.seconds > 0 else 0.0,
        tokens_per_second=tally.tokens / tally.seconds if tally.seconds > 0 else 0.0,
    )


def mock_scorer(question: AskedQuestion) -> EngineScorer:
    """The fake engine, wide enough for every id that the question names. It takes long to make."""
    check_mock(question)
    words = fake_tokenizer()
    width = max(words.size, _width_of(question))
    step = max(1, min(FakeSpec.step, STEP_LOGITS // width))
    return EngineScorer(FakeEngine(FakeSpec(vocab=width, step=step, share=0)), words)  # unshared: no row is read late


def check_mock(question: AskedQuestion) -> None:
    """Refuse what would hold the coordinator up: the fake engine works here, at the width of the caller's ids."""
    width = _width_of(question)
    if width > MAX_FAKE_VOCABULARY:
        message = f"id {width - 1} asked; the fake engine goes up to {MAX_FAKE_VOCABULARY - 1}; name a real backend"
        raise InvalidArgument(Reason.TOKEN_OUT_OF_RANGE, message, allowed=f"0-{MAX_FAKE_VOCABULARY - 1}")
    most = MAX_FAKE_LOGITS // max(LEAST_WIDTH, width)
    tokens = sum(_most_tokens(given) for given in all_inputs(question))
    if tokens > most:
        message = f"{tokens} tokens asked; at the width of these ids the fake engine takes {most}: ask fewer"
        raise InvalidArgument(Reason.TOO_MANY, f"{message}, or name a real backend", allowed=f"0-{most}")


def _width_of(question: AskedQuestion) -> int:
    return 1 + max(_ids_of(question), default=-1)


def _most_tokens(given: Input) -> int:
    """Of a text at most its bytes: the fake engine's tokenizer is byte-level."""
    return len(given.ids) if given.ids is not None else len((given.text or "").encode("utf-8", "replace"))


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
    scorer = await asyncio.to_thread(mock_scorer, question)
    try:
        collector = RunCollector("bench", question)
        async for event in scorer.ask(question):
            collector.push(event)
    finally:
        await scorer.close()
    made = collector.run()
    return StoredScorer(replace(made, provenance=replace(made.provenance, model_id="bench")), "the timing harness", 0)
