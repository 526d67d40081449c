"""The figures of a report: of tokens, distributions and labels. The dataclasses are the format.

It must not know how a figure is computed, nor who was compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from dualtrace.compare.events import IdMismatch
from dualtrace.compare.pass_rule import TokenStatus
from dualtrace.questions.answers import Applied, Tail
from dualtrace.runs.run import StoredProblem


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
    max_abs_diff: float | None  # None: no pair here has two finite numbers
    mean_abs_diff: float | None


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
    min_abs_epsilon: float | None  # with it, and the same rel_epsilon, all pairs would have passed; None if none can
    rank_delta_summary: RankDeltaSummary | None
    position_buckets: tuple[PositionBucket, ...]
    kl_base_masked_max_abs_diff: float | None  # of KL(base || masked) in nats; None unless both sides have it
    kl_masked_base_max_abs_diff: float | None
    unavailable_fields: tuple[str, ...]  # that one side cannot give or nobody asked, "token_ranks"


class NotFiniteValue(StrEnum):
    """A value that no JSON number is, as the vectors spell it."""

    NAN = "NaN"
    INFINITY = "Infinity"
    MINUS_INFINITY = "-Infinity"

    @classmethod
    def of(cls, value: float) -> NotFiniteValue:
        if math.isnan(value):
            return cls.NAN
        return cls.INFINITY if value > 0 else cls.MINUS_INFINITY


@dataclass(frozen=True)
class NotFinite:
    """A logprob that a side gave and that is no finite number."""

    index: int
    value: NotFiniteValue


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
    left_not_finite: tuple[NotFinite, ...] = ()  # left_logprobs has None there
    right_not_finite: tuple[NotFinite, ...] = ()


@dataclass(frozen=True)
class ItemReport:
    """One item of a question that scores tokens."""

    item: int
    prompt_tokens: int
    token_count: int  # of the side that has more
    kept_tokens: int  # that stand in `columns`: tokens 0, 1, ...
    cut_tokens: int  # that were compared and stand in no column because of the cap
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
    left_tail: Tail | None  # the mass outside token_ids; None when the item was not compared
    right_tail: Tail | None
    max_abs_diff: float | None
    kl_left_right_lower: float | None  # an honest lower bound of KL(left || right); None too when it is infinite
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
