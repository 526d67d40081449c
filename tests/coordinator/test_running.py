"""Runs: real backends only in mode score, repeats and figures in mode benchmark, and what may stand in there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.benchmarking import LEAST_WIDTH, MAX_FAKE_LOGITS, MAX_FAKE_VOCABULARY
from coordinator.operations import Operations
from coordinator.running import check_run
from coordinator.settings import CoordinatorSettings
from dualtrace.compare.gates import GateName, GatePolicy, GateVerdict
from dualtrace.engine import int_array
from dualtrace.library import BenchmarkPlan, ComparePlan, Fallback, Job, JobState, RunMode, RunPlan, RunRecord, SideSpec
from dualtrace.problems import FailedPrecondition, InvalidArgument, NotFound, Reason
from dualtrace.questions.asked import Input, LogprobQuestion, RollingQuestion, ScoreQuestion, TokenizeQuestion
from dualtrace.runs.run import AskedQuestion, ScoredItem, ScoreEntry
from dualtrace.scorer import Scorer
from dualtrace.v1 import scoring_pb2 as pb
from tests.support.desk import ANYONE, Desk, desk_of, fake_side, rolling
from tests.support.scorers import only

TORCH = SideSpec("backend:torch")


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with desk_of(tmp_path, {"torch": fake_side()}, absent=("gone",)) as opened:
        yield opened


def score(**fields: Any) -> ScoreQuestion:
    items = (Input(ids=int_array([5, 6])), Input(ids=int_array([7])))
    return ScoreQuestion(**{"query": Input(ids=int_array([1, 2, 3])), "items": items, "labels": (8, 9), **fields})


def asked(question: AskedQuestion | None = None, side: SideSpec = TORCH, **fields: Any) -> RunPlan:
    return RunPlan(rolling(40) if question is None else question, side, **fields)


def timed(side: SideSpec = TORCH, question: AskedQuestion | None = None, **fields: Any) -> RunPlan:
    benchmark = BenchmarkPlan(**{"repeats": 5, "warm_up": 2, **fields})
    return asked(question, side, mode=RunMode.BENCHMARK, benchmark=benchmark)


async def done(desk: Desk, plan: RunPlan) -> Job:
    return (await desk.finish(await desk.operations.start_job(ANYONE, "run", plan)))[-1].job


async def kept(desk: Desk, plan: RunPlan) -> RunRecord:
    job = await done(desk, plan)
    assert job.run_id is not None, job
    return await desk.store.get_run(job.run_id)


# Mode score


async def test_a_run_is_kept_with_what_it_was_asked_and_who_answered(desk: Desk) -> None:
    record = await kept(desk, asked())
    assert (record.mode, record.target, record.run.complete) == (RunMode.SCORE, "backend:torch", True)
    assert record.run.provenance.framework == "fake"
    assert record.run.execution is not None


async def test_a_score_run_holds_the_labels_scores(desk: Desk) -> None:
    record = await kept(desk, asked(score(apply_softmax=True)))
    entries = only(list(record.run.entries), ScoreEntry)
    assert [round(sum(entry.scores), 9) for entry in entries] == [1.0, 1.0]
    assert (record.token_debug, record.mrr) == (None, None)


async def test_token_debug_scores_the_items_own_tokens(desk: Desk) -> None:
    record = await kept(desk, asked(score(), token_debug=True))
    assert record.token_debug is not None
    assert isinstance(record.token_debug.question, LogprobQuestion)
    items = only(list(record.token_debug.entries), ScoredItem)
    scored = [[one for one, value in zip(item.token_ids, item.token_logprobs, strict=True) if value is not None]
              for item in items]  # fmt: skip
    assert scored == [[5, 6], [7]]
    assert record.mrr is not None


async def test_an_item_that_stands_first_has_nothing_before_it(desk: Desk) -> None:
    record = await kept(desk, asked(score(item_first=True), token_debug=True))
    assert record.token_debug is not None
    assert [item.token_ids for item in only(list(record.token_debug.entries), ScoredItem)] == [(5, 6), (7,)]


async def test_the_raw_request_is_the_score_request(desk: Desk) -> None:
    record = await kept(desk, asked(score(), token_debug=True))
    raw = b"".join([part async for part in desk.operations.read_artifact(ANYONE, record.raw_request_ref)])
    assert list(pb.ScoreRequest.FromString(raw).query.ids.ids) == [1, 2, 3]


async def test_nothing_raw_is_kept_where_that_is_switched_off(tmp_path: Path) -> None:
    async with desk_of(tmp_path, {"torch": fake_side()}, tape_megabytes=0) as desk:
        record = await kept(desk, asked())
    assert (record.raw_request_ref, record.raw_response_ref) == ("", "")


async def test_equal_inputs_have_equal_hashes_and_another_configuration_another(desk: Desk) -> None:
    plain = await kept(desk, asked(score()))
    debug = await desk.operations.start_job(ANYONE, "debug", asked(score(), token_debug=True))
    other = await desk.store.get_run((await desk.finish(debug))[-1].job.run_id or "")
    assert plain.input_hash == other.input_hash
    assert plain.config_hash != other.config_hash


async def test_tokenize_is_a_run_too(desk: Desk) -> None:
    record = await kept(desk, asked(TokenizeQuestion((Input(text="ab"),))))
    assert record.run.complete


async def test_a_missing_backend_fails_loudly_in_mode_score(desk: Desk) -> None:
    job = await done(desk, asked(side=SideSpec("backend:gone")))
    assert job.state is JobState.FAILED
    assert job.problem is not None
    assert job.problem.reason == Reason.UNREACHABLE.value


async def test_an_answer_that_breaks_off_is_kept_as_such_and_the_job_fails(tmp_path: Path) -> None:
    async with desk_of(tmp_path, {"torch": fake_side(step=32, step_ms=60)}) as desk:
        job = await done(desk, asked(rolling(3000), timeout_seconds=0.5))
        assert job.run_id is not None
        record = await desk.store.get_run(job.run_id)
    assert (job.state, record.run.complete) == (JobState.FAILED, False)
    assert job.problem is not None
    assert job.problem.reason == Reason.DEADLINE.value


async def test_a_stored_run_is_not_asked_again(desk: Desk) -> None:
    with pytest.raises(InvalidArgument):
        await desk.operations.start_job(ANYONE, "run", asked(side=SideSpec("run:run-0")))


async def test_an_unknown_backend_is_refused_at_once(desk: Desk) -> None:
    with pytest.raises(NotFound):
        await desk.operations.start_job(ANYONE, "run", asked(side=SideSpec("backend:tpu")))


@pytest.mark.parametrize(
    "plan",
    [
        asked(token_debug=True),
        asked(mode=RunMode.BENCHMARK),
        asked(benchmark=BenchmarkPlan()),
        timed(repeats=0),
        timed(concurrency=1000),
        timed(warm_up=-1),
        replace(timed(question=score()), token_debug=True),
        asked(timeout_seconds=0.0),
    ],
)
async def test_a_run_that_makes_no_sense_is_refused(desk: Desk, plan: RunPlan) -> None:
    with pytest.raises(InvalidArgument):
        await desk.operations.start_job(ANYONE, "run", plan)


# Mode benchmark


async def test_a_benchmark_times_its_repeats_and_not_the_warm_up(desk: Desk) -> None:
    record = await kept(desk, timed())
    figures = record.benchmark
    assert figures is not None
    assert (len(figures.warm_up_ms), len(figures.latencies_ms), figures.source) == (2, 5, "real")
    assert figures.p50_ms is not None
    assert figures.p95_ms is not None
    assert min(figures.latencies_ms) <= figures.p50_ms <= figures.p95_ms <= max(figures.latencies_ms)


async def test_throughput_counts_all_answered_calls(desk: Desk) -> None:
    figures = (await kept(desk, timed())).benchmark
    assert figures is not None
    assert figures.tokens_per_second == pytest.approx(40 * figures.calls_per_second)


async def test_so_many_calls_run_at_a_time(tmp_path: Path) -> None:
    scorer = CountingScorer()
    async with desk_of(tmp_path, {"torch": scorer}) as desk:
        await kept(desk, timed(repeats=12, warm_up=0, concurrency=3))
    assert scorer.most == 3


class CountingScorer:
    """The fake engine, which counts who is in at once and fails so many calls."""

    def __init__(self, failing: int = 0) -> None:
        self._inner = fake_side()
        self._inside = 0
        self._failing = failing
        self.most = 0

    async def describe(self) -> Any:
        return await self._inner.describe()

    async def close(self) -> None:
        await self._inner.close()

    async def ask(self, question: Any, *, deadline: float | None = None) -> AsyncIterator[Any]:
        is_ours = not hasattr(question, "views")
        if is_ours and self._failing:
            self._failing -= 1
            raise FailedPrecondition(Reason.NOT_READY, "not today")
        self._inside += is_ours
        self.most = max(self.most, self._inside)
        try:
            await asyncio.sleep(0.03)
            async for event in self._inner.ask(question, deadline=deadline):
                yield event
        finally:
            self._inside -= is_ours


async def test_failed_calls_are_counted_and_the_first_is_told(tmp_path: Path) -> None:
    async with desk_of(tmp_path, {"torch": CountingScorer(failing=2)}) as desk:
        figures = (await kept(desk, timed(repeats=8, warm_up=0))).benchmark
    assert figures is not None
    assert (figures.failures, figures.failure_rate, len(figures.latencies_ms)) == (2, 0.25, 6)
    assert figures.first_failure is not None
    assert figures.first_failure.message == "not today"


async def test_a_benchmark_in_which_every_call_fails_is_kept_and_fails(tmp_path: Path) -> None:
    async with desk_of(tmp_path, {"torch": CountingScorer(failing=99)}) as desk:
        job = await done(desk, timed(warm_up=0))
        record = await desk.store.get_run(job.run_id or "")
    assert job.state is JobState.FAILED
    assert record.benchmark is not None
    assert (record.benchmark.failure_rate, record.benchmark.p50_ms, record.run.complete) == (1.0, None, False)


async def test_a_benchmark_that_takes_too_long_keeps_what_was_timed_and_says_so(tmp_path: Path) -> None:
    async with desk_of(tmp_path, {"torch": CountingScorer()}, max_job_seconds=0.5) as desk:
        job = await done(desk, timed(repeats=1000, warm_up=0, concurrency=2))
        figures = (await desk.store.get_run(job.run_id or "")).benchmark
    assert job.problem is not None
    assert (job.state, job.problem.reason) == (JobState.FAILED, Reason.DEADLINE.value)
    assert figures is not None
    assert f"{len(figures.latencies_ms)} of 1000" in job.problem.message
    assert (0 < len(figures.latencies_ms) < 100, figures.failures) == (True, 0)


async def test_a_benchmark_that_takes_too_long_counts_its_failures_by_the_calls_it_made(tmp_path: Path) -> None:
    async with desk_of(tmp_path, {"torch": CountingScorer(failing=2)}, max_job_seconds=0.5) as desk:
        job = await done(desk, timed(repeats=1000, warm_up=0))
        figures = (await desk.store.get_run(job.run_id or "")).benchmark
    assert figures is not None
    assert figures.failure_rate == 2 / (2 + len(figures.latencies_ms))


async def test_a_benchmark_that_takes_too_long_to_warm_up_keeps_nothing(tmp_path: Path) -> None:
    async with desk_of(tmp_path, {"torch": CountingScorer()}, max_job_seconds=0.2) as desk:
        job = await done(desk, timed(repeats=1, warm_up=1000))
    assert job.problem is not None
    assert (job.run_id, job.problem.reason) == (None, Reason.DEADLINE.value)


async def test_a_timing_harness_that_never_waits_lets_others_have_their_turn(tmp_path: Path) -> None:
    async with desk_of(tmp_path, {}, absent=("gone",), max_job_seconds=0.3) as desk:
        plan = timed(SideSpec("backend:gone"), repeats=100_000, warm_up=0, fallback=Fallback.BENCH)
        job = await done(desk, plan)
        figures = (await desk.store.get_run(job.run_id or "")).benchmark
    assert figures is not None
    assert len(figures.latencies_ms) < 100_000  # they would take many seconds


async def test_without_a_fallback_a_missing_backend_fails_a_benchmark(desk: Desk) -> None:
    assert (await done(desk, timed(SideSpec("backend:gone")))).state is JobState.FAILED


@pytest.mark.parametrize(
    ("name", "fallback", "source", "synthetic"),
    [
        ("gone", Fallback.AUTO, "mock", True),
        ("torch", Fallback.AUTO, "real", True),  # the fake engine stands behind it, and says so itself
        ("torch", Fallback.MOCK, "mock", True),
        ("torch", Fallback.BENCH, "bench", True),
    ],
)
async def test_what_stands_in_is_named(desk: Desk, name: str, fallback: Fallback, source: str, synthetic: bool) -> None:
    record = await kept(desk, timed(SideSpec(f"backend:{name}"), fallback=fallback))
    assert record.benchmark is not None
    assert (record.benchmark.source, record.synthetic) == (source, synthetic)


@pytest.mark.parametrize("fallback", [Fallback.MOCK, Fallback.BENCH])
@pytest.mark.parametrize("question", [rolling(40), score(), score(labels=(70_000,))], ids=["rolling", "score", "wide"])
async def test_a_stand_in_answers_every_id_that_is_asked(desk: Desk, fallback: Fallback, question: Any) -> None:
    record = await kept(desk, timed(question=question, fallback=fallback))
    assert record.run.complete
    assert not record.run.problems


HUGE_ID = Input(ids=int_array([MAX_FAKE_VOCABULARY]))
TOO_MUCH = RollingQuestion(
    inputs=(Input(ids=int_array([MAX_FAKE_VOCABULARY - 1] * (1 + MAX_FAKE_LOGITS // MAX_FAKE_VOCABULARY))),)
)


@pytest.mark.parametrize("fallback", [Fallback.MOCK, Fallback.BENCH])
@pytest.mark.parametrize(
    ("question", "reason"),
    [
        (RollingQuestion(inputs=(HUGE_ID,)), Reason.TOKEN_OUT_OF_RANGE),
        (score(labels=(MAX_FAKE_VOCABULARY,)), Reason.TOKEN_OUT_OF_RANGE),
        (TOO_MUCH, Reason.TOO_MANY),
        (RollingQuestion(inputs=(Input(text="x" * (1 + MAX_FAKE_LOGITS // LEAST_WIDTH)),)), Reason.TOO_MANY),
    ],
)
async def test_a_stand_in_is_refused_at_once_what_would_hold_the_coordinator_up(
    desk: Desk, fallback: Fallback, question: AskedQuestion, reason: Reason
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await desk.operations.start_job(ANYONE, "run", timed(question=question, fallback=fallback))
    assert caught.value.reason is reason


async def test_a_real_backend_is_asked_what_a_stand_in_would_be_refused() -> None:
    for fallback in (Fallback.NONE, Fallback.AUTO):
        check_run(timed(question=TOO_MUCH, fallback=fallback), CoordinatorSettings())


async def test_a_stand_in_that_is_asked_too_much_in_the_end_fails_its_job(desk: Desk) -> None:
    gone = SideSpec("backend:gone")
    job = await done(desk, timed(gone, question=TOO_MUCH, fallback=Fallback.AUTO))
    assert job.problem is not None
    assert job.problem.reason == Reason.TOO_MANY.value


async def test_a_stand_in_is_shown_in_the_list_of_runs(desk: Desk) -> None:
    await kept(desk, timed(fallback=Fallback.MOCK))
    (summary,) = (await desk.operations.list_runs(ANYONE)).entries
    assert summary.synthetic


# Two benchmarks against each other


async def benchmark_ids(operations: Operations, desk: Desk, *names: str) -> list[str]:
    found = []
    for name in names:
        job = await operations.start_job(ANYONE, name, timed(SideSpec(f"backend:{name}"), repeats=20, warm_up=1))
        found.append((await desk.finish(job))[-1].job.run_id or "")
    return found


async def test_a_slower_right_side_fails_the_latency_gate(tmp_path: Path) -> None:
    scorers: dict[str, Scorer] = {"fast": fake_side(), "slow": fake_side(step_ms=30)}
    async with desk_of(tmp_path, scorers) as desk:
        left, right = await benchmark_ids(desk.operations, desk, "fast", "slow")
        pair = ComparePlan(None, SideSpec(f"run:{left}"), SideSpec(f"run:{right}"), policy=GatePolicy())
        _, outcome = await desk.compare(pair)
    assert outcome.report.benchmark is not None
    assert outcome.report.benchmark.left_samples == 20
    latency = next(gate for gate in outcome.report.gates if gate.gate is GateName.LATENCY)
    assert latency.verdict is GateVerdict.FAIL


async def test_a_failing_right_side_fails_the_failure_gate(tmp_path: Path) -> None:
    scorers: dict[str, Scorer] = {"good": CountingScorer(), "bad": CountingScorer(failing=5)}
    async with desk_of(tmp_path, scorers) as desk:
        left, right = [
            (await desk.finish(await desk.operations.start_job(
                ANYONE, name, timed(SideSpec(f"backend:{name}"), repeats=8, warm_up=0))))[-1].job.run_id
            for name in ("good", "bad")
        ]  # fmt: skip
        _, outcome = await desk.compare(ComparePlan(None, SideSpec(f"run:{left}"), SideSpec(f"run:{right}")))
    failure = next(gate for gate in outcome.report.gates if gate.gate is GateName.FAILURE_RATE)
    assert failure.verdict is GateVerdict.FAIL
