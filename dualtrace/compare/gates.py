"""The gates: each holds one figure of a comparison against a threshold and says why it passes or not.

Pure. It knows figures. It must not know where they come from or what is done with a verdict.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


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


DEFAULT_GATES = GatePolicy()


@dataclass(frozen=True)
class GateResult:
    gate: GateName
    verdict: GateVerdict
    threshold: float | None  # None: the gate has no number
    value: float | None  # None: nothing was measured
    reason: str
