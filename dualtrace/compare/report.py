"""The report of a comparison: what was compared, every figure, the gates, the verdict. The dataclasses are the format.

`write_report` and `read_report` are its JSON form, versioned like a run's. It must not know how figures are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from dualtrace.compare.events import IdMismatch, ProvenanceDifference
from dualtrace.compare.gates import GatePolicy, GateResult
from dualtrace.compare.pass_rule import TokenStatus
from dualtrace.compare.tolerance import Tolerance
from dualtrace.engine import ModelProvenance
from dualtrace.questions.answers import Applied, Execution, Tail, Usage
from dualtrace.questions.asked import Variant
from dualtrace.runs import AskedQuestion, StoredProblem

KIND = "dualtrace.comparison"
SCHEMA_VERSION = "1.0"


class Verdict(StrEnum):
    PASS = "PASS"  # noqa: S105 - not a password
    FAIL = "FAIL"
    INCOMPARABLE = "INCOMPARABLE"  # different ids, or nothing was compared
    ERROR = "ERROR"  # a side failed


@dataclass(frozen=True)
class SideReport:
    """Who one side was and how it went."""

    target: str  # as written by whoever asked
    variant: Variant
    provenance: ModelProvenance | None  # None: it failed before it said
    identity: str | None  # of its run, `Run.identity`; None when there is none
    usage: Usage | None
    execution: Execution | None
    total_seconds: float | None  # of the whole call as seen by the comparer; None for a stored run
    mrr: float | None  # mean of 1 / rank over its scored tokens
    rank1_share: float | None
    delta_modules: tuple[str, ...]  # modules that got an adapter's delta
    problem: StoredProblem | None


@dataclass(frozen=True)
class LossDiffSummary:
    """Of the aligned scored tokens, |nll_left - nll_right| in nats; signed_mean is right minus left (the bias)."""

    max: float
    mean: float
    p50: float
    p95: float
    p99: float
    signed_mean: float


@dataclass(frozen=True)
class RankDeltaSummary:
    mrr_left: float
    mrr_right: float
    mrr_delta: float  # mean(1 / rank_right) - mean(1 / rank_left)
    worst_rank_drop: int  # largest rank_right - rank_left; 0 when no rank fell
    worst_rank_drop_item: int | None
    worst_rank_drop_index: int | None
    changed: int


@dataclass(frozen=True)
class ArgmaxFlip:
    """The first token where the most likely tokens differ. Margins: top-1 minus top-2 logprob, None without a top 2."""

    item: int
    index: int
    left_top_id: int
    right_top_id: int
    left_margin: float | None
    right_margin: float | None


@dataclass(frozen=True)
class PositionBucket:
    """Differences by place in the text: tokens start .. stop - 1."""

    start: int
    stop: int
    count: int
    mismatches: int
    max_abs_diff: float
    mean_abs_diff: float


@dataclass(frozen=True)
class TokenSummary:
    """All items together. Fields are None (or 0) where there is none of the thing."""

    aligned_count: int
    token_mismatch_count: int
    unscored_count: int
    not_kept_count: int  # cut by a cap
    unavailable_count: int  # a side does not have the field
    token_parity_pass: bool | None  # None when nothing was aligned
    first_divergence_item: int | None
    first_divergence_index: int | None
    first_divergence_region: tuple[int, int] | None  # [start, stop) of the consecutive mismatches from there
    first_argmax_flip: ArgmaxFlip | None  # None too when no top-k was asked: see unavailable_fields
    first_id_mismatch: IdMismatch | None
    max_token_abs_diff: float | None
    max_token_abs_diff_item: int | None
    max_token_abs_diff_index: int | None
    token_loss_diff_summary: LossDiffSummary | None
    min_abs_epsilon: float | None  # the smallest with which every finite pair would have passed; None if none can
    rank_delta_summary: RankDeltaSummary | None
    position_buckets: tuple[PositionBucket, ...]
    unavailable_fields: tuple[str, ...]  # that one side cannot give, "token_ranks"


@dataclass(frozen=True)
class TokenColumns:
    """One item's tokens on both sides, as far as they are kept; all lists are equally long."""

    token_ids: tuple[int | None, ...]
    tokens: tuple[bytes | None, ...] | None
    statuses: tuple[TokenStatus, ...]
    left_logprobs: tuple[float | None, ...]
    right_logprobs: tuple[float | None, ...]
    left_ranks: tuple[int | None, ...]
    right_ranks: tuple[int | None, ...]


