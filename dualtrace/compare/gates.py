"""The gates: each holds one figure of a comparison against a threshold and says why it passes or not.

Pure. It knows figures. It must not know where they come from or what is done with a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from dualtrace.problems import InvalidArgument, Reason


class GateName(StrEnum):
    TOKEN_PARITY = "TOKEN_PARITY"  # noqa: S105 - share of tokens in agreement, not a password
    SCORE_PARITY = "SCORE_PARITY"
    LATENCY = "LATENCY"
    FAILURE_RATE = "FAILURE_RATE"
    RECEIPTS = "RECEIPTS"


class GateVerdict(StrEnum):
    PASS = "PASS"  # noqa: S105 - not a password
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"  # too few samples: passes with a warning, unless the policy requires it
    NOT_APPLICABLE = "NOT_APPLICABLE"


@dataclass(frozen=True)
class GatePolicy:
    """Thresholds, per case and per mask."""

    max_token_mismatches: int = 0
    score_max_abs_diff: float = 0.02
    score_mean_abs_diff: float = 0.01
    p95_latency_ratio: float = 1.25  # right over left
    min_latency_samples: int = 20
    latency_required: bool = False  # an INCONCLUSIVE latency gate fails
    max_failure_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            value = float(getattr(self, name))
            if not math.isfinite(value):
                message = f"{name} {value} asked; it must be a finite number, 0 or above"
                raise InvalidArgument(Reason.NOT_FINITE, message, field=name, allowed=">= 0")
            if value < 0 or (name == "max_failure_rate" and value > 1):
                allowed = "0-1" if name == "max_failure_rate" else ">= 0"
                message = f"{name} {value:g} asked; allowed is {allowed}"
                raise InvalidArgument(Reason.OUT_OF_RANGE, message, field=name, allowed=allowed)
            if name not in _WHOLE:
                object.__setattr__(self, name, value)  # 1 and 1.0 are written alike


_WHOLE = ("max_token_mismatches", "min_latency_samples")
_NUMBERS = (
    *_WHOLE, "score_max_abs_diff", "score_mean_abs_diff", "p95_latency_ratio", "max_failure_rate",
)  # fmt: skip

DEFAULT_GATES = GatePolicy()


@dataclass(frozen=True)
class GateResult:
    gate: GateName
    verdict: GateVerdict
    threshold: float | None  # None: the gate has no number
    value: float | None  # None: nothing was measured
    reason: str


def judge_token_parity(policy: GatePolicy, judged: int, mismatches: int, unit: str) -> GateResult:
    """`unit`: what was held against the tolerance, "tokens"."""
    allowed = float(policy.max_token_mismatches)
    if not judged:
        return GateResult(GateName.TOKEN_PARITY, GateVerdict.NOT_APPLICABLE, allowed, None, f"no {unit} were compared")
    verdict = GateVerdict.PASS if mismatches <= allowed else GateVerdict.FAIL
    reason = f"{mismatches} of {judged} {unit} are out of tolerance; {allowed:g} may be"
    return GateResult(GateName.TOKEN_PARITY, verdict, allowed, float(mismatches), reason)


def judge_score_parity(policy: GatePolicy, max_diff: float | None, mean_diff: float | None) -> GateResult:
    """None: no label scores were compared. The gate's value is the maximum; the mean stands in the reason."""
    allowed = policy.score_max_abs_diff
    if max_diff is None or mean_diff is None:
        reason = "no label scores were compared"
        return GateResult(GateName.SCORE_PARITY, GateVerdict.NOT_APPLICABLE, allowed, None, reason)
    passes = max_diff <= allowed and mean_diff <= policy.score_mean_abs_diff
    reason = (
        f"scores differ by {max_diff:.6g} at most and {mean_diff:.6g} on average; "
        f"{allowed:g} and {policy.score_mean_abs_diff:g} are allowed"
    )
    verdict = GateVerdict.PASS if passes else GateVerdict.FAIL
    return GateResult(GateName.SCORE_PARITY, verdict, allowed, max_diff, reason)


