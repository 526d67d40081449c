"""Laws of the comparator: cuts, interleaving and order change nothing, swapping mirrors, what is planted is found."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dualtrace.compare.distributions import Known, diverge, share
from dualtrace.compare.pass_rule import CODES, PassRule
from dualtrace.compare.report import CompareReport, Verdict, read_report, report_to_text
from dualtrace.compare.sides import SideName
from dualtrace.compare.statistics import least_abs_epsilon
from dualtrace.compare.tolerance import request_tolerance
from dualtrace.questions.answers import Tail
from dualtrace.questions.tails import tail_of
from tests.support.compared import STRICT, Event, SideText, answer_of, compare, problem_of, rolling

LOGPROBS = st.floats(-60, 0, allow_nan=False).map(lambda value: value + 0.0)
RANKS = st.integers(1, 50)
ORDERS = st.lists(st.sampled_from(list(SideName)), max_size=40)


@st.composite
def texts(draw: st.DrawFn, least: int = 0) -> SideText:
    count = draw(st.integers(least, 24))
    ids = draw(st.lists(st.integers(0, 5), min_size=count + 1, max_size=count + 1))
    logprobs = draw(st.lists(LOGPROBS, min_size=count, max_size=count))
    return SideText(ids, logprobs, draw(st.lists(RANKS, min_size=count, max_size=count)))


@st.composite
def pairs_of_texts(draw: st.DrawFn) -> tuple[SideText, SideText]:
    """Mostly alike: some logprobs and ranks differ, sometimes an id, sometimes the length."""
    left = draw(texts())
    count = len(left.logprobs)
    near = [draw(st.one_of(st.just(value), LOGPROBS)) for value in left.logprobs]
    ids = list(left.ids)
    if draw(st.integers(0, 3)) == 0:
        ids[draw(st.integers(0, count))] = 9
    right = SideText(ids, near, draw(st.lists(RANKS, min_size=count, max_size=count)))
    cut = draw(st.integers(0, count)) if draw(st.integers(0, 3)) == 0 else count
    return left, SideText(right.ids[: cut + 1], right.logprobs[:cut], right.ranks[:cut])


def cut_short(events: list[Event], keep: int | None) -> list[Event]:
    """The side dies after `keep` events."""
    return events if keep is None else [*events[:keep], problem_of()]


def text_of(report: CompareReport) -> str:
    return report_to_text(report)


@settings(max_examples=120)
@given(
    st.lists(pairs_of_texts(), min_size=1, max_size=3),
    st.integers(1, 9), st.integers(1, 9), ORDERS, ORDERS, st.none() | st.integers(0, 12), st.integers(0, 40),
)  # fmt: skip
def test_neither_chunks_nor_the_order_of_arrival_change_the_report(
    items: list[tuple[SideText, SideText]], one: int, other: int, first: Any, second: Any, dies: int | None, limit: int
) -> None:
    left, right = [pair[0] for pair in items], [pair[1] for pair in items]
    question, dying = rolling(len(items)), cut_short(answer_of(*right, chunk_tokens=3), dies)
    plain = compare(answer_of(*left, chunk_tokens=one), dying, question, order=first, limit=limit)
    again = compare(answer_of(*left, chunk_tokens=other), dying, question, order=second, limit=limit)
    assert text_of(plain.report) == text_of(again.report)


@settings(max_examples=120)
@given(pairs_of_texts(), st.floats(0, 2), st.floats(0, 0.5))
def test_swapping_the_sides_mirrors_the_report(pair: tuple[SideText, SideText], room: float, relative: float) -> None:
    tolerance = request_tolerance(room, relative)
    one = compare(answer_of(pair[0]), answer_of(pair[1]), tolerance=tolerance).report
    other = compare(answer_of(pair[1]), answer_of(pair[0]), tolerance=tolerance).report
    assert one.verdict is other.verdict
    assert one.tokens is not None
    assert other.tokens is not None
    mirrored = mirror(other.tokens)
    assert replace(one.tokens, rank_delta_summary=None) == replace(mirrored, rank_delta_summary=None)
    if one.tokens.rank_delta_summary is not None and mirrored.rank_delta_summary is not None:
        assert one.tokens.rank_delta_summary.mrr_delta == mirrored.rank_delta_summary.mrr_delta
    columns, back = one.items[0].columns, other.items[0].columns
    assert (columns.left_logprobs, columns.statuses) == (back.right_logprobs, back.statuses)


def mirror(tokens: Any) -> Any:
    loss, parted, ranks = tokens.token_loss_diff_summary, tokens.first_id_mismatch, tokens.rank_delta_summary
    return replace(
        tokens,
        token_loss_diff_summary=loss and replace(loss, signed_mean=0.0 - loss.signed_mean),
        first_id_mismatch=parted
        and replace(
            parted, left_id=parted.right_id, right_id=parted.left_id, left_piece=parted.right_piece,
            right_piece=parted.left_piece,
        ),
        rank_delta_summary=ranks
        and replace(
            ranks, mrr_left=ranks.mrr_right, mrr_right=ranks.mrr_left, mrr_delta=0.0 - ranks.mrr_delta
        ),
    )  # fmt: skip


@given(texts(least=1), st.data())
def test_a_planted_difference_is_found_where_it_is(text: SideText, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(text.logprobs) - 1))
    changed = list(text.logprobs)
    changed[place] = np.nextafter(changed[place], -np.inf)
    report = compare(answer_of(text), answer_of(replace(text, logprobs=changed)), tolerance=STRICT).report
    assert report.tokens is not None
    assert (report.verdict, report.tokens.first_divergence_index) == (Verdict.FAIL, place + 1)


@given(st.lists(texts(least=1), min_size=1, max_size=3), ORDERS)
def test_identical_sides_pass(items: list[SideText], order: list[SideName]) -> None:
    report = compare(answer_of(*items), answer_of(*items), rolling(len(items)), order=order).report
    assert report.verdict is Verdict.PASS


@given(pairs_of_texts(), st.integers(0, 30))
def test_a_report_read_and_written_again_is_the_same(pair: tuple[SideText, SideText], limit: int) -> None:
    text = report_to_text(compare(answer_of(pair[0]), answer_of(pair[1]), limit=limit).report)
    assert report_to_text(read_report(text)) == text


ANY_VALUE = st.one_of(st.none(), st.sampled_from([math.inf, -math.inf, math.nan]), st.floats(-1e3, 0))


@given(st.lists(st.tuples(ANY_VALUE, ANY_VALUE), min_size=1), st.floats(0, 10), st.floats(0, 1))
def test_columns_are_judged_as_single_values_are(
    pairs: list[tuple[float | None, float | None]], room: float, relative: float
) -> None:
    rule = PassRule(room, relative)
    columns = [
        np.array([math.nan if value is None else value for value in column]) for column in zip(*pairs, strict=True)
    ]
    there = [np.array([value is not None for value in column]) for column in zip(*pairs, strict=True)]
    codes = rule.judge_columns(columns[0], columns[1], there[0], there[1])
    assert [CODES[code] for code in codes] == [rule.judge(left, right) for left, right in pairs]


@example([(-2.804, -5.5)], 0.1)  # difference less room, and room added again, is a little less
@given(st.lists(st.tuples(LOGPROBS, LOGPROBS), min_size=1), st.floats(0, 1))
def test_the_least_epsilon_is_enough_and_hardly_less_is_not(pairs: list[tuple[float, float]], relative: float) -> None:
    left, right = (np.array(column) for column in zip(*pairs, strict=True))
    found = least_abs_epsilon(left, right, relative)
    assert PassRule(found, relative).agree_columns(left, right).all()
    less = found - 4 * np.spacing(np.abs(left - right).max())
    assert less <= 0 or not PassRule(less, relative).agree_columns(left, right).all()


# Distributions


def logs(weights: list[float]) -> Any:
    """Weights as logprobs of a whole distribution, float64."""
    values = np.log(np.array(weights))
    peak = values.max()
    return values - (peak + math.log(math.fsum(np.exp(values - peak).tolist())))


WEIGHTS = st.one_of(st.floats(1e-3, 1), st.floats(1e-30, 1e-3), st.floats(1e-60, 1e-30))


@st.composite
def distributions(draw: st.DrawFn) -> tuple[Any, Any, set[int], set[int]]:
    """Two distributions over one vocabulary, and the ids that each side tells; at least one in common."""
    size = draw(st.integers(2, 12))
    left, right = (logs(draw(st.lists(WEIGHTS, min_size=size, max_size=size))) for _ in range(2))
    ids = st.sets(st.integers(0, size - 1))
    common = draw(st.integers(0, size - 1))
    return left, right, draw(ids) | {common}, draw(ids) | {common}


def told(logprobs: Any, ids: set[int]) -> Known:
    rest = [float(value) for token, value in enumerate(logprobs) if token not in ids]
    peak = max(rest, default=-math.inf)
    mass = peak + math.log(math.fsum(math.exp(value - peak) for value in rest)) if rest else -math.inf
    known = {token: float(logprobs[token]) for token in ids}
    return Known(known, tail_of(len(ids), len(logprobs), mass), len(logprobs))


def kl(left: Any, right: Any) -> float:
    return math.fsum((np.exp(left) * (left - right)).tolist())


def js(left: Any, right: Any) -> float:
    middle = np.logaddexp(left, right) - math.log(2)
    return kl(left, middle) / 2 + kl(right, middle) / 2


ROUNDING = 1e-12
"""Float64 sums of at most a dozen terms of at most 140 nats; far below any divergence that matters."""


@settings(max_examples=300)
@given(distributions())
def test_divergences_are_bounded_by_what_both_sides_told(case: tuple[Any, Any, set[int], set[int]]) -> None:
    left, right, left_ids, right_ids = case
    found = diverge(share(told(left, left_ids), told(right, right_ids)))
    assert found.kl_left_right_lower is not None
    assert found.kl_right_left_lower is not None
    assert 0 <= found.kl_left_right_lower <= kl(left, right) + ROUNDING
    assert 0 <= found.kl_right_left_lower <= kl(right, left) + ROUNDING
    assert 0 <= found.js_lower <= js(left, right) + ROUNDING
    assert js(left, right) - ROUNDING <= found.js_upper <= math.log(2)


@given(distributions())
def test_with_every_id_told_the_divergences_are_exact(case: tuple[Any, Any, set[int], set[int]]) -> None:
    left, right, *_ = case
    every = set(range(len(left)))
    found = diverge(share(told(left, every), told(right, every)))
    assert math.isclose(found.kl_left_right_lower or 0.0, max(0.0, kl(left, right)), abs_tol=ROUNDING)
    assert math.isclose(found.js_lower, found.js_upper, abs_tol=ROUNDING)
    assert math.isclose(found.js_lower, js(left, right), abs_tol=ROUNDING)


@given(distributions())
def test_telling_more_ids_never_loosens_a_bound(case: tuple[Any, Any, set[int], set[int]]) -> None:
    left, right, ids, more = case
    few = diverge(share(told(left, ids), told(right, ids)))
    many = diverge(share(told(left, ids | more), told(right, ids | more)))
    assert (many.kl_left_right_lower or 0.0) >= (few.kl_left_right_lower or 0.0) - ROUNDING
    assert many.js_lower >= few.js_lower - ROUNDING
    assert many.js_upper <= few.js_upper + ROUNDING


@given(distributions())
def test_a_rest_that_is_nothing_is_told_as_full_coverage(case: tuple[Any, Any, set[int], set[int]]) -> None:
    left, right, ids, _ = case
    every = set(range(len(left)))
    found = share(told(left, every), told(right, ids))
    assert (found.left_tail == Tail("FULL_COVERAGE")) == (ids == every)
