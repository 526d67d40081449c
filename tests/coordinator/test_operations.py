"""Operations: comparisons streamed, judged and kept; what is refused; what a failing side leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from coordinator.comparing import CompareOutcome
from coordinator.operations import Caller, CaseRun
from coordinator.recording import RawBytes
from dualtrace.card import Card
from dualtrace.compare.events import CompareHeader, FirstDivergence, SideFailed, TokenPairs
from dualtrace.compare.report import Verdict
from dualtrace.compare.sides import SideName
from dualtrace.compare.tolerance import Tolerance
from dualtrace.engine import int_array
from dualtrace.library import Case, ComparePlan, JobState, RunPlan, SideSpec
from dualtrace.masks.spec import All, AnyOf, Array, Causal, Expression, MaskSpec, Minus, Not
from dualtrace.problems import (
    DeadlineExceeded,
    Exhausted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Problem,
    Reason,
)
from dualtrace.questions.answers import AnswerEvent, AnswerSummary, TokenChunk
from dualtrace.questions.asked import Input, NextTokenQuestion, Question, Variant
from dualtrace.runs.run import ScoredItem
from dualtrace.scorer import Scorer
from dualtrace.tape import split_responses
from dualtrace.v1 import scoring_pb2 as pb
from tests.support.desk import ANYONE, Desk, desk_of, fake_side, plan, rolling, twins, wait_until
from tests.support.scorers import only

PLANTED = 137


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    """Two backends of the same numbers."""
    async with desk_of(tmp_path, twins()) as opened:
        yield opened


# What a comparison tells


async def test_two_equal_backends_pass(desk: Desk) -> None:
    _, outcome = await desk.compare(plan())
    assert (outcome.report.verdict, outcome.report.reasons) == (Verdict.PASS, outcome.report.reasons)


async def test_a_planted_difference_is_found_at_its_token(tmp_path: Path) -> None:
    async with desk_of(tmp_path, twins(plant_at=PLANTED - 1)) as desk:
        told, outcome = await desk.compare(plan())
    assert [event.index for event in only(told, FirstDivergence)] == [PLANTED]
    assert outcome.report.verdict is Verdict.FAIL
    assert outcome.report.tokens is not None
    assert outcome.report.tokens.first_divergence_index == PLANTED


async def test_pairs_leave_before_either_side_has_finished(tmp_path: Path) -> None:
    slow = {"torch": fake_side(step=64, step_ms=20), "jax": fake_side(step=64, step_ms=20)}
    async with desk_of(tmp_path, slow) as desk, aclosing(desk.operations.compare(ANYONE, plan())) as told:
        async for event in told:
            if isinstance(event, TokenPairs):
                break
        left = [scorer._engine.computed_tokens for scorer in desk.scorers.values()]  # type: ignore[attr-defined]
    assert max(left) < 300


async def test_the_header_comes_first_and_the_outcome_last(desk: Desk) -> None:
    told, _ = await desk.compare(plan())
    assert isinstance(told[0], CompareHeader)
    assert [index for index, event in enumerate(told) if isinstance(event, CompareOutcome)] == [len(told) - 1]


async def test_two_variants_of_one_backend_are_asked_in_one_call(desk: Desk) -> None:
    await desk.compare(plan(right="backend:torch"))
    other = desk.scorers["jax"]
    assert other._engine.computed_tokens <= 64  # type: ignore[attr-defined]  # its preflight
    page = await desk.operations.list_runs(ANYONE)
    records = [await desk.store.get_run(run.run_id) for run in page.entries]
    assert len({record.raw_request_ref for record in records}) == 1


async def test_next_tokens_are_compared_on_the_union(desk: Desk) -> None:
    question = NextTokenQuestion((Input(ids=int_array([1, 2, 3])),), top_k=5)
    _, outcome = await desk.compare(plan(question=question))
    assert outcome.report.verdict is Verdict.PASS
    assert outcome.report.distributions[0].js_upper is not None


async def test_a_tolerance_of_the_caller_is_taken(tmp_path: Path) -> None:
    async with desk_of(tmp_path, twins(plant_at=PLANTED - 1)) as desk:
        loose = Tolerance("request", 50.0, 0.0, "given by the caller")
        _, outcome = await desk.compare(plan(tolerance=loose))
    assert outcome.report.verdict is Verdict.PASS


# What is kept


async def test_both_runs_and_the_report_are_kept(desk: Desk) -> None:
    _, outcome = await desk.compare(plan())
    record = await desk.operations.get_comparison(ANYONE, outcome.comparison_id)
    left = await desk.operations.get_run(ANYONE, record.left_run_id)
    right = await desk.operations.get_run(ANYONE, record.right_run_id)
    assert (left.target, right.target) == ("backend:torch", "backend:jax")
    assert left.run.complete
    assert await desk.operations.get_comparison_text(ANYONE, outcome.comparison_id) == outcome.report_text


async def test_a_kept_run_has_its_own_ranks_and_hashes(desk: Desk) -> None:
    _, outcome = await desk.compare(plan())
    record = await desk.store.get_run((await desk.store.get_comparison(outcome.comparison_id)).left_run_id)
    (item,) = only(list(record.run.entries), ScoredItem)
    assert (record.mrr, record.rank1_share) == (item.mrr, item.rank1_share)
    assert record.config_hash.startswith("sha256:")
    assert (record.mask_hash, record.mask_shape, record.synthetic) == ("", "", True)


async def test_the_raw_bytes_of_both_directions_can_be_read_back(desk: Desk) -> None:
    _, outcome = await desk.compare(plan())
    record = await desk.store.get_run((await desk.store.get_comparison(outcome.comparison_id)).right_run_id)
    request = b"".join([part async for part in desk.operations.read_artifact(ANYONE, record.raw_request_ref)])
    response = b"".join([part async for part in desk.operations.read_artifact(ANYONE, record.raw_response_ref)])
    assert len(pb.RollingLogprobRequest.FromString(request).inputs[0].ids.ids) == 300
    events = [pb.RollingLogprobResponse.FromString(part).event for part in split_responses(response)]
    assert events[-1].HasField("summary")


async def test_what_is_discarded_is_not_kept(desk: Desk) -> None:
    _, outcome = await desk.compare(plan(store=False))
    assert outcome.comparison_id == ""
    assert (await desk.operations.list_runs(ANYONE)).entries == ()


async def test_two_stored_runs_are_compared_without_any_backend(tmp_path: Path) -> None:
    async with desk_of(tmp_path, twins(plant_at=PLANTED - 1)) as desk:
        _, first = await desk.compare(plan())
        record = await desk.store.get_comparison(first.comparison_id)
    async with desk_of(tmp_path, {}) as desk:
        again = ComparePlan(None, SideSpec(f"run:{record.left_run_id}"), SideSpec(f"run:{record.right_run_id}"))
        _, outcome = await desk.compare(again)
        kept = await desk.store.get_comparison(outcome.comparison_id)
    assert outcome.report.verdict is Verdict.FAIL
    assert outcome.report.tokens == first.report.tokens
    assert (kept.left_run_id, kept.right_run_id) == (record.left_run_id, record.right_run_id)


async def test_a_stored_run_is_replayed_against_a_live_side(desk: Desk) -> None:
    _, first = await desk.compare(plan())
    record = await desk.store.get_comparison(first.comparison_id)
    _, outcome = await desk.compare(plan(question=None, left=f"run:{record.left_run_id}"))
    assert outcome.report.verdict is Verdict.PASS
    assert outcome.report.left.total_seconds is None


async def test_a_failing_verdict_names_the_command_that_reproduces_it(tmp_path: Path) -> None:
    async with desk_of(tmp_path, twins(plant_at=PLANTED - 1)) as desk:
        _, outcome = await desk.compare(plan())
        record = await desk.store.get_comparison(outcome.comparison_id)
    assert record.left_run_id in outcome.report.reproduce


# What is refused


@pytest.mark.parametrize("target", ["grpc://127.0.0.1:1", "torch:/models", "py:os:system", "file.json", "backend:", ""])
async def test_a_coordinator_opens_nothing_that_a_caller_names(desk: Desk, target: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await desk.compare(plan(right=target))
    assert caught.value.detail.field == "right.target"


async def test_an_unknown_backend_is_not_found(desk: Desk) -> None:
    with pytest.raises(NotFound) as caught:
        await desk.compare(plan(right="backend:tpu"))
    assert caught.value.detail.allowed == "jax, torch"


async def test_an_unknown_run_is_not_found(desk: Desk) -> None:
    with pytest.raises(NotFound):
        await desk.compare(plan(right="run:run-00000000000000000000000000"))


async def test_live_sides_need_a_question(desk: Desk) -> None:
    with pytest.raises(InvalidArgument):
        await desk.compare(plan(question=None))


async def test_a_report_that_would_keep_too_much_is_refused(desk: Desk) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await desk.compare(plan(debug_token_limit=100_000_000))
    assert caught.value.detail.field == "debug_token_limit"


async def test_a_small_limit_of_the_coordinator_leaves_cases_and_plain_comparisons_alone(tmp_path: Path) -> None:
    async with desk_of(tmp_path, twins(), debug_token_limit=100) as desk:
        _, outcome = await desk.compare(plan())
        case = Case("smoke", rolling(), SideSpec("backend:torch"), SideSpec("backend:jax"))
        await desk.operations.create_case(ANYONE, case)
        job = (await desk.finish(await desk.operations.start_job(ANYONE, "first", CaseRun("smoke"))))[-1].job
    assert outcome.report.tokens is not None
    assert outcome.report.tokens.not_kept_count == 300 - 100
    assert job.state is JobState.DONE


async def test_one_comparison_too_many_is_refused(tmp_path: Path) -> None:
    slow = {"torch": fake_side(step_ms=200), "jax": fake_side(step_ms=200)}
    async with desk_of(tmp_path, slow, max_comparisons=1) as desk:
        async with aclosing(desk.operations.compare(ANYONE, plan())) as running:
            await anext(running)
            with pytest.raises(Exhausted) as caught:
                await desk.compare(plan())
        assert caught.value.reason is Reason.QUEUE_FULL
        _, outcome = await desk.compare(plan())  # there is room again
        assert outcome.report.verdict is Verdict.PASS


async def test_a_case_may_only_name_what_a_coordinator_knows(desk: Desk) -> None:
    case = Case("smoke", rolling(), SideSpec("backend:torch"), SideSpec("torch:DIR"))
    with pytest.raises(InvalidArgument):
        await desk.operations.create_case(ANYONE, case)


ELSEWHERE = Array(artifact_digest="sha256:" + "0" * 64)
APART = [
    ELSEWHERE,
    Not(ELSEWHERE),
    All((Causal(), ELSEWHERE)),
    AnyOf((Causal(), ELSEWHERE)),
    Minus(Causal(), ELSEWHERE),
]


@pytest.mark.parametrize("base", APART, ids=lambda base: type(base).__name__)
async def test_a_mask_whose_array_was_sent_elsewhere_is_refused_with_the_way_out(desk: Desk, base: Expression) -> None:
    side = SideSpec("backend:jax", Variant(mask=MaskSpec(base)))
    with pytest.raises(InvalidArgument, match=r"put one of up to 1048576 bytes into the mask") as caught:
        await desk.compare(ComparePlan(rolling(), SideSpec("backend:torch"), side))
    assert (caught.value.reason, caught.value.detail.field) == (Reason.MASK_TOO_LARGE, "right.mask")


async def test_a_case_or_a_run_whose_mask_names_an_array_elsewhere_is_refused_at_once(desk: Desk) -> None:
    side = SideSpec("backend:torch", Variant(mask=MaskSpec(ELSEWHERE)))
    with pytest.raises(InvalidArgument) as of_case:
        await desk.operations.create_case(ANYONE, Case("smoke", rolling(), side, SideSpec("backend:jax")))
    with pytest.raises(InvalidArgument) as of_run:
        await desk.operations.start_job(ANYONE, "first", RunPlan(rolling(), side))
    assert (of_case.value.detail.field, of_run.value.detail.field) == ("left.mask", "side.mask")


async def test_a_variant_that_a_stored_run_was_not_asked_under_is_refused(desk: Desk) -> None:
    _, first = await desk.compare(plan())
    record = await desk.store.get_comparison(first.comparison_id)
    leaky = Variant(allow_leak=True)
    other = plan(question=None, left="backend:torch", right=f"run:{record.left_run_id}")
    with pytest.raises(InvalidArgument) as caught:
        await desk.compare(ComparePlan(None, other.left, SideSpec(other.right.target, leaky)))
    assert caught.value.detail.field == "right.variant"


# What a failing side leaves


async def test_a_side_that_is_not_there_fails_alone(tmp_path: Path) -> None:
    async with desk_of(tmp_path, {"torch": fake_side()}, absent=("jax",)) as desk:
        told, outcome = await desk.compare(plan())
        record = await desk.store.get_comparison(outcome.comparison_id)
        left = await desk.store.get_run(record.left_run_id)
    (failed,) = only(told, SideFailed)
    assert (failed.side, failed.problem.reason) == (SideName.RIGHT, Reason.UNREACHABLE)
    assert (outcome.report.verdict, left.run.complete, record.right_run_id) == (Verdict.ERROR, True, "")


class BrokenScorer:
    """The fake engine's answer until `after` events, then something else."""

    def __init__(self, fault: str, after: int) -> None:
        self._inner = fake_side()
        self._fault = fault
        self._after = after

    async def describe(self) -> Card:
        return await self._inner.describe()

    async def close(self) -> None:
        await self._inner.close()

    async def ask(self, question: Question, *, deadline: float | None = None) -> AsyncIterator[AnswerEvent]:
        count = 0
        async for event in self._inner.ask(question, deadline=deadline):
            count += 1
            broken = getattr(question, "kind", None) is not None and count > self._after
            if broken and self._fault == "stall":
                await asyncio.sleep(3600)
            if broken and self._fault == "half":
                return
            if broken and self._fault == "no summary" and isinstance(event, AnswerSummary):
                return
            if broken and self._fault == "twice" and isinstance(event, TokenChunk):
                yield event
            yield event


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("stall", Reason.DEADLINE),
        ("half", Reason.INCOMPLETE_STREAM),
        ("no summary", Reason.INCOMPLETE_STREAM),
        ("twice", Reason.INCOMPLETE_STREAM),
    ],
)
async def test_a_broken_answer_ends_its_side_with_the_reason(tmp_path: Path, fault: str, reason: Reason) -> None:
    scorers: dict[str, Scorer] = {"torch": fake_side(), "jax": BrokenScorer(fault, after=2)}
    async with desk_of(tmp_path, scorers) as desk:
        begun = time.monotonic()
        told, outcome = await desk.compare(plan(timeout_seconds=1.0))
        record = await desk.store.get_comparison(outcome.comparison_id)
        left, right = [await desk.store.get_run(one) for one in (record.left_run_id, record.right_run_id)]
    assert time.monotonic() - begun < 5.0
    assert [event.problem.reason for event in only(told, SideFailed)] == [reason]
    assert (outcome.report.verdict, left.run.complete, right.run.complete) == (Verdict.ERROR, True, False)


