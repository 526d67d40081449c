"""Sides that answer what cannot be: each fails for itself, both runs are kept, and the report always comes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from dualtrace.card import Card
from dualtrace.compare.report import Verdict, read_report, report_to_text
from dualtrace.comparing import comparison as comparing
from dualtrace.comparing.union_reading import group_prompts
from dualtrace.engine import int_array
from dualtrace.problems import Reason, Unavailable
from dualtrace.questions.answers import AnswerEvent, NextTokenAnswer, NextTokens, ScoreAnswer, Tail, TokenChunk
from dualtrace.questions.asked import (
    Input,
    LogprobItem,
    LogprobQuestion,
    NextTokenQuestion,
    Question,
    RollingQuestion,
)
from dualtrace.runs.run import NextEntry, ScoredItem, ScoreEntry, read_run, run_to_text
from dualtrace.runs.stored_scorer import StoredScorer
from dualtrace.tokens import Prefix, PrefixKind
from tests.support.scorers import fake_scorer, rolling_ids
from tests.unit.test_comparison import NEXT, SCORE, TEXT, Spied, compared, port

Change = Callable[[NextTokens], NextTokens]


@dataclass
class Changed(Spied):
    """Every event goes through `how`."""

    how: Callable[[Any], Any] = lambda event: event
    from_call: int = 1

    def change(self, event: AnswerEvent) -> list[AnswerEvent]:
        return [self.how(event)] if len(self.asked) >= self.from_call else [event]


def next_changed(change: Change, from_call: int = 1) -> Changed:
    """A side whose next tokens are changed from its n-th call on."""

    def how(event: Any) -> Any:
        if not isinstance(event, NextTokenAnswer):
            return event
        found = tuple(
            replace(one, outcome=change(one.outcome) if isinstance(one.outcome, NextTokens) else one.outcome)
            for one in event.results
        )
        return replace(event, results=found)

    return Changed(fake_scorer(), how=how, from_call=from_call)


BROKEN: dict[str, Change] = {
    "a list one short": lambda found: replace(
        found, top_logprobs=found.top_logprobs[:-1], extra_logprobs=found.extra_logprobs[:-1]
    ),
    "extra ids that nobody asked for": lambda found: replace(
        found, extra_logprobs=np.append(found.extra_logprobs, -1.0)
    ),
    "an id that stands twice": lambda found: replace(
        found, top_ids=int_array([7] * 4), top_logprobs=np.array([-1.0] * 4), top_pieces=()
    ),
}


@pytest.mark.parametrize("from_call", [1, 2], ids=["first reading", "second reading"])
@pytest.mark.parametrize("name", BROKEN)
async def test_next_tokens_that_cannot_be_an_answer_fail_their_side_alone(name: str, from_call: int) -> None:
    _told, report, comparison = await compared(NEXT, fake_scorer(), next_changed(BROKEN[name], from_call))
    assert report.verdict is Verdict.ERROR
    assert report.left.problem is None
    assert report.right.problem is not None
    assert report.right.problem.reason == "INCOMPLETE_STREAM"
    assert comparison.left_run is not None


async def test_results_for_other_prompts_fail_their_side_alone() -> None:
    def how(event: Any) -> Any:
        return replace(event, results=event.results[:1])

    _told, report, _comparison = await compared(NEXT, Changed(fake_scorer(), how=how), fake_scorer())
    assert report.left.problem is not None
    assert report.right.problem is None


async def test_a_bug_while_next_tokens_are_taken_is_its_sides_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_given: object) -> None:
        raise ValueError

    monkeypatch.setattr(comparing, "check_next_tokens", broken)
    _told, report, _comparison = await compared(NEXT, fake_scorer(), fake_scorer())
    assert report.left.problem is not None
    assert report.left.problem.reason == "BUG"


TAILS = [
    Tail("MEASURED", math.nan), Tail("MEASURED", None), Tail("MEASURED", 5.0), Tail("MEASURED", -math.inf),
    Tail("SOMEHOW", -1.0),
]  # fmt: skip


@pytest.mark.parametrize("from_call", [1, 2], ids=["first reading", "second reading"])
@pytest.mark.parametrize("tail", TAILS, ids=str)
async def test_a_tail_that_no_mass_can_be_is_an_error_and_no_divergence_of_nothing(tail: Tail, from_call: int) -> None:
    def change(found: NextTokens) -> NextTokens:
        return replace(found, tail=tail, tail_beyond_extra=None if found.tail_beyond_extra is None else tail)

    _told, report, _comparison = await compared(NEXT, fake_scorer(), next_changed(change, from_call))
    assert report.verdict is Verdict.ERROR
    assert [line.kl_left_right_lower for line in report.distributions] == [None, None]
    assert all(line.right_problem is not None for line in report.distributions)
    assert read_report(report_to_text(report)).verdict is Verdict.ERROR


async def test_the_tail_of_all_mass_that_an_engine_tells_beside_no_id_is_a_tail() -> None:
    question = replace(NEXT, top_k=0, extra_token_ids=(5, 6))
    _told, report, comparison = await compared(question, fake_scorer(), fake_scorer())
    assert report.verdict is Verdict.PASS, report.reasons
    assert comparison.left_run is not None
    entry = comparison.left_run.entries[0]
    assert isinstance(entry, NextEntry)
    assert entry.tail == Tail("MEASURED", 0.0)


def one_nan(event: Any) -> Any:
    if isinstance(event, TokenChunk):
        return replace(event, logprobs=np.where(np.arange(len(event.logprobs)) == 2, np.nan, event.logprobs))
    if isinstance(event, ScoreAnswer):
        scores = tuple(replace(one, scores=(math.nan,) * len(one.scores)) for one in event.results)
        return replace(event, results=scores)
    if isinstance(event, NextTokenAnswer):
        found = tuple(replace(one, outcome=with_nan(one.outcome)) for one in event.results)
        return replace(event, results=found)
    return event


def with_nan(found: Any) -> Any:
    return replace(found, top_logprobs=found.top_logprobs * np.nan, extra_logprobs=found.extra_logprobs * np.nan)


@pytest.mark.parametrize("question", [rolling_ids(9), SCORE, NEXT], ids=lambda question: question.kind.value)
async def test_a_side_that_tells_a_number_that_is_none_leaves_both_runs_readable(question: Any) -> None:
    _told, report, comparison = await compared(question, fake_scorer(), Changed(fake_scorer(), how=one_nan))
    assert report.verdict in {Verdict.FAIL, Verdict.ERROR}
    assert read_report(report_to_text(report)).verdict is report.verdict
    for run, failed in ((comparison.left_run, False), (comparison.right_run, True)):
        assert run is not None
        entry = read_run(run_to_text(run)).entries[0]
        assert isinstance(entry, ScoredItem | ScoreEntry | NextEntry)
        assert (entry.problem is not None) is failed


async def test_a_prompt_that_only_one_side_answered_leaves_that_side_its_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(comparing, "group_prompts", lambda union, prompts: group_prompts(union, prompts, entries=4))
    asked = (Input(ids=int_array([5, 6])), Input(ids=int_array([5000])), Input(ids=int_array([7])))
    question = NextTokenQuestion(asked, top_k=3, extra_token_ids=(9,))
    refusing, answering = fake_scorer(), fake_scorer(vocab=6000)
    _told, report, _comparison = await compared(question, refusing, answering)
    assert report.right.problem is None
    assert [line.right_problem for line in report.distributions] == [None] * 3
    assert report.distributions[1].left_problem is not None


class DyingSecond(Spied):
    """Answers once."""

    async def ask(self, question: Question, *, deadline: float | None = None) -> AsyncIterator[AnswerEvent]:
        self.asked.append(question)
        if len(self.asked) == 2:
            raise Unavailable(Reason.UNREACHABLE, "gone")
        async for event in self.scorer.ask(question, deadline=deadline):
            yield event


async def test_a_side_that_dies_in_the_second_reading_is_still_named() -> None:
    _told, report, comparison = await compared(NEXT, fake_scorer(), DyingSecond(fake_scorer(seed=3)))
    assert report.right.problem is not None
    assert comparison.right_run is not None
    assert report.right.provenance == comparison.right_run.provenance
    assert report.provenance_differences


@dataclass
class Introduced(Spied):
    """Cannot say who it is."""

    error: BaseException = field(default_factory=OSError)

    async def describe(self) -> Card:
        raise self.error


@pytest.mark.parametrize("seconds", [None, 60.0])
@pytest.mark.parametrize(
    ("error", "reason"),
    [(TimeoutError("socket"), "BUG"), (asyncio.CancelledError(), "CANCELLED"), (OSError("x"), "BUG")],
    ids=lambda value: type(value).__name__,
)
async def test_whatever_ends_an_introduction_ends_that_side_alone(
    error: BaseException, reason: str, seconds: float | None
) -> None:
    right = Introduced(fake_scorer(), error=error)
    _told, report, comparison = await compared(TEXT, fake_scorer(), right, right_seconds=seconds)
    assert report.right.problem is not None
    assert report.right.problem.reason == reason
    assert comparison.left_run is not None


async def test_an_introduction_that_stalls_is_late() -> None:
    class Silent(Spied):
        async def describe(self) -> Card:
            await asyncio.sleep(3600)
            raise AssertionError

    _told, report, _comparison = await compared(TEXT, fake_scorer(), Silent(fake_scorer()), right_seconds=0.05)
    assert report.right.problem is not None
    assert report.right.problem.reason == "DEADLINE"


async def test_one_scorer_with_a_deadline_for_each_side_is_asked_for_each() -> None:
    scorer = Spied(fake_scorer(step=1, step_ms=10))
    _told, report, _comparison = await compared(rolling_ids(30), scorer, scorer, left_seconds=0.1, right_seconds=60.0)
    assert report.left.problem is not None
    assert report.left.problem.reason == "DEADLINE"
    assert report.right.problem is None


# Questions that a stored side settles


async def kept_run(question: Any, scorer: Any) -> Any:
    _told, _report, comparison = await compared(question, scorer, scorer)
    assert comparison.left_run is not None
    return read_run(run_to_text(comparison.left_run))


LONG = "hello there, the answer is now here and it is long enough"


async def ids_of(text: str) -> Any:
    run = await kept_run(RollingQuestion((Input(text=text),)), fake_scorer())
    return int_array(run.entries[0].token_ids)


@pytest.mark.parametrize("stride", [None, 3])
@pytest.mark.parametrize("form", ["text", "ids"])
async def test_a_live_side_reads_in_the_windows_that_the_stored_run_was_asked_for(
    form: str, stride: int | None
) -> None:
    given = Input(ids=await ids_of(LONG))
    stored = await kept_run(RollingQuestion((given,), max_tokens=8, stride=stride), fake_scorer(positions=64))
    asked = RollingQuestion((Input(text=LONG) if form == "text" else given,), prefix=Prefix(kind=PrefixKind.NONE))
    asked = asked if form == "text" else replace(asked, prefix=Prefix())
    live = Spied(fake_scorer(positions=64))
    _told, report, _comparison = await compared(asked, StoredScorer(stored, "a"), live)
    assert report.verdict is Verdict.PASS, report.reasons
    assert [(one.max_tokens, one.stride) for one in live.asked] == [(8, stride)]  # type: ignore[union-attr]


async def test_other_windows_than_the_stored_run_was_asked_for_are_another_question() -> None:
    stored = await kept_run(RollingQuestion((Input(ids=await ids_of(LONG)),), max_tokens=8), fake_scorer())
    asked = RollingQuestion((Input(text=LONG),), max_tokens=9)
    _told, report, _comparison = await compared(asked, StoredScorer(stored, "a"), fake_scorer())
    assert report.left.problem is not None
    assert "max_tokens" in report.left.problem.message


async def test_an_item_that_failed_in_a_stored_run_leaves_a_port_the_others() -> None:
    pair = LogprobItem(Input(text="ab"), Input(text="cd"))
    run = await kept_run(LogprobQuestion((pair, LogprobItem(Input(text="ab"), Input(text="")))), fake_scorer())
    _told, report, _comparison = await compared(None, StoredScorer(run, "a"), port())
    assert report.right.problem is None
    assert report.tokens is not None
    assert report.tokens.aligned_count > 0
    assert [item.left_problem is None for item in report.items] == [True, False]


async def test_a_stored_run_without_ranks_is_held_against_another() -> None:
    def without_ranks(event: Any) -> Any:
        none = int_array([])
        return replace(event, ranks=none, ties=none) if isinstance(event, TokenChunk) else event

    _told, _report, comparison = await compared(TEXT, Changed(fake_scorer(), how=without_ranks), fake_scorer())
    assert comparison.left_run is not None
    run = read_run(run_to_text(comparison.left_run))
    _told, report, _comparison = await compared(None, StoredScorer(run, "a"), fake_scorer())
    assert report.verdict is Verdict.PASS, report.reasons
    assert report.tokens is not None
    assert "token_ranks" in report.tokens.unavailable_fields
