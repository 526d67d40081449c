"""Two sides compared as they stream: what each is asked, what is kept when one fails; the report always comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from dualtrace.arrays import IntArray
from dualtrace.callable_engine import CallableEngine
from dualtrace.card import Card
from dualtrace.compare.events import CompareHeader, FirstDivergence, SideFailed, TokenPairs
from dualtrace.compare.report import CompareReport, Verdict
from dualtrace.compare.sides import SideName
from dualtrace.compare.tolerance import request_tolerance
from dualtrace.comparing.comparison import CompareOptions, Comparison, LiveSide, Told
from dualtrace.engine import int_array
from dualtrace.engine_scorer import EngineScorer
from dualtrace.fake import FakeEngine, FakeSpec, past_states
from dualtrace.problems import DeadlineExceeded, InvalidArgument, Reason, Unavailable, Unsupported
from dualtrace.questions.answers import AnswerEvent, ItemDone, TokenChunk
from dualtrace.questions.asked import (
    Input,
    LogprobItem,
    LogprobQuestion,
    NextTokenQuestion,
    Question,
    RollingQuestion,
    ScoreQuestion,
    TokenizeQuestion,
    Variant,
)
from dualtrace.runs.run import AskedQuestion, NextEntry, Run, ScoredItem, read_run, run_to_text
from dualtrace.runs.stored_scorer import StoredScorer
from dualtrace.scorer import Scorer
from dualtrace.tokens import Prefix, PrefixKind
from dualtrace.views import finetuned
from tests.support.scorers import fake_scorer, only, rolling_ids

TEXT = RollingQuestion((Input(text="hello, the answer is now here"),))
NEXT = NextTokenQuestion((Input(text="hello"), Input(text="five")), top_k=4)
SCORE = ScoreQuestion(Input(text="Is it "), (Input(text="so"), Input(text="not")), (5, 6))
PAIRS = LogprobQuestion((LogprobItem(Input(text="The a"), Input(text="nswer is")),))
LOOSE = CompareOptions(tolerance=request_tolerance(1e-6, 0.0))


@dataclass
class Spied:
    """A Scorer in front of another one: remembers what was asked, and may do something to the answer."""

    scorer: Scorer
    asked: list[Question] = field(default_factory=list)
    left: int = 0

    async def describe(self) -> Card:
        return await self.scorer.describe()

    async def close(self) -> None:
        await self.scorer.close()

    async def ask(self, question: Question, *, deadline: float | None = None) -> AsyncIterator[AnswerEvent]:
        self.asked.append(question)
        try:
            async for event in self.scorer.ask(question, deadline=deadline):
                for changed in self.change(event):
                    yield changed
        finally:
            self.left += 1

    def change(self, event: AnswerEvent) -> list[AnswerEvent]:
        return [event]


class Dying(Spied):
    """Breaks off at the first item's end."""

    def change(self, event: AnswerEvent) -> list[AnswerEvent]:
        if isinstance(event, ItemDone):
            raise Unavailable(Reason.UNREACHABLE, "the sidecar has gone")
        return [event]


class Garbling(Spied):
    """Tells tokens that do not follow."""

    def change(self, event: AnswerEvent) -> list[AnswerEvent]:
        return [replace(event, first_index=event.first_index + 900)] if isinstance(event, TokenChunk) else [event]


class Stalling(Spied):
    async def ask(self, question: Question, *, deadline: float | None = None) -> AsyncIterator[AnswerEvent]:
        try:
            await asyncio.sleep(3600)
            yield ItemDone(0, 0, 0)
        finally:
            self.left += 1


class Unreachable(Spied):
    async def describe(self) -> Card:
        raise Unavailable(Reason.UNREACHABLE, "nobody listens there")


def same_logits(ids: IntArray) -> Any:
    """The fake engine's own logits, as somebody's private port."""
    engine = FakeEngine(FakeSpec())
    return engine._logits_at(np.arange(ids.size, dtype=np.int32), past_states(ids))


def port() -> EngineScorer:
    return EngineScorer(CallableEngine("port", same_logits), None)


async def drain(comparison: Comparison) -> None:
    async for _event in comparison.events():
        pass


async def compared(
    question: AskedQuestion | None, left: Scorer, right: Scorer, options: CompareOptions = LOOSE, **sides: Any
) -> tuple[list[Told], CompareReport, Comparison]:
    """Everything that is told, the report, and the comparison. Closes both scorers."""
    comparison = Comparison(
        question,
        LiveSide("left:", left, sides.get("left_variant", Variant()), sides.get("left_seconds")),
        LiveSide("right:", right, sides.get("right_variant", Variant()), sides.get("right_seconds")),
        options,
    )
    try:
        told = [event async for event in comparison.events()]
    finally:
        await left.close()
        await right.close()
    assert isinstance(told[-1], CompareReport)
    assert len(only(told, CompareReport)) == 1
    return told, told[-1], comparison