async def test_an_engine_that_breaks_fails_its_side_alone(tmp_path: Path) -> None:
    async with desk_of(tmp_path, twins(fail_at=200)) as desk:
        told, outcome = await desk.compare(plan())
    assert {event.side for event in only(told, SideFailed)} == {SideName.RIGHT}
    assert outcome.report.verdict is Verdict.ERROR


async def test_a_caller_s_deadline_still_leaves_time_for_the_report(tmp_path: Path) -> None:
    scorers = {"torch": fake_side(), "jax": fake_side(step=100, step_ms=800)}
    async with desk_of(tmp_path, scorers) as desk:
        _, outcome = await desk.compare(plan(), Caller("", time.monotonic() + 1.0))
    assert outcome.report.right.problem is not None
    assert outcome.report.right.problem.reason == Reason.DEADLINE.value


async def test_a_deadline_that_has_passed_is_refused(desk: Desk) -> None:
    with pytest.raises(DeadlineExceeded):
        await desk.compare(plan(), Caller("", time.monotonic() - 1))


async def test_leaving_a_comparison_empties_the_engines_queues(tmp_path: Path) -> None:
    slow = {"torch": fake_side(step=32, step_ms=30), "jax": fake_side(step=32, step_ms=30)}
    async with desk_of(tmp_path, slow) as desk:
        long = plan(question=rolling(3000))
        async with aclosing(desk.operations.compare(ANYONE, long)) as told:
            async for event in told:
                if isinstance(event, TokenPairs):
                    break
        engines: list[Any] = [scorer._engine for scorer in slow.values()]

        async def rest() -> list[int]:
            before = [engine.steps for engine in engines]
            await asyncio.sleep(0.2)
            return [engine.steps - was for engine, was in zip(engines, before, strict=True)]

        await asyncio.sleep(0.2)
        assert await rest() == [0, 0]
        assert (await desk.operations.list_comparisons(ANYONE)).entries == ()


