"""The hand-made vectors that any implementation can replay, replayed here; and planted faults that they catch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from dualtrace.compare.pass_rule import PassRule, TokenStatus
from dualtrace.engine import Read, int_array
from dualtrace.masks import packing
from dualtrace.problems import Problem, Reason
from dualtrace.questions.answers import Tail
from dualtrace.questions.score import label_softmax
from dualtrace.questions.tails import tail_of
from dualtrace.questions.windows import Window, window_count, windows
from dualtrace.reference.readout import read_logits
from tests.support.vectors import Case, cases, load, number

Rule = Callable[[PassRule, float | None, float | None], TokenStatus]


# --- rolling windows


def replay_windows(case: Case, cut: Callable[[int, int, int], Sequence[Window]]) -> list[Case]:
    """The windows as the file writes them: runs of the prefix token and of token indices."""
    sequence: list[Any] = [*(["P"] if case["has_prefix"] else []), *range(case["tokens"])]
    return [
        {"feeds": sequence[w.feed_start : w.feed_stop], "scores": sequence[w.score_start : w.score_stop]}
        for w in cut(len(sequence), case["max_tokens"], case["stride"])
    ]


@cases("rolling_windows")
def test_windows_are_those_of_the_vectors(case: Case) -> None:
    assert replay_windows(case, lambda *grid: list(windows(*grid))) == case["windows"]


@cases("rolling_windows")
def test_the_number_of_windows_is_known_without_making_them(case: Case) -> None:
    length = case["tokens"] + case["has_prefix"]
    assert window_count(length, case["max_tokens"], case["stride"]) == len(case["windows"])


def _without_back_fill(length: int, max_tokens: int, stride: int) -> list[Window]:
    return [dataclasses.replace(w, feed_start=w.score_start - 1) for w in windows(length, max_tokens, stride)]


def _one_input_too_many(length: int, max_tokens: int, stride: int) -> list[Window]:
    return [dataclasses.replace(w, feed_start=max(0, w.feed_start - 1)) for w in windows(length, max_tokens, stride)]


def _always_a_window(length: int, max_tokens: int, stride: int) -> list[Window]:
    return list(windows(length, max_tokens, stride)) or [Window(0, 0, 0, 0)]


@pytest.mark.parametrize("wrong", [_without_back_fill, _one_input_too_many, _always_a_window])
def test_wrong_windows_would_be_caught(wrong: Callable[[int, int, int], list[Window]]) -> None:
    assert any(replay_windows(case, wrong) != case["windows"] for case in load("rolling_windows")["cases"])


# --- ranks


def replay_ranks(logits: Sequence[float]) -> Case:
    width = len(logits)
    rows = np.tile(np.asarray(logits, np.float64), (width, 1))
    columns = read_logits(rows, Read(int_array(range(width)), targets=int_array(range(width)), top_k=width))
    assert columns.ranks is not None
    assert columns.ties is not None
    assert columns.top_ids is not None
    return {"ranks": columns.ranks.tolist(), "ties": columns.ties.tolist(), "order": columns.top_ids[0].tolist()}


@cases("ranks")
def test_ranks_ties_and_order_are_those_of_the_vectors(case: Case) -> None:
    assert replay_ranks(case["logits"]) == {key: case[key] for key in ("ranks", "ties", "order")}


def test_ranks_that_break_ties_by_the_higher_id_would_be_caught() -> None:
    def order_by_higher_id(logits: Sequence[float]) -> list[int]:
        return sorted(range(len(logits)), key=lambda i: (-logits[i], -i))

    assert any(order_by_higher_id(case["logits"]) != case["order"] for case in load("ranks")["cases"])


def test_ranks_that_count_ties_as_better_would_be_caught() -> None:
    def rank_among_equals(logits: Sequence[float]) -> list[int]:
        return [sum(other >= own for other in logits) for own in logits]

    assert any(rank_among_equals(case["logits"]) != case["ranks"] for case in load("ranks")["cases"])


# --- tails


@cases("tails")
def test_tail_states_are_those_of_the_vectors(case: Case) -> None:
    rest = number(case["rest_logprob"])
    assert rest is not None
    assert tail_of(case["listed_ids"], case["vocab_size"], rest) == Tail(case["state"], case["tail_logprob"])


def replay_row_tail(case: Case) -> tuple[Tail, Tail | None]:
    """(tail, tail beyond the extra ids) of one row of logits."""
    extra = case["extra_ids"]
    read = Read(int_array([0]), top_k=case["top_k"], extra_ids=int_array(extra) if extra else None, tail=True)
    columns = read_logits(np.asarray([case["logits"]], np.float64), read)
    assert columns.tail_logprobs is not None
    assert columns.top_ids is not None
    width = len(case["logits"])
    tail = tail_of(case["top_k"], width, float(columns.tail_logprobs[0]))
    if columns.rest_logprobs is None:
        return tail, None
    listed = len({*extra, *columns.top_ids[0].tolist()})
    return tail, tail_of(listed, width, float(columns.rest_logprobs[0]))


def same_mass(tail: Tail, state: str, probability: float | None) -> bool:
    if tail.state != state or (tail.logprob is None) != (probability is None):
        return False
    if tail.logprob is None or probability is None:
        return True
    return math.isclose(math.exp(tail.logprob), probability, rel_tol=load("tails")["probability_rel_tolerance"])


@cases("tails", "row_cases")
def test_the_tail_of_a_row_is_that_of_the_vectors(case: Case) -> None:
    tail, _beyond = replay_row_tail(case)
    assert same_mass(tail, case["state"], case["tail_probability"]), tail


@cases("tails", "row_cases")
def test_the_tail_beyond_extra_ids_is_there_when_they_are_and_is_that_of_the_vectors(case: Case) -> None:
    _tail, beyond = replay_row_tail(case)
    if beyond is None:
        assert "beyond_state" not in case
    else:
        assert same_mass(beyond, case["beyond_state"], case["beyond_probability"]), beyond


def test_a_tail_made_by_one_minus_the_sum_would_be_caught() -> None:
    case = next(case for case in load("tails")["row_cases"] if case["name"] == "1 - sum would say 0 here")
    listed = math.exp(case["logits"][0]) / sum(math.exp(logit) for logit in case["logits"])
    assert 1.0 - listed == 0.0
    assert case["tail_probability"] > 0.0


def test_a_tail_bound_that_is_off_by_one_double_would_be_caught() -> None:
    bounds = {case["name"]: case["rest_logprob"] for case in load("tails")["cases"]}
    at, below = bounds["at the bound it is still measured"], bounds["one double below the bound"]
    assert math.nextafter(at, -math.inf) == below
    assert at == -126 * math.log(2)


# --- the pass rule


def judge(case: Case, rule: Rule) -> str:
    made = PassRule(case["abs_epsilon"], case["rel_epsilon"])
    return str(rule(made, number(case["left"]), number(case["right"])))


@cases("pass_rule")
def test_values_agree_as_the_vectors_say(case: Case) -> None:
    assert judge(case, PassRule.judge) == case["status"]


def _naive(rule: PassRule, left: float | None, right: float | None) -> TokenStatus:
    """As one writes it first: infinities and absent values go through the arithmetic."""
    one, two = left or 0.0, right or 0.0
    close = abs(one - two) <= rule.abs_epsilon + rule.rel_epsilon * max(abs(one), abs(two))
    return TokenStatus.MATCH if close else TokenStatus.MISMATCH


def _numpy_like(rule: PassRule, left: float | None, right: float | None) -> TokenStatus:
    """numpy.isclose: relative to the right side only, and infinities of one sign agree."""
    if left is None or right is None:
        return TokenStatus.UNSCORED if left is right else TokenStatus.MISMATCH
    close = bool(np.isclose(left, right, rtol=rule.rel_epsilon, atol=rule.abs_epsilon))
    return TokenStatus.MATCH if close else TokenStatus.MISMATCH


@pytest.mark.parametrize(
    "wrong",
    [_naive, _numpy_like, lambda *_: TokenStatus.MATCH, lambda *_: TokenStatus.MISMATCH],
    ids=["naive", "numpy", "always passes", "always fails"],
)
def test_a_wrong_pass_rule_would_be_caught(wrong: Rule) -> None:
    assert any(judge(case, wrong) != case["status"] for case in load("pass_rule")["cases"])


@pytest.mark.parametrize("field", ["abs_epsilon", "rel_epsilon"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [(-1e-9, Reason.OUT_OF_RANGE), (math.nan, Reason.NOT_FINITE), (math.inf, Reason.NOT_FINITE)],
)
def test_an_epsilon_that_is_no_bound_is_refused_by_name(field: str, value: float, reason: Reason) -> None:
    with pytest.raises(Problem) as caught:
        PassRule(**({"abs_epsilon": 0.0, "rel_epsilon": 0.0} | {field: value}))
    assert (caught.value.reason, caught.value.detail.field, caught.value.detail.allowed) == (reason, field, ">= 0")


# --- label softmax


def off_by(case: Case, softmax: Callable[[Any, float], Any]) -> float:
    labels = np.asarray([number(value) for value in case["label_logprobs"]], np.float64)
    with np.errstate(all="ignore"):
        scores = softmax(labels, case["temperature"])
    return float(np.max(np.abs(np.nan_to_num(scores, nan=np.inf) - case["scores"])))


@cases("label_softmax")
def test_label_scores_are_those_of_the_vectors(case: Case) -> None:
    labels = np.asarray([number(value) for value in case["label_logprobs"]], np.float64)
    scores = label_softmax(labels, case["temperature"])
    assert scores.tolist() == pytest.approx(case["scores"], rel=0, abs=load("label_softmax")["abs_tolerance"])


def _unshifted(labels: Any, temperature: float) -> Any:
    weights = np.exp(labels / temperature)
    return weights / weights.sum()


def _of_probabilities(labels: Any, temperature: float) -> Any:
    return np.exp(labels) / np.exp(labels).sum()


@pytest.mark.parametrize("wrong", [_unshifted, _of_probabilities], ids=["unshifted", "without temperature"])
def test_a_wrong_label_softmax_would_be_caught(wrong: Callable[[Any, float], Any]) -> None:
    vectors = load("label_softmax")
    assert any(off_by(case, wrong) > vectors["abs_tolerance"] for case in vectors["cases"])


# --- packed positions


@pytest.mark.parametrize("convention", list(packing.Convention))
@cases("packed_positions")
def test_packed_positions_are_those_of_the_vectors(case: Case, convention: packing.Convention) -> None:
    expected = case["hidden" if convention is packing.Convention.MIS_HIDDEN_DELIMITER else "visible"]
    if expected is None:
        with pytest.raises(Problem) as caught:
            packing.positions(case["delimiters"], case["length"], convention)
        assert caught.value.reason is Reason.EMPTY_PROMPT
        return
    positions = packing.positions(case["delimiters"], case["length"], convention).tolist()
    assert positions == [*range(case["delimiters"][0]), *expected]


@cases("packed_positions")
def test_delimiters_stand_where_the_vectors_say(case: Case) -> None:
    if case["item_lengths"] is not None:
        made = packing.delimiter_indices(case["delimiters"][0], case["item_lengths"])
        assert list(made) == case["delimiters"]


def test_positions_that_only_count_would_be_caught() -> None:
    assert any(
        [*range(case["delimiters"][0], case["length"])] != case["visible"] for case in load("packed_positions")["cases"]
    )
