"""The comparator on answers that come whole: next-token distributions, label scores, and receipts of masks."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dualtrace.compare.comparator import Comparator
from dualtrace.compare.distributions import Known, diverge, share
from dualtrace.compare.gates import GateName, GateVerdict
from dualtrace.compare.pass_rule import TokenStatus
from dualtrace.compare.report import BenchmarkReport, CompareReport, Verdict, read_report, report_to_text
from dualtrace.compare.sides import SideFacts, SideName
from dualtrace.compare.tolerance import Tolerance, request_tolerance
from dualtrace.engine import int_array
from dualtrace.masks.spec import Causal, Full, MaskSpec
from dualtrace.problems import Problem
from dualtrace.questions.answers import (
    Applied,
    Execution,
    MaskMetadata,
    MaskReceipt,
    NextTokenAnswer,
    NextTokenResult,
    NextTokens,
    ScoreAnswer,
    ScoreResult,
    Tail,
    Usage,
)
from dualtrace.questions.asked import Input, NextTokenQuestion, ScoreQuestion, Variant
from dualtrace.questions.tails import UNDERFLOW_LOGPROB
from dualtrace.runs.collector import RunCollector
from tests.support.compared import (
    CREATED,
    PROVENANCE,
    STRICT,
    SideText,
    compare,
    done_of,
    header_of,
    problem_of,
    rolling,
    summary_of,
)

LEFT, RIGHT = SideName.LEFT, SideName.RIGHT
PROMPT = Input(ids=int_array([1]))
NEXT = NextTokenQuestion((PROMPT,), top_k=2)
HALF, QUARTER, EIGHTH = math.log(0.5), math.log(0.25), math.log(0.125)


def next_of(logprobs: dict[int, float], tail: Tail, **more: Any) -> NextTokens:
    """As a second reading gives it: extra ids alone."""
    found = NextTokens(
        top_ids=int_array([]), top_logprobs=np.array([]), top_pieces=(), tail=Tail("MEASURED", 0.0),
        extra_logprobs=np.array(list(logprobs.values())), tail_beyond_extra=tail, vocab_size=10, prompt_tokens=1,
        prefix_token_id=None,
    )  # fmt: skip
    return replace(found, **more)


def next_answer(*outcomes: NextTokens | Problem) -> NextTokenAnswer:
    results = tuple(NextTokenResult(item, 0, outcome) for item, outcome in enumerate(outcomes))
    return NextTokenAnswer(results, PROVENANCE, Usage(1, 1), Execution())


def compare_next(
    left: NextTokens | Problem, right: NextTokens | Problem, ids: tuple[int, ...] = (3, 4),
    tolerance: Tolerance = STRICT,
) -> CompareReport:  # fmt: skip
    comparator = Comparator(NEXT, tolerance)
    for side, found in ((LEFT, left), (RIGHT, right)):
        comparator.reread(side, replace(NEXT, top_k=0, extra_token_ids=ids), {3: b"a", 4: b"b"})
        comparator.push(side, next_answer(found))
    return comparator.report(SideFacts("left"), SideFacts("right"), created=CREATED)


ONE = next_of({3: HALF, 4: QUARTER}, Tail("MEASURED", QUARTER))
OTHER = next_of({3: QUARTER, 4: HALF}, Tail("MEASURED", QUARTER))


def test_distributions_are_compared_on_the_union() -> None:
    (line,) = compare_next(ONE, OTHER).distributions
    assert (line.token_ids, line.tokens, line.status) == ((3, 4), (b"a", b"b"), TokenStatus.MISMATCH)
    assert line.max_abs_diff == pytest.approx(math.log(2))
    assert line.kl_left_right_lower == pytest.approx(0.25 * math.log(2))
    assert line.kl_right_left_lower == pytest.approx(0.25 * math.log(2))
    assert line.js_lower is not None
    assert line.js_upper is not None
    assert line.js_lower == pytest.approx(0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3))
    assert line.js_upper - line.js_lower == pytest.approx(0.25 * math.log(2))
    assert line.top1_agrees is False


def test_equal_distributions_pass_with_no_divergence() -> None:
    report = compare_next(ONE, ONE)
    (line,) = report.distributions
    assert report.verdict is Verdict.PASS
    assert (line.kl_left_right_lower, line.js_lower, line.top1_agrees) == (0.0, 0.0, True)


def test_an_id_that_one_side_alone_told_goes_into_its_rest() -> None:
    more = replace(
        ONE, top_ids=int_array([5]), top_logprobs=np.array([EIGHTH]), tail_beyond_extra=Tail("MEASURED", EIGHTH)
    )
    (line,) = compare_next(more, ONE).distributions
    assert line.token_ids == (3, 4)
    assert line.left_tail is not None
    assert line.left_tail.logprob == pytest.approx(QUARTER)
    assert line.kl_left_right_lower == pytest.approx(0.0, abs=1e-15)


def test_a_rest_that_underflows_divides_as_the_bound_and_has_no_term_of_its_own() -> None:
    measured = Known({1: HALF}, Tail("MEASURED", HALF), 5)
    under = Known({1: 0.0}, Tail("UNDERFLOW"), 5)
    found = diverge(share(measured, under))
    assert found.kl_left_right_lower == pytest.approx(0.5 * HALF + 0.5 * (HALF - UNDERFLOW_LOGPROB))
    assert found.kl_right_left_lower == pytest.approx(math.log(2))
    assert found.js_upper >= found.js_lower


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"vocab_size": 11}, "10 token ids and right 11"),
        ({"prompt_tokens": 2}, "tokenise it differently"),
        ({"prefix_token_id": 0}, "prefix"),
        ({"top_ids": int_array([3]), "top_logprobs": np.array([HALF]), "top_pieces": (b"x",)}, "stands for"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_distributions_over_other_tokens_are_incomparable(changed: dict[str, Any], said: str) -> None:
    report = compare_next(ONE, replace(ONE, **changed))
    assert report.verdict is Verdict.INCOMPARABLE
    assert said in report.reasons[0]
    assert report.distributions[0].kl_left_right_lower is None


def test_a_prompt_that_fails_on_one_side_is_named() -> None:
    report = compare_next(ONE, problem_of())
    assert (report.verdict, report.distributions[0].status) == (Verdict.ERROR, TokenStatus.UNAVAILABLE)
    assert report.distributions[0].right_problem is not None


def test_a_logprob_that_is_no_number_fails_its_prompt() -> None:
    report = compare_next(ONE, next_of({3: math.nan, 4: QUARTER}, Tail("MEASURED", QUARTER)))
    assert report.verdict is Verdict.ERROR
    assert "no finite number" in report.reasons[0]


def test_extra_logprobs_that_do_not_count_the_ids_make_the_side_fail() -> None:
    report = compare_next(ONE, OTHER, ids=(3, 4, 5))
    assert report.verdict is Verdict.ERROR


def test_results_for_other_prompts_than_asked_make_the_side_fail() -> None:
    report = compare([next_answer(ONE, ONE)], [next_answer()], NEXT).report
    assert report.verdict is Verdict.ERROR


# Label scores

SCORE = ScoreQuestion(PROMPT, (PROMPT, PROMPT), labels=(5, 6))


def score_answer(*lines: tuple[tuple[float, ...], tuple[float, ...]], tokens: int = 2) -> ScoreAnswer:
    results = tuple(ScoreResult(item, 0, tokens, *line) for item, line in enumerate(lines))
    return ScoreAnswer(results, PROVENANCE, Usage(1, 1), Execution())


def test_label_scores_are_summed_up_over_all_items() -> None:
    left = score_answer(((0.5, 0.25), (-1.0, -2.0)), ((0.5, 0.25), (-1.0, -2.0)))
    right = score_answer(((0.5, 0.25), (-1.0, -2.0)), ((0.25, 0.5), (-1.0, -2.5)))
    report = compare([left], [right], SCORE, request_tolerance(0.25, 0.0)).report
    scores = report.scores
    assert scores is not None
    assert (scores.pairs, scores.max_abs_diff, scores.mean_abs_diff) == (4, 0.25, 0.125)
    assert (scores.label_mismatch_count, scores.argmax_changes) == (1, 1)
    assert [line.status for line in report.labels] == [TokenStatus.MATCH, TokenStatus.MISMATCH]
    assert report.verdict is Verdict.FAIL
    assert [gate.gate for gate in report.gates if gate.verdict is GateVerdict.FAIL] == [
        GateName.TOKEN_PARITY, GateName.SCORE_PARITY,
    ]  # fmt: skip


def test_equal_scores_pass() -> None:
    one = score_answer(((0.5,), (-1.0,)), ((0.5,), (-1.0,)))
    assert compare([one], [one], replace(SCORE, labels=(5,))).report.verdict is Verdict.PASS


def test_prompts_of_different_lengths_are_incomparable() -> None:
    lines = ((0.5, 0.5), (-1.0, -1.0)), ((0.5, 0.5), (-1.0, -1.0))
    report = compare([score_answer(*lines)], [score_answer(*lines, tokens=3)], SCORE).report
    assert report.verdict is Verdict.INCOMPARABLE


def test_a_score_of_no_items_has_nothing_to_compare() -> None:
    report = compare([score_answer()], [score_answer()], replace(SCORE, items=())).report
    assert report.verdict is Verdict.INCOMPARABLE
    assert "NOTHING_COMPARED" in report.reasons[0]


# Masks and timings

TEXT = SideText([7, 1], [-1.0])


def applied(digest: str) -> Applied:
    receipt = MaskReceipt(digest, (0,), ((0,),), (0,), ((0,),), 1, 1, 0)
    return Applied(MaskMetadata("m", "sha256:m", "causal", 0.5), receipt)


def masked(digest: str | None) -> list[Any]:
    end = done_of(scored=1, applied=None if digest is None else applied(digest))
    return [header_of(TEXT.header), *TEXT.events()[:-1], end, summary_of()]


CAUSAL, FULL = Variant(mask=MaskSpec(Causal())), Variant(mask=MaskSpec(Full()))


@pytest.mark.parametrize(
    ("left", "right", "variants", "verdict"),
    [
        ("a", "a", (CAUSAL, CAUSAL), GateVerdict.PASS),
        ("a", "b", (CAUSAL, CAUSAL), GateVerdict.FAIL),
        ("a", None, (CAUSAL, CAUSAL), GateVerdict.FAIL),
        ("a", "b", (CAUSAL, FULL), GateVerdict.PASS),
        ("a", None, (CAUSAL, Variant()), GateVerdict.PASS),
        (None, None, (Variant(), Variant()), GateVerdict.NOT_APPLICABLE),
    ],
)
def test_receipts_are_a_gate_of_their_own(
    left: str | None, right: str | None, variants: tuple[Variant, Variant], verdict: GateVerdict
) -> None:
    facts = (SideFacts("l", variants[0]), SideFacts("r", variants[1]))
    report = compare(masked(left), masked(right), facts=facts).report
    assert next(gate.verdict for gate in report.gates if gate.gate is GateName.RECEIPTS) is verdict
    assert report.verdict is (Verdict.FAIL if verdict is GateVerdict.FAIL else Verdict.PASS)


def test_an_item_with_nothing_to_score_ran_no_forward_and_owes_no_receipt() -> None:
    short = SideText([7], [])
    sides = [[header_of(TEXT.header, short.header), *masked("a")[1:-1], done_of(1), summary_of(2)] for _ in range(2)]
    report = compare(sides[0], sides[1], rolling(2), facts=(SideFacts("l", CAUSAL), SideFacts("r", CAUSAL))).report
    assert report.verdict is Verdict.PASS


@pytest.mark.parametrize("scores", [(0.5,), (0.5, 0.3, 0.2)])
@pytest.mark.parametrize("logprobs", [(-1.0,), (-1.0, -2.0)])
def test_another_number_of_scores_than_labels_fails_its_item(
    scores: tuple[float, ...], logprobs: tuple[float, ...]
) -> None:
    odd = score_answer((scores, logprobs), ((0.5, 0.5), (-1.0, -1.0)))
    report = compare([odd], [odd], SCORE).report
    assert (report.verdict, report.labels[0].status) == (Verdict.ERROR, TokenStatus.UNAVAILABLE)
    assert read_report(report_to_text(report)).labels == report.labels


def test_what_a_side_did_not_tell_as_its_most_likely_is_not_held_against_it() -> None:
    rare = next_of({3: EIGHTH, 4: QUARTER}, Tail("MEASURED", math.log(0.625)))
    told = replace(ONE, top_ids=int_array([3]), top_logprobs=np.array([HALF]), top_pieces=(b"a",))
    comparator = Comparator(NEXT, STRICT)
    for side in (LEFT, RIGHT):
        comparator.reread(side, replace(NEXT, top_k=0, extra_token_ids=(3, 4)), {})
        comparator.push(side, next_answer(told if side is LEFT else rare))
    collector = RunCollector("r", replace(NEXT, top_k=0, extra_token_ids=(3, 4), variants=(Variant(),)))
    collector.push(next_answer(rare))
    stored = collector.run()
    (line,) = comparator.report(SideFacts("l"), SideFacts("r", run=stored), created=CREATED).distributions
    assert line.top1_agrees is None


def test_timings_reach_the_latency_and_the_failure_gate() -> None:
    done = compare(masked(None), masked(None))
    timed = BenchmarkReport(20, 20, 1.0, 1.0, 1.0, 2.0, 0.0, 0.25)
    report = done.comparator.report(*done.facts, benchmark=timed)
    failed = {gate.gate for gate in report.gates if gate.verdict is GateVerdict.FAIL}
    assert failed == {GateName.LATENCY, GateName.FAILURE_RATE}
