"""What a run holds of an answer that is not as it should be: never a number that is none, never lists that differ."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dualtrace.engine import int_array
from dualtrace.model_card import ModelProvenance
from dualtrace.problems import Internal
from dualtrace.questions.answers import (
    AnswerEvent,
    AnswerHeader,
    AnswerSummary,
    Execution,
    ItemDone,
    ItemHeader,
    NextTokenAnswer,
    NextTokenResult,
    NextTokens,
    ScoreAnswer,
    ScoreResult,
    Tail,
    TokenChunk,
    Usage,
)
from dualtrace.questions.asked import (
    Input,
    MaskedForwardQuestion,
    NextTokenQuestion,
    RollingQuestion,
    ScoreQuestion,
    Variant,
)
from dualtrace.runs.collector import RunCollector
from dualtrace.runs.run import AskedQuestion, NextEntry, Run, ScoredItem, ScoreEntry, read_run, run_to_text
from dualtrace.tokens import Tokens

PROVENANCE = ModelProvenance(
    model_id="m", revision="", family="llama", weights_digest="sha256:1", tokenizer_digest="sha256:2",
    framework="reference", framework_version="1", dtype="float64", matmul_precision="float64", device="cpu",
    attention_implementation="dense",
)  # fmt: skip
IDS = Input(ids=int_array([1, 2, 3]))
ROLLING = RollingQuestion((IDS,))
NAN, INF = math.nan, math.inf
BAD = pytest.mark.parametrize("bad", [NAN, INF, -INF])


def tokens(ids: list[int]) -> Tokens:
    return Tokens(int_array(ids), tuple(b"t%d" % one for one in ids), None, None)


def header(**changed: Any) -> AnswerHeader:
    item = ItemHeader(token_count=3, scored_start=1, unscored=tokens([1]))
    given: dict[str, Any] = {"top_k": 0, "streams": True, "has_pieces": True, "has_offsets": False, **changed}
    return AnswerHeader(PROVENANCE, (item,), 1, **given)


def chunk(logprobs: tuple[float, ...] = (-0.5, -2.0), **changed: Any) -> TokenChunk:
    made = TokenChunk(0, 0, 1, tokens([2, 3]), np.array(logprobs), int_array([1, 4]), int_array([0, 0]))
    return replace(made, **changed)


DONE = ItemDone(0, 0, 2, -2.5, -1.25, 3.49, False)


def changed_done(name: str) -> ItemDone:
    changed: dict[str, Any] = {name: NAN}
    return replace(DONE, **changed)


SUMMARY = AnswerSummary(Usage(3, 3), Execution(), 1, 0)


def collected(question: AskedQuestion, *events: AnswerEvent) -> Run:
    """The run, as it is read again after it was written."""
    collector = RunCollector("t", question)
    for event in events:
        collector.push(event)
    return read_run(run_to_text(collector.run()))


def scored(*events: AnswerEvent, question: AskedQuestion = ROLLING) -> ScoredItem:
    (entry,) = collected(question, *events).entries
    assert isinstance(entry, ScoredItem)
    return entry


def reason_of(entry: Any) -> str | None:
    return None if entry.problem is None else entry.problem.reason


@BAD
def test_a_logprob_that_is_no_number_is_absent_and_a_problem_of_its_item(bad: float) -> None:
    entry = scored(header(), chunk((-0.5, bad)), DONE, SUMMARY)
    assert (entry.token_logprobs, entry.token_nll) == ((None, -0.5, None), (None, 0.5, None))
    assert entry.token_ids == (1, 2, 3)
    assert reason_of(entry) == "NON_FINITE_LOGITS"
    assert entry.problem is not None
    assert "token 2" in entry.problem.message


def test_an_item_with_a_number_that_is_none_has_no_total() -> None:
    entry = scored(header(), chunk((-0.5, NAN)), DONE, SUMMARY)
    assert (entry.total_logprob, entry.mean_logprob, entry.perplexity, entry.is_greedy) == (None, None, None, None)


@pytest.mark.parametrize("name", ["total_logprob", "mean_logprob", "perplexity"])
def test_a_total_that_is_no_number_is_a_problem_of_its_item(name: str) -> None:
    entry = scored(header(), chunk(), changed_done(name), SUMMARY)
    assert (getattr(entry, name), reason_of(entry)) == (None, "NON_FINITE_LOGITS")
    assert entry.token_logprobs == (None, -0.5, -2.0)


def test_a_candidate_that_is_no_number_is_left_out_and_a_problem_of_its_item() -> None:
    tops: dict[str, Any] = {
        "top_ids": np.array([[2, 5], [3, 5]], np.int32),
        "top_logprobs": np.array([[-0.5, NAN], [-0.5, -1.5]]),
    }
    entry = scored(header(top_k=2), chunk(**tops), DONE, SUMMARY, question=replace(ROLLING, top_k=2))
    assert entry.token_candidates == {1: {2: -0.5}, 2: {3: -0.5, 5: -1.5}}
    assert reason_of(entry) == "NON_FINITE_LOGITS"


def test_a_divergence_that_is_no_number_is_absent_and_a_problem_of_its_item() -> None:
    asked = MaskedForwardQuestion(IDS, (Variant(),), kl_base_masked=True)
    entry = scored(
        header(kl_base_masked=True), chunk(kl_base_masked=np.array([INF, 0.25])), DONE, SUMMARY, question=asked
    )
    assert (entry.token_kl_base_masked, reason_of(entry)) == ((None, None, 0.25), "NON_FINITE_LOGITS")


def test_an_answer_without_ranks_has_none_in_its_run() -> None:
    none = int_array([])
    entry = scored(header(), chunk(ranks=none, ties=none), DONE, SUMMARY)
    assert (entry.token_ranks, entry.token_ties) == ((None,) * 3, (None,) * 3)
    assert (entry.mrr, entry.rank1_share, entry.problem) == (None, None, None)


def test_a_rank_below_one_is_none() -> None:
    entry = scored(header(), chunk(ranks=int_array([0, 4])), DONE, SUMMARY)
    assert entry.token_ranks == (None, None, 4)


@pytest.mark.parametrize(
    "changed",
    [{"logprobs": np.array([-1.0])}, {"ranks": int_array([1])}, {"kl_base_masked": np.array([1.0])},
     {"ties": int_array([0, 0, 0])}, {"top_ids": np.zeros((1, 2), np.int32), "top_logprobs": np.zeros((1, 2))}],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_columns_of_another_length_than_the_tokens_are_no_answer(changed: dict[str, Any]) -> None:
    collector = RunCollector("t", ROLLING)
    collector.push(header())
    with pytest.raises(Internal, match="2 tokens came with"):
        collector.push(chunk(**changed))
    assert read_run(run_to_text(collector.run())).entries  # nothing of the chunk was taken


NEXT = NextTokenQuestion((IDS,), 2, (9,))
FOUND = NextTokens(
    int_array([5, 6]), np.array([-1.0, -2.0]), (), Tail("MEASURED", -3.0), np.array([-4.0]), Tail("MEASURED", -3.5),
    10, 3, None,
)  # fmt: skip


def next_entry(found: NextTokens) -> NextEntry:
    answer = NextTokenAnswer((NextTokenResult(0, 0, found),), PROVENANCE, Usage(3, 3), Execution())
    (entry,) = collected(NEXT, answer).entries
    assert isinstance(entry, NextEntry)
    return entry


@pytest.mark.parametrize(
    "changed",
    [{"top_logprobs": np.array([-1.0, NAN])}, {"extra_logprobs": np.array([-INF])}, {"tail": Tail("MEASURED", NAN)},
     {"tail": Tail("MEASURED", 5.0)}, {"tail_beyond_extra": Tail("MEASURED", INF)}],
    ids=str,
)  # fmt: skip
def test_next_tokens_with_a_number_that_is_none_are_a_problem_of_their_prompt(changed: dict[str, Any]) -> None:
    entry = next_entry(replace(FOUND, **changed))
    assert (entry.top_ids, entry.extra_logprobs, reason_of(entry)) == ((), {}, "NON_FINITE_LOGITS")


def test_next_tokens_with_good_numbers_are_kept() -> None:
    entry = next_entry(FOUND)
    assert (entry.top_ids, entry.extra_logprobs, entry.problem) == ((5, 6), {9: -4.0}, None)


SCORE = ScoreQuestion(IDS, (IDS,), labels=(5, 6))


@pytest.mark.parametrize("changed", [{"scores": (0.5, NAN)}, {"label_logprobs": (-INF, -1.0)}], ids=str)
def test_label_scores_that_are_no_numbers_are_a_problem_of_their_item(changed: dict[str, Any]) -> None:
    result = replace(ScoreResult(0, 0, 3, (0.5, 0.5), (-1.0, -1.0)), **changed)
    (entry,) = collected(SCORE, ScoreAnswer((result,), PROVENANCE, Usage(3, 3), Execution())).entries
    assert isinstance(entry, ScoreEntry)
    assert (entry.scores, entry.label_logprobs, reason_of(entry)) == ((), (), "NON_FINITE_LOGITS")


def test_label_scores_with_logprobs_of_other_labels_are_a_problem_of_their_item() -> None:
    result = ScoreResult(0, 0, 3, (0.5, 0.5), (-1.0,))
    (entry,) = collected(SCORE, ScoreAnswer((result,), PROVENANCE, Usage(3, 3), Execution())).entries
    assert reason_of(entry) == "INCOMPLETE_STREAM"


def test_label_scores_may_come_without_any_logprob() -> None:
    result = ScoreResult(0, 0, 3, (0.5, 0.5), ())
    (entry,) = collected(SCORE, ScoreAnswer((result,), PROVENANCE, Usage(3, 3), Execution())).entries
    assert isinstance(entry, ScoreEntry)
    assert (entry.scores, entry.problem) == ((0.5, 0.5), None)


def test_next_tokens_without_their_logprobs_are_no_answer() -> None:
    with pytest.raises(Internal, match="2 token ids came with 1"):
        next_entry(replace(FOUND, top_logprobs=np.array([-1.0])))