@pytest.mark.parametrize("question", [TEXT, NEXT, SCORE, PAIRS], ids=lambda question: question.kind.value)
async def test_equal_sides_pass(question: AskedQuestion) -> None:
    _told, report, _comparison = await compared(question, fake_scorer(), fake_scorer())
    assert (report.verdict, report.left.problem) == (Verdict.PASS, None)


@pytest.mark.parametrize("question", [TEXT, NEXT, SCORE, PAIRS], ids=lambda question: question.kind.value)
async def test_other_weights_fail(question: AskedQuestion) -> None:
    _told, report, _comparison = await compared(question, fake_scorer(), fake_scorer(seed=1))
    assert report.verdict is Verdict.FAIL


async def test_a_planted_difference_is_announced_at_its_token() -> None:
    told, report, _comparison = await compared(rolling_ids(40), fake_scorer(), fake_scorer(plant_at=20))
    assert [event.index for event in only(told, FirstDivergence)] == [21]  # row 20 predicts token 21
    assert report.tokens is not None
    assert report.tokens.first_divergence_index == 21


async def test_pairs_leave_before_either_side_has_finished() -> None:
    left, right = (Spied(fake_scorer(step=64, step_ms=20.0)) for _ in range(2))
    comparison = Comparison(rolling_ids(2000), LiveSide("l", left), LiveSide("r", right), LOOSE)
    async with aclosing(comparison.events()) as events:
        async for event in events:
            if isinstance(event, TokenPairs) and any(value is not None for value in event.left_logprobs):
                break
        assert (left.left, right.left) == (0, 0)  # both are still being asked
    await left.close()
    await right.close()


async def test_one_scorer_on_both_sides_is_asked_once_with_two_variants() -> None:
    scorer = Spied(fake_scorer())
    _told, report, comparison = await compared(TEXT, scorer, scorer)
    assert report.verdict is Verdict.PASS
    assert [len(question.variants) for question in scorer.asked] == [2]  # type: ignore[union-attr]
    assert comparison.left_run is not None
    assert comparison.left_run.question.variants == (Variant(),)  # type: ignore[union-attr]
    assert [entry.variant for entry in comparison.left_run.entries] == [0]  # type: ignore[union-attr]


async def test_a_view_that_one_scorer_refuses_leaves_the_other_side_its_answer() -> None:
    scorer = Spied(fake_scorer())
    _told, report, _comparison = await compared(TEXT, scorer, scorer, right_variant=Variant(view=finetuned("missing")))
    assert report.verdict is Verdict.ERROR
    assert report.left.problem is None
    assert report.left.mrr is not None
    assert report.right.problem is not None
    assert report.right.problem.reason == "UNSUPPORTED_VIEW"


@pytest.mark.parametrize("question", [TEXT, PAIRS], ids=lambda question: question.kind.value)
async def test_a_side_that_dies_half_way_is_named_and_the_others_run_is_whole(question: AskedQuestion) -> None:
    told, report, comparison = await compared(question, fake_scorer(), Dying(fake_scorer()))
    assert report.verdict is Verdict.ERROR
    assert [event.side for event in only(told, SideFailed)] == [SideName.RIGHT]
    assert comparison.left_run is not None
    assert comparison.left_run.complete
    assert comparison.right_run is not None
    assert not comparison.right_run.complete


async def test_an_answer_that_cannot_be_is_that_sides_failure() -> None:
    _told, report, comparison = await compared(TEXT, Garbling(fake_scorer()), fake_scorer())
    assert report.verdict is Verdict.ERROR
    assert report.left.problem is not None
    assert report.left.problem.reason == "INCOMPLETE_STREAM"
    assert comparison.right_run is not None
    assert comparison.right_run.complete


async def test_a_stalling_side_ends_with_its_deadline_and_is_named() -> None:
    begun = time.monotonic()
    _told, report, comparison = await compared(TEXT, fake_scorer(), Stalling(fake_scorer()), right_seconds=0.2)
    assert time.monotonic() - begun < 3
    assert report.right.problem is not None
    assert report.right.problem.code == DeadlineExceeded.code_name
    assert "right" in report.right.problem.message
    assert comparison.left_run is not None


async def test_a_side_that_nobody_can_reach_fails_alone() -> None:
    _told, report, comparison = await compared(TEXT, Unreachable(fake_scorer()), fake_scorer())
    assert report.left.problem is not None
    assert report.left.problem.reason == "UNREACHABLE"
    assert comparison.left_run is None
    assert comparison.right_run is not None


