"""The comparator on streamed answers: what it tells while they arrive, and what becomes of a side that fails."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dualtrace.compare.comparator import Comparator
from dualtrace.compare.events import CompareHeader, FirstDivergence, IdMismatch, SideFailed, TokenPairs
from dualtrace.compare.gates import GateName, GatePolicy, GateVerdict
from dualtrace.compare.pass_rule import TokenStatus
from dualtrace.compare.report import CompareReport, NotFiniteValue, Verdict
from dualtrace.compare.sides import SideFacts, SideName
from dualtrace.problems import InvalidArgument, Problem, Reason
from dualtrace.questions.answers import ItemHeader, ItemProblem, NextTokenAnswer, RollingWindows
from dualtrace.questions.asked import Input, MaskedForwardQuestion, TokenizeQuestion, Variant
from tests.support.compared import (
    PROVENANCE,
    STRICT,
    Event,
    SideText,
    answer_of,
    chunk_of,
    compare,
    done_of,
    header_of,
    problem_of,
    rolling,
    summary_of,
    tokens_of,
)

LEFT, RIGHT = SideName.LEFT, SideName.RIGHT
TEXT = SideText([7, 1, 2, 3], [-1.0, -2.0, -3.0])
ITEM = ItemHeader(4, unscored=tokens_of([7]))


def opened(**more: Any) -> Comparator:
    """Both headers of one item of four tokens have come."""
    comparator = Comparator(rolling(), STRICT, **more)
    for side in (LEFT, RIGHT):
        comparator.push(side, header_of(ITEM))
    return comparator


def verdict_of(report: CompareReport, gate: GateName) -> GateVerdict:
    return next(one.verdict for one in report.gates if one.gate is gate)


def test_pairs_leave_as_soon_as_both_sides_have_them() -> None:
    comparator = opened()
    assert comparator.push(LEFT, chunk_of(1, [1, 2, 3], [-1.0, -2.0, -3.0])) == ()
    (pairs,) = comparator.push(RIGHT, chunk_of(1, [1, 2], [-1.0, -2.0]))
    assert isinstance(pairs, TokenPairs)
    assert (pairs.first_index, pairs.token_ids, pairs.left_logprobs) == (1, (1, 2), (-1.0, -2.0))


def test_the_header_comes_first_with_what_differs() -> None:
    comparator = Comparator(rolling(), STRICT)
    assert comparator.push(LEFT, header_of(ITEM)) == ()
    other = replace(PROVENANCE, framework="jax", adapter_digests=(("a", "sha256:3"),))
    first, unscored = comparator.push(RIGHT, header_of(ITEM, provenance=other))
    assert isinstance(first, CompareHeader)
    assert [(one.field, one.left, one.right) for one in first.differences] == [
        ("framework", "reference", "jax"), ("adapter_digests", "", "a=sha256:3"),
    ]  # fmt: skip
    assert isinstance(unscored, TokenPairs)
    assert unscored.statuses == (TokenStatus.UNSCORED,)


def test_the_first_divergence_is_told_the_moment_it_is_known_and_once() -> None:
    comparator = opened()
    comparator.push(LEFT, chunk_of(1, [1, 2, 3], [-1.0, -2.0, -3.0]))
    assert len(comparator.push(RIGHT, chunk_of(1, [1], [-1.0]))) == 1
    _, told = comparator.push(RIGHT, chunk_of(2, [2], [-2.5]))
    assert told == FirstDivergence(0, 2, -2.0, -2.5)
    assert len(comparator.push(RIGHT, chunk_of(3, [3], [-9.0]))) == 1


def test_an_id_mismatch_is_told_with_both_pieces_and_ends_the_pairs() -> None:
    comparator = opened()
    comparator.push(LEFT, chunk_of(1, [1, 2], [-1.0, -2.0], pieces=["a", "b"]))
    pairs, told = comparator.push(RIGHT, chunk_of(1, [1, 5], [-1.0, -2.0], pieces=["a", "\u00e9"]))
    assert isinstance(pairs, TokenPairs)
    assert len(pairs.token_ids) == 1
    assert told == IdMismatch(0, 2, 2, 5, b"b", "\u00e9".encode())
    assert comparator.push(LEFT, chunk_of(3, [3], [-3.0])) == ()
    assert comparator.push(RIGHT, chunk_of(3, [3], [-3.0])) == ()


def test_a_gap_on_both_sides_is_not_passed_on_as_tokens() -> None:
    comparator = opened()
    comparator.push(LEFT, chunk_of(1, [1], [-1.0]))
    comparator.push(LEFT, chunk_of(3, [3], [-3.0]))
    events = [*comparator.push(RIGHT, chunk_of(1, [1], [-1.0])), *comparator.push(RIGHT, chunk_of(3, [3], [-3.0]))]
    assert [event.first_index for event in events if isinstance(event, TokenPairs)] == [1, 3]
    report = comparator.report(SideFacts("l"), SideFacts("r"))
    assert report.items[0].columns.token_ids == (7, 1, None, 3)
    assert report.items[0].columns.statuses[2] is TokenStatus.UNSCORED


def test_a_side_that_fails_names_itself_and_the_others_tokens_go_on() -> None:
    comparator = opened()
    comparator.push(LEFT, chunk_of(1, [1, 2], [-1.0, -2.0]))
    comparator.push(RIGHT, chunk_of(1, [1], [-1.0]))
    problem = problem_of()
    failed, pairs = comparator.fail(RIGHT, problem)
    assert failed == SideFailed(RIGHT, problem)
    assert isinstance(pairs, TokenPairs)
    assert (pairs.statuses, pairs.right_logprobs) == ((TokenStatus.UNAVAILABLE,), (None,))
    (more,) = comparator.push(LEFT, chunk_of(3, [3], [-3.0]))
    assert isinstance(more, TokenPairs)
    assert more.statuses == (TokenStatus.UNAVAILABLE,)


def test_a_side_that_fails_before_its_header_leaves_the_others_tokens_in_the_report() -> None:
    done = compare(answer_of(TEXT), [problem_of()], tolerance=None)
    assert [type(event) for event in done.events] == [SideFailed]
    report = done.report
    assert (report.verdict, report.tolerance, report.right.provenance) == (Verdict.ERROR, None, None)
    assert report.items[0].columns.left_logprobs == (None, -1.0, -2.0, -3.0)
    assert report.items[0].columns.statuses[1:] == (TokenStatus.UNAVAILABLE,) * 3


def test_both_sides_may_fail() -> None:
    report = compare([problem_of()], [problem_of("DEADLINE_EXCEEDED", "DEADLINE", "too late")]).report
    assert report.verdict is Verdict.ERROR
    assert report.left.problem is not None
    assert report.right.problem is not None
    assert [("left side" in one, "right side" in one) for one in report.reasons[:2]] == [(True, False), (False, True)]


def test_a_problem_that_only_the_comparer_saw_makes_its_side_fail() -> None:
    facts = (SideFacts("left"), SideFacts("right", problem=problem_of()))
    assert compare(answer_of(TEXT), answer_of(TEXT), facts=facts).report.verdict is Verdict.ERROR


@pytest.mark.parametrize(
    "broken",
    [
        [chunk_of(1, [1], [-1.0])],
        [header_of(ITEM, ITEM)],
        [header_of(ITEM), header_of(ITEM)],
        [header_of(ITEM), chunk_of(1, [1], [-1.0], item=3)],
        [header_of(ITEM), chunk_of(1, [1], [-1.0]), chunk_of(1, [1], [-1.0])],
        [header_of(ITEM), chunk_of(2, [1, 2, 3], [-1.0, -1.0, -1.0])],
        [header_of(ITEM), chunk_of(1, [1, 2], [-1.0])],
        [header_of(ITEM), chunk_of(1, [1, 2], [-1.0, -1.0], [1])],
        [header_of(ITEM), done_of(), chunk_of(1, [1], [-1.0])],
        [header_of(ITEM), summary_of()],
        [header_of(ITEM), done_of(), summary_of(), done_of()],
        [header_of(ITEM), chunk_of(1, [1, 2], [-1.0, -1.0]), done_of(scored=3), summary_of()],
        [header_of(ITEM), NextTokenAnswer((), PROVENANCE, summary_of().usage, summary_of().execution)],
    ],
    ids=lambda events: "-".join(type(event).__name__ for event in events),
)
def test_garbage_makes_its_own_side_fail(broken: list[Any]) -> None:
    report = compare(answer_of(TEXT), broken).report
    assert (report.verdict, report.left.problem) == (Verdict.ERROR, None)
    assert report.right.problem is not None
    assert report.right.problem.reason == Reason.INCOMPLETE_STREAM


def test_a_mismatch_without_a_number_stands_in_its_bucket() -> None:
    blank: list[Event] = [header_of(ItemHeader(2, unscored=tokens_of([7, 1]))), done_of(), summary_of()]
    tokens = compare(answer_of(SideText([7, 1], [-1.0])), blank).report.tokens
    assert tokens is not None
    assert [(one.count, one.mismatches, one.max_abs_diff) for one in tokens.position_buckets] == [(1, 1, None)]


WINDOWS = RollingWindows(2, 16, 8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"token_count": 9}, "left read 4 tokens and right 9"),
        ({"prompt_tokens": 1}, "part prompt and completion differently"),
        ({"prefix_token_id": 5}, "prefix token 4 before it and right 5"),
        ({"windows": replace(WINDOWS, count=1, max_tokens=32)}, "2 windows of 16 by 8"),
    ],
)  # fmt: skip
def test_items_that_were_read_otherwise_cannot_be_compared(change: dict[str, Any], said: str) -> None:
    """Although every token that was told is the same."""
    header = replace(ITEM, prefix_token_id=4, windows=WINDOWS)
    told = chunk_of(3, [3], [-1.0])
    sides: list[list[Event]] = [
        [header_of(one), told, done_of(scored=1), summary_of()] for one in (header, replace(header, **change))
    ]
    report = compare(sides[0], sides[1]).report
    assert report.verdict is Verdict.INCOMPARABLE
    assert said in report.reasons[0]


def test_texts_that_fit_one_window_do_not_notice_its_size() -> None:
    one = replace(ITEM, windows=RollingWindows(1, 16, 8))
    sides: list[list[Event]] = [
        [header_of(header), *TEXT.events(), summary_of()]
        for header in (one, replace(one, windows=RollingWindows(1, 32, 32)))
    ]
    assert compare(sides[0], sides[1]).report.verdict is Verdict.PASS


def test_a_failure_told_at_the_end_is_not_laid_to_the_side_that_waited() -> None:
    comparator = Comparator(rolling(), STRICT)
    for event in answer_of(TEXT):
        assert not isinstance(event, Problem)
        comparator.push(LEFT, event)
    report = comparator.report(SideFacts("left"), SideFacts("right", problem=problem_of()))
    assert report.left.problem is None


def test_items_that_fail_within_the_allowed_rate_do_not_fail_the_side() -> None:
    bad = [header_of(ItemHeader(), TEXT.header), ItemProblem(0, 0, problem_of()), *TEXT.events(1), summary_of(1, 1)]
    done = compare(answer_of(TEXT, TEXT), bad, rolling(2), policy=GatePolicy(max_failure_rate=0.5))
    assert done.report.verdict is Verdict.PASS
    assert any("item 0 failed on the right side" in reason for reason in done.report.reasons)


def test_without_a_tolerance_the_profile_of_the_sides_is_chosen_and_named() -> None:
    report = compare(answer_of(TEXT), answer_of(TEXT), tolerance=None).report
    assert report.tolerance is not None
    assert report.tolerance.name == "float32-highest"


def test_an_unknown_precision_asks_for_a_tolerance() -> None:
    comparator = Comparator(rolling(), None)
    comparator.push(LEFT, header_of(ITEM))
    with pytest.raises(InvalidArgument, match="give abs_epsilon"):
        comparator.push(RIGHT, header_of(ITEM, provenance=replace(PROVENANCE, dtype="unknown")))


def test_a_question_without_numbers_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="asks for no numbers"):
        Comparator(TokenizeQuestion((Input(text="a"),)), STRICT)


def test_beyond_the_limit_tokens_are_judged_and_not_kept() -> None:
    late = replace(TEXT, logprobs=[-1.0, -2.0, -3.5])
    report = compare(answer_of(TEXT, TEXT), answer_of(TEXT, late), rolling(2), limit=6).report
    assert report.tokens is not None
    assert (report.verdict, report.tokens.not_kept_count) == (Verdict.FAIL, 2)
    assert [(item.kept_tokens, item.cut_tokens) for item in report.items] == [(4, 0), (2, 2)]
    assert (report.tokens.first_divergence_item, report.tokens.first_divergence_index) == (1, 3)
    assert any("debug_token_limit" in reason for reason in report.reasons)


def test_an_argmax_flip_comes_with_both_margins() -> None:
    left = replace(TEXT, top_ids=[[1, 2], [4, 2], [3, 9]], top_logprobs=[[-1.0, -2.0], [-0.5, -2.0], [-1.0, -2.0]])
    right = replace(left, top_ids=[[1, 2], [2, 4], [3, 9]], top_logprobs=[[-1.0, -2.0], [-1.0, -1.25], [-1.0, -2.0]])
    tokens = compare(answer_of(left), answer_of(right), rolling(top_k=2)).report.tokens
    assert tokens is not None
    flip = tokens.first_argmax_flip
    assert flip is not None
    assert (flip.index, flip.left_top_id, flip.right_top_id) == (2, 4, 2)
    assert (flip.left_margin, flip.right_margin) == (1.5, 0.25)


def test_what_nobody_asked_or_a_side_cannot_give_is_named() -> None:
    ranked = answer_of(TEXT)
    unranked: list[Event] = [
        header_of(ITEM),
        chunk_of(1, [1, 2, 3], [-1.0, -2.0, -3.0], []),
        done_of(scored=3),
        summary_of(),
    ]
    report = compare(ranked, unranked).report
    assert report.tokens is not None
    assert report.verdict is Verdict.PASS
    assert set(report.tokens.unavailable_fields) >= {"token_ranks", "token_candidates"}
    assert report.tokens.rank_delta_summary is None
    assert (report.left.mrr, report.right.mrr) == (1.0, None)


def test_kl_columns_of_both_sides_are_held_against_each_other() -> None:
    question = MaskedForwardQuestion(TEXT_INPUT, (Variant(),), kl_base_masked=True)
    sides: list[list[Event]] = [
        [
            header_of(ITEM),
            chunk_of(1, [1, 2, 3], [-1.0, -2.0, -3.0], kl_base_masked=kl),
            done_of(scored=3),
            summary_of(),
        ]
        for kl in ([0.0, 0.5, 1.0], [0.0, 0.75, 1.0])
    ]
    tokens = compare(sides[0], sides[1], question).report.tokens
    assert tokens is not None
    assert tokens.kl_base_masked_max_abs_diff == 0.25
    assert tokens.kl_masked_base_max_abs_diff is None


TEXT_INPUT = Input(ids=tokens_of([7, 1, 2, 3]).ids)


def test_a_value_that_json_cannot_hold_is_kept_by_name() -> None:
    odd = replace(TEXT, logprobs=[-1.0, float("nan"), float("-inf")])
    columns = compare(answer_of(odd), answer_of(TEXT)).report.items[0].columns
    assert [(one.index, one.value) for one in columns.left_not_finite] == [
        (2, NotFiniteValue.NAN), (3, NotFiniteValue.MINUS_INFINITY),
    ]  # fmt: skip
    assert columns.left_logprobs == (None, -1.0, None, None)


def test_another_prefix_token_is_noted() -> None:
    headers = [replace(TEXT.header, prefix_token_id=prefix) for prefix in (1, None)]
    sides = [[header_of(header), *TEXT.events(), summary_of()] for header in headers]
    assert any("prefix token 1" in reason for reason in compare(sides[0], sides[1]).report.reasons)


def test_position_buckets_count_every_judged_token_once() -> None:
    long = SideText([1] * 101, [-1.0] * 100)
    tokens = compare(answer_of(long), answer_of(long)).report.tokens
    assert tokens is not None
    assert [(one.start, one.stop, one.count) for one in tokens.position_buckets] == [
        (0, 16, 15), (16, 64, 48), (64, 256, 37),
    ]  # fmt: skip


def test_percentiles_and_the_bias_are_those_of_the_differences() -> None:
    diffs = np.arange(101) / 4
    left = SideText([1] * 102, [-1.0] * 101)
    right = replace(left, logprobs=[-1.0 - one for one in diffs.tolist()])
    tokens = compare(answer_of(left), answer_of(right)).report.tokens
    assert tokens is not None
    loss = tokens.token_loss_diff_summary
    assert loss is not None
    assert (loss.max, loss.mean, loss.p50, loss.p95, loss.p99, loss.signed_mean) == (
        25.0,
        12.5,
        12.5,
        23.75,
        24.75,
        12.5,
    )