async def test_replicas_that_differ_fail_their_side(tmp_path: Path) -> None:
    # One name, two models: nothing they say may be compared.
    from coordinator.backends import BackendBook
    from coordinator.operations import Operations
    from coordinator.settings import BackendSettings, CoordinatorSettings
    from coordinator.store import Store
    from dualtrace.metrics import CoordinatorMetrics
    from tests.support.scorers import served

    metrics, settings = CoordinatorMetrics(), CoordinatorSettings(data=tmp_path)
    async with served(fake_side(seed=1)) as (one, _), served(fake_side(seed=2)) as (other, _):
        store = await Store.open(tmp_path)
        book = BackendBook([BackendSettings("mixed", (one, other)), BackendSettings("torch", (one,))], metrics)
        await book.start()
        await book.settle(5.0)
        await wait_until(lambda: book.get("mixed").problem)
        operations = Operations(store, book, settings, metrics)
        told = [event async for event in operations.compare(ANYONE, plan(right="backend:mixed"))]
        await book.close()
        await store.close()
    (failed,) = only(told, SideFailed)
    assert isinstance(failed.problem, FailedPrecondition)


async def test_a_comparison_whose_bytes_cannot_be_dropped_is_over_all_the_same(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    closed = []

    async def fail(raw: RawBytes) -> None:
        closed.append(raw)
        raise OSError("planted")

    monkeypatch.setattr(RawBytes, "close", fail)
    _, outcome = await desk.compare(plan())
    assert (outcome.report.verdict, len(closed)) == (Verdict.PASS, 2)
    assert desk.metrics.registry.get_sample_value("dualtrace_running_comparisons") == 0
    assert "planted" in caplog.text


async def test_every_verdict_is_counted(desk: Desk) -> None:
    await desk.compare(plan())
    assert desk.metrics.registry.get_sample_value("dualtrace_comparisons_total", {"verdict": "PASS"}) == 1.0


async def test_a_problem_of_the_whole_is_told_before_anything_is_asked(desk: Desk) -> None:
    with pytest.raises(Problem):
        await desk.compare(plan(timeout_seconds=float("nan")))
    assert (await desk.operations.list_runs(ANYONE)).entries == ()