@dataclass(frozen=True)
class ItemReport:
    """One item of a question that scores tokens."""

    item: int
    prompt_tokens: int
    token_count: int  # of the side that has more
    kept_tokens: int  # that stand in `columns`; the rest was cut by the cap
    columns: TokenColumns
    first_divergence_index: int | None
    mismatches: int
    left_total: float | None  # total logprob, nats
    right_total: float | None
    left_applied: Applied | None
    right_applied: Applied | None
    left_problem: StoredProblem | None
    right_problem: StoredProblem | None


@dataclass(frozen=True)
class DistributionReport:
    """One prompt's next tokens on both sides, read on the union of both top-k sets. Divergences in nats."""

    item: int
    status: TokenStatus  # of the pair of all union logprobs: MISMATCH when one is out of tolerance
    token_ids: tuple[int, ...]  # the union, by the left side's logprob, descending
    tokens: tuple[bytes | None, ...] | None
    left_logprobs: tuple[float, ...]
    right_logprobs: tuple[float, ...]
    left_tail: Tail
    right_tail: Tail
    max_abs_diff: float | None
    kl_left_right_lower: float | None  # an honest lower bound of KL(left || right)
    kl_right_left_lower: float | None
    js_lower: float | None
    js_upper: float | None
    top1_agrees: bool | None
    left_problem: StoredProblem | None
    right_problem: StoredProblem | None


@dataclass(frozen=True)
class LabelReport:
    """One item's label scores on both sides."""

    item: int
    status: TokenStatus  # of the raw label logprobs, by the tolerance
    label_token_ids: tuple[int, ...]
    left_scores: tuple[float, ...]
    right_scores: tuple[float, ...]
    left_label_logprobs: tuple[float, ...]
    right_label_logprobs: tuple[float, ...]
    max_abs_diff: float | None  # of scores
    argmax_agrees: bool | None
    left_problem: StoredProblem | None
    right_problem: StoredProblem | None


@dataclass(frozen=True)
class ScoreSummary:
    """Over all items and labels: |score_left - score_right|."""

    pairs: int
    max_abs_diff: float
    mean_abs_diff: float
    label_mismatch_count: int  # items whose label logprobs are out of tolerance
    argmax_changes: int


@dataclass(frozen=True)
class BenchmarkReport:
    """Latency of both sides where they were repeated; warm-up and compile excluded. Milliseconds."""

    left_samples: int
    right_samples: int
    left_p50_ms: float | None
    right_p50_ms: float | None
    left_p95_ms: float | None
    right_p95_ms: float | None
    left_failure_rate: float
    right_failure_rate: float


@dataclass(frozen=True)
class CompareReport:
    """Everything that is known when a comparison has ended."""

    created: str  # RFC 3339, UTC
    question: AskedQuestion  # its variants stand with the sides
    left: SideReport
    right: SideReport
    provenance_differences: tuple[ProvenanceDifference, ...]
    tolerance: Tolerance | None  # None: a side failed before it was chosen
    policy: GatePolicy
    verdict: Verdict
    reasons: tuple[str, ...]  # why it is not PASS, or what to know although it is
    gates: tuple[GateResult, ...]
    tokens: TokenSummary | None
    items: tuple[ItemReport, ...]
    distributions: tuple[DistributionReport, ...]
    scores: ScoreSummary | None
    labels: tuple[LabelReport, ...]
    benchmark: BenchmarkReport | None
    reproduce: str  # a command that asks the same again; "" when the asker knows none
    schema_version: str = SCHEMA_VERSION