@dataclass(frozen=True)
class Latency:
    """Of one side's timed calls."""

    samples: int
    p95_ms: float | None


def judge_latency(policy: GatePolicy, left: Latency | None, right: Latency | None) -> GateResult:
    """None: the sides were not timed."""
    allowed, least = policy.p95_latency_ratio, policy.min_latency_samples
    if left is None or right is None:
        if policy.latency_required:
            reason = "the policy requires the latency gate and no call was timed: compare benchmark runs"
            return GateResult(GateName.LATENCY, GateVerdict.FAIL, allowed, None, reason)
        return GateResult(GateName.LATENCY, GateVerdict.NOT_APPLICABLE, allowed, None, "no call was timed")
    ratio = right.p95_ms / left.p95_ms if left.p95_ms and right.p95_ms is not None else None
    if min(left.samples, right.samples) < least or ratio is None:
        verdict = GateVerdict.FAIL if policy.latency_required else GateVerdict.INCONCLUSIVE
        reason = f"{left.samples} and {right.samples} timed calls; {least} on each side are needed: repeat more often"
        return GateResult(GateName.LATENCY, verdict, allowed, ratio, reason)
    verdict = GateVerdict.PASS if ratio <= allowed else GateVerdict.FAIL
    reason = f"p95 is {left.p95_ms:.3f} ms left and {right.p95_ms:.3f} ms right, {ratio:.3f} times; {allowed:g} may be"
    return GateResult(GateName.LATENCY, verdict, allowed, ratio, reason)


def judge_failures(policy: GatePolicy, left: float | None, right: float | None) -> GateResult:
    """Shares of failed items, or of failed calls where they were repeated, 0 .. 1; None: nothing was asked."""
    allowed = policy.max_failure_rate
    worst = max((rate for rate in (left, right) if rate is not None), default=None)
    if worst is None:
        reason = "nothing was asked"
        return GateResult(GateName.FAILURE_RATE, GateVerdict.NOT_APPLICABLE, allowed, None, reason)
    verdict = GateVerdict.PASS if worst <= allowed else GateVerdict.FAIL
    told = " and ".join(f"{rate:.2%} {name}" for name, rate in (("left", left), ("right", right)) if rate is not None)
    return GateResult(GateName.FAILURE_RATE, verdict, allowed, worst, f"failed: {told}; {allowed:.2%} may fail")


@dataclass(frozen=True)
class ReceiptPair:
    """The effective mask digests of one item that both sides answered; None: the side gave no receipt."""

    item: int
    left: str | None
    right: str | None
    same_tokens: bool


def judge_receipts(
    pairs: Sequence[ReceiptPair], *, left_masked: bool, right_masked: bool, same_mask: bool
) -> GateResult:
    """A side that was asked for a mask must prove that it applied it; the same mask must be the same effect."""

    def result(verdict: GateVerdict, reason: str) -> GateResult:
        return GateResult(GateName.RECEIPTS, verdict, None, None, reason)

    if not (left_masked or right_masked):
        return result(GateVerdict.NOT_APPLICABLE, "no mask was asked")
    if not pairs:
        return result(GateVerdict.NOT_APPLICABLE, "no item was answered by both sides")
    for pair in pairs:
        for name, masked, digest in (("left", left_masked, pair.left), ("right", right_masked, pair.right)):
            if masked and digest is None:
                reason = (
                    f"item {pair.item}: the {name} side was asked for a mask and gave no receipt, so nothing proves "
                    "that it applied it; ask a scorer whose Describe lists masks"
                )
                return result(GateVerdict.FAIL, reason)
        if same_mask and pair.same_tokens and pair.left != pair.right:
            reason = (
                f"item {pair.item}: one mask was asked of both sides, and {pair.left} and {pair.right} were applied"
            )
            return result(GateVerdict.FAIL, reason)
    kind = "equal receipts" if same_mask else "receipts for the masks that were asked"
    return result(GateVerdict.PASS, f"{len(pairs)} items with {kind}")