@pytest.mark.parametrize("question", [TEXT, NEXT, SCORE], ids=lambda question: question.kind.value)
async def test_the_report_comes_when_both_sides_fail(question: AskedQuestion) -> None:
    _told, report, _comparison = await compared(question, Unreachable(fake_scorer()), Unreachable(fake_scorer()))
    assert report.verdict is Verdict.ERROR


async def test_who_the_sides_are_is_told_before_either_has_answered() -> None:
    sides = [Stalling(fake_scorer()), Stalling(fake_scorer(seed=1))]
    comparison = Comparison(TEXT, LiveSide("l", sides[0]), LiveSide("r", sides[1]), LOOSE)
    async with asyncio.timeout(5), aclosing(comparison.events()) as events:
        header = await anext(events)
    assert isinstance(header, CompareHeader)
    assert [one.field for one in header.differences] == ["model_id", "weights_digest"]
    for side in sides:
        await side.close()


@pytest.mark.parametrize("question", [TEXT, NEXT, SCORE, PAIRS], ids=lambda question: question.kind.value)
async def test_who_the_sides_are_is_told_once(question: AskedQuestion) -> None:
    told, _report, _comparison = await compared(question, fake_scorer(), fake_scorer(seed=1))
    assert [index for index, event in enumerate(told) if isinstance(event, CompareHeader)] == [0]


async def test_leaving_leaves_both_sides_and_no_task() -> None:
    sides = [Stalling(fake_scorer()), Stalling(fake_scorer())]
    before = asyncio.all_tasks()
    comparison = Comparison(TEXT, LiveSide("l", sides[0]), LiveSide("r", sides[1]), LOOSE)
    waiting = asyncio.create_task(drain(comparison))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert [side.left for side in sides] == [1, 1]
    assert asyncio.all_tasks() == before
    for side in sides:
        await side.close()


async def test_without_a_profile_for_the_precisions_a_tolerance_must_be_given() -> None:
    left, right = port(), fake_scorer()
    comparison = Comparison(rolling_ids(5), LiveSide("l", left), LiveSide("r", right))
    with pytest.raises(InvalidArgument) as caught:
        _ = [event async for event in comparison.events()]
    assert caught.value.detail.field == "tolerance"
    await left.close()
    await right.close()


async def test_next_tokens_are_judged_by_the_union_of_both_top_sets() -> None:
    left, right = Spied(fake_scorer()), Spied(fake_scorer(seed=1))
    _told, report, comparison = await compared(NEXT, left, right)
    firsts = [run.entries[0].top_ids for run in (comparison.left_run, comparison.right_run) if run]  # type: ignore[union-attr]
    line = report.distributions[0]
    assert set(line.token_ids) == set(firsts[0]) | set(firsts[1])
    assert len(firsts[0]) == 4  # the run keeps the first reading, the one that was asked
    assert [question.top_k for question in left.asked] == [4, 0]  # type: ignore[union-attr]
    assert line.tokens is not None
    assert None not in line.tokens


async def test_each_prompts_distribution_is_judged_on_its_own_ids() -> None:
    _told, report, comparison = await compared(NEXT, fake_scorer(), fake_scorer())
    assert comparison.left_run is not None
    for line, entry in zip(report.distributions, comparison.left_run.entries, strict=True):
        assert set(line.token_ids) == set(entry.top_ids)  # type: ignore[union-attr]
        assert isinstance(entry, NextEntry)
        assert line.left_tail is not None
        assert entry.tail is not None
        assert line.left_tail.logprob == pytest.approx(entry.tail.logprob, abs=1e-12)


@pytest.mark.parametrize("question", [TEXT, PAIRS, NEXT, SCORE], ids=lambda question: question.kind.value)
async def test_a_port_without_a_tokenizer_is_asked_in_the_left_sides_ids(question: AskedQuestion) -> None:
    right = Spied(port())
    _told, report, _comparison = await compared(question, fake_scorer(), right)
    assert report.verdict is Verdict.PASS, report.reasons
    assert report.tokens is None or report.tokens.aligned_count > 0


async def test_a_port_gets_the_prefix_token_by_its_id() -> None:
    right = Spied(port())
    question = replace(TEXT, prefix=Prefix(kind=PrefixKind.BOS))
    _told, report, _comparison = await compared(question, fake_scorer(), right)
    assert report.verdict is Verdict.PASS, report.reasons
    asked = right.asked[0]
    assert isinstance(asked, RollingQuestion)
    assert asked.prefix == Prefix(token_id=(await fake_card()).bos_token_id)
    assert asked.inputs[0].text is None


async def fake_card() -> Card:
    scorer = fake_scorer()
    try:
        return await scorer.describe()
    finally:
        await scorer.close()


async def test_a_port_gets_the_right_sides_ids_where_it_stands_on_the_left() -> None:
    _told, report, _comparison = await compared(TEXT, port(), fake_scorer())
    assert report.verdict is Verdict.PASS, report.reasons


