"""The gates: each at its threshold, just over it, and where there is nothing to judge."""

from typing import Any

import pytest

from dualtrace.compare.gates import (
    DEFAULT_GATES,
    GatePolicy,
    GateVerdict,
    Latency,
    ReceiptPair,
    judge_failures,
    judge_latency,
    judge_receipts,
    judge_score_parity,
    judge_token_parity,
)
from dualtrace.problems import InvalidArgument

PASS, FAIL, INCONCLUSIVE, NOTHING = (
    GateVerdict.PASS, GateVerdict.FAIL, GateVerdict.INCONCLUSIVE, GateVerdict.NOT_APPLICABLE,
)  # fmt: skip


@pytest.mark.parametrize(
    ("judged", "mismatches", "allowed", "verdict"),
    [(9, 0, 0, PASS), (9, 1, 0, FAIL), (9, 1, 1, PASS), (0, 0, 0, NOTHING)],
)
def test_token_parity_counts_mismatches(judged: int, mismatches: int, allowed: int, verdict: GateVerdict) -> None:
    policy = GatePolicy(max_token_mismatches=allowed)
    assert judge_token_parity(policy, judged, mismatches, "tokens").verdict is verdict


@pytest.mark.parametrize(
    ("worst", "mean", "verdict"),
    [(0.02, 0.01, PASS), (0.0201, 0.01, FAIL), (0.02, 0.0101, FAIL), (None, None, NOTHING)],
)
def test_score_parity_holds_the_maximum_and_the_mean(
    worst: float | None, mean: float | None, verdict: GateVerdict
) -> None:
    assert judge_score_parity(DEFAULT_GATES, worst, mean).verdict is verdict


@pytest.mark.parametrize(
    ("left", "right", "required", "verdict"),
    [
        (Latency(20, 100.0), Latency(20, 125.0), False, PASS),
        (Latency(20, 100.0), Latency(20, 125.1), False, FAIL),
        (Latency(20, 100.0), Latency(19, 100.0), False, INCONCLUSIVE),
        (Latency(20, 100.0), Latency(19, 100.0), True, FAIL),
        (Latency(20, None), Latency(20, 1.0), False, INCONCLUSIVE),
        (None, None, False, NOTHING),
        (None, None, True, FAIL),
    ],
)
def test_latency_is_right_over_left_of_enough_samples(
    left: Latency | None, right: Latency | None, required: bool, verdict: GateVerdict
) -> None:
    assert judge_latency(GatePolicy(latency_required=required), left, right).verdict is verdict


@pytest.mark.parametrize(
    ("left", "right", "allowed", "verdict"),
    [(0.0, 0.0, 0.0, PASS), (0.0, 0.1, 0.0, FAIL), (0.1, 0.0, 0.1, PASS), (None, None, 0.0, NOTHING)],
)
def test_the_worse_failure_rate_counts(
    left: float | None, right: float | None, allowed: float, verdict: GateVerdict
) -> None:
    assert judge_failures(GatePolicy(max_failure_rate=allowed), left, right).verdict is verdict


@pytest.mark.parametrize(
    ("pair", "asked", "verdict"),
    [
        (ReceiptPair(0, "a", "a", True), (True, True, True), PASS),
        (ReceiptPair(0, "a", "b", True), (True, True, True), FAIL),
        (ReceiptPair(0, "a", "b", False), (True, True, True), PASS),
        (ReceiptPair(0, "a", None, True), (True, True, True), FAIL),
        (ReceiptPair(0, "a", "b", True), (True, True, False), PASS),
        (ReceiptPair(0, None, "b", True), (True, True, False), FAIL),
        (ReceiptPair(0, None, "b", True), (False, True, False), PASS),
        (ReceiptPair(0, None, None, True), (False, False, False), NOTHING),
    ],
)
def test_a_mask_that_was_asked_must_be_proved(
    pair: ReceiptPair, asked: tuple[bool, bool, bool], verdict: GateVerdict
) -> None:
    left, right, same = asked
    assert judge_receipts([pair], left_masked=left, right_masked=right, same_mask=same).verdict is verdict


@pytest.mark.parametrize(
    "fields",
    [
        {"score_max_abs_diff": float("nan")}, {"p95_latency_ratio": float("inf")}, {"max_failure_rate": 1.5},
        {"max_token_mismatches": -1}, {"score_mean_abs_diff": -0.1},
    ],
)  # fmt: skip
def test_a_threshold_that_means_nothing_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        GatePolicy(**fields)
    assert caught.value.detail.field == next(iter(fields))