async def test_a_port_whose_other_side_is_gone_says_that_it_has_no_ids() -> None:
    _told, report, _comparison = await compared(TEXT, Unreachable(fake_scorer()), port())
    assert report.right.problem is not None
    assert report.right.problem.reason == "NO_TOKENIZER"


async def test_a_long_text_is_read_in_the_same_windows_on_both_sides() -> None:
    left, right = Spied(fake_scorer(positions=16)), Spied(fake_scorer())
    _told, report, _comparison = await compared(rolling_ids(40), left, right)
    assert report.verdict is Verdict.PASS, report.reasons
    assert [question.max_tokens for question in (*left.asked, *right.asked)] == [None, 16]  # type: ignore[union-attr]


# Stored sides


async def kept(question: AskedQuestion, scorer: Scorer) -> Run:
    _told, _report, comparison = await compared(question, scorer, scorer)
    assert comparison.left_run is not None
    return read_run(run_to_text(comparison.left_run))


EXTRA = replace(NEXT, extra_token_ids=(7, 8))
"""What two stored top sets share is left to chance; these ids both have."""


@pytest.mark.parametrize("question", [TEXT, PAIRS, EXTRA, SCORE], ids=lambda question: question.kind.value)
async def test_two_stored_runs_are_compared_without_anybody_to_ask(question: AskedQuestion) -> None:
    left, right = await kept(question, fake_scorer()), await kept(question, fake_scorer(seed=1))
    same = await compared(None, StoredScorer(left, "a"), StoredScorer(left, "a"))
    other = await compared(None, StoredScorer(left, "a"), StoredScorer(right, "b"))
    assert (same[1].verdict, other[1].verdict) == (Verdict.PASS, Verdict.FAIL)
    assert other[1].left.total_seconds is None


@pytest.mark.parametrize("question", [TEXT, PAIRS, NEXT, SCORE], ids=lambda question: question.kind.value)
async def test_a_stored_run_is_held_against_a_live_side(question: AskedQuestion) -> None:
    run = await kept(question, fake_scorer())
    same = await compared(None, StoredScorer(run, "a"), fake_scorer())
    other = await compared(None, fake_scorer(seed=1), StoredScorer(run, "a"))
    assert (same[1].verdict, other[1].verdict) == (Verdict.PASS, Verdict.FAIL)


async def test_a_stored_text_is_held_against_a_port_by_the_ids_that_were_scored() -> None:
    run = await kept(replace(TEXT, prefix=Prefix(kind=PrefixKind.BOS)), fake_scorer())
    _told, report, _comparison = await compared(None, StoredScorer(run, "a"), port())
    assert report.verdict is Verdict.PASS, report.reasons


async def test_runs_of_different_questions_are_not_compared() -> None:
    left, right = await kept(TEXT, fake_scorer()), await kept(RollingQuestion((Input(text="x y"),)), fake_scorer())
    _told, report, _comparison = await compared(None, StoredScorer(left, "a"), StoredScorer(right, "b"))
    assert report.verdict is Verdict.ERROR
    assert report.right.problem is not None
    assert "inputs" in report.right.problem.message


async def test_a_run_in_text_and_a_run_in_ids_are_compared_by_their_ids() -> None:
    left = await kept(TEXT, fake_scorer())
    assert isinstance(left.entries[0], ScoredItem)
    ids = int_array([one for one in left.entries[0].token_ids if one is not None])
    right = await kept(RollingQuestion((Input(ids=ids),)), fake_scorer())
    _told, report, _comparison = await compared(None, StoredScorer(left, "a"), StoredScorer(right, "b"))
    assert report.verdict is Verdict.PASS, report.reasons


async def test_a_run_that_broke_off_is_an_error_that_names_it() -> None:
    left = await kept(TEXT, fake_scorer())
    half = replace(left, complete=False, usage=None, execution=None)
    _told, report, _comparison = await compared(None, StoredScorer(left, "a"), StoredScorer(half, "b"))
    assert report.verdict is Verdict.ERROR
    assert report.right.problem is not None
    assert report.left.problem is None


def test_without_a_question_one_side_must_be_stored() -> None:
    side = LiveSide("l", port())
    with pytest.raises(InvalidArgument):
        Comparison(None, side, side)
    asyncio.run(side.scorer.close())


def test_tokens_alone_are_no_comparison() -> None:
    side = LiveSide("l", port())
    with pytest.raises(Unsupported):
        Comparison(TokenizeQuestion((Input(text="a"),)), side, side)
    asyncio.run(side.scorer.close())


async def test_the_header_with_the_differences_comes_before_any_pair() -> None:
    told, _report, _comparison = await compared(TEXT, fake_scorer(), fake_scorer(seed=1))
    kinds = [type(event) for event in told]
    assert kinds.index(CompareHeader) < kinds.index(TokenPairs)
