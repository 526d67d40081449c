"""The figures over all items' tokens, from their kept columns. Pure arithmetic; it must not know events or verdicts.

Sums are exact (`fsum`), so no figure depends on the order or the size of the pieces in which the answers came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dualtrace.arrays import FloatArray, IntArray
from dualtrace.compare.figures import LossDiffSummary, PositionBucket, RankDeltaSummary, TokenSummary
from dualtrace.compare.pass_rule import Bools, Codes, PassRule, TokenStatus, code_of
from dualtrace.compare.tokens import ItemPairs, WorstKl

BUCKET_EDGES = (0, 16, 64, 256, 1024, 4096, 16_384, 65_536, 262_144, 2**31 - 1)
"""Where position buckets begin and end: early tokens are few and tell most."""

_MATCH, _MISMATCH = code_of(TokenStatus.MATCH), code_of(TokenStatus.MISMATCH)


@dataclass(frozen=True, eq=False)
class _Tokens:
    """All items' tokens, item after item; every column has length N."""

    items: npt.NDArray[np.int64]  # [N] which item
    indices: npt.NDArray[np.int64]  # [N] which token of it
    codes: Codes  # [N]
    left: FloatArray  # [N] nats
    right: FloatArray  # [N] nats
    finite: Bools  # [N] judged, and a finite number on both sides
    left_ranks: IntArray  # [N] 0 where absent
    right_ranks: IntArray  # [N]

    @property
    def diffs(self) -> FloatArray:
        """|left - right| of the finite pairs."""
        found: FloatArray = np.abs(self.left[self.finite] - self.right[self.finite])
        return found

    def place(self, chosen: Bools, at: int) -> tuple[int, int]:
        """Item and index of the at-th chosen token."""
        row = int(np.flatnonzero(chosen)[at])
        return int(self.items[row]), int(self.indices[row])


def _gather(items: Sequence[ItemPairs]) -> _Tokens:
    def joined(name: str, dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
        return np.concatenate([np.empty(0, dtype), *(getattr(item, name).values for item in items)]).astype(dtype)

    sizes = [len(item.codes) for item in items]
    codes: Codes = joined("codes", np.uint8)  # type: ignore[assignment]
    left: FloatArray = joined("left_logprobs", np.float64)  # type: ignore[assignment]
    right: FloatArray = joined("right_logprobs", np.float64)  # type: ignore[assignment]
    judged = (codes == _MATCH) | (codes == _MISMATCH)
    # An absent value stands as NaN, so it is not finite either.
    finite = judged & np.isfinite(left) & np.isfinite(right)
    return _Tokens(
        items=np.repeat([item.item for item in items], sizes).astype(np.int64),
        indices=np.concatenate([np.empty(0, np.int64), *(np.arange(size) for size in sizes)]),
        codes=codes,
        left=left,
        right=right,
        finite=finite,
        left_ranks=joined("left_ranks", np.int32),  # type: ignore[arg-type]
        right_ranks=joined("right_ranks", np.int32),  # type: ignore[arg-type]
    )


def summarize_tokens(
    items: Sequence[ItemPairs], rule: PassRule, unavailable_fields: tuple[str, ...] = ()
) -> TokenSummary:
    """`items` in the question's order."""
    tokens = _gather(items)
    count = {status: int((tokens.codes == code_of(status)).sum()) for status in TokenStatus}
    aligned = count[TokenStatus.MATCH] + count[TokenStatus.MISMATCH]
    divergence = next((item.first_divergence for item in items if item.first_divergence is not None), None)
    diverged = None if divergence is None else next(item for item in items if item.item == divergence.item)
    diffs = tokens.diffs
    worst = tokens.place(tokens.finite, int(np.argmax(diffs))) if diffs.size else None
    return TokenSummary(
        aligned_count=aligned,
        token_mismatch_count=count[TokenStatus.MISMATCH],
        unscored_count=count[TokenStatus.UNSCORED],
        not_kept_count=sum(len(item.codes) - item.kept for item in items),
        unavailable_count=count[TokenStatus.UNAVAILABLE],
        token_parity_pass=None if aligned == 0 else count[TokenStatus.MISMATCH] == 0,
        first_divergence_item=None if divergence is None else divergence.item,
        first_divergence_index=None if divergence is None else divergence.index,
        first_divergence_region=None if diverged is None else _region(diverged),
        first_argmax_flip=next((item.argmax_flip for item in items if item.argmax_flip is not None), None),
        first_id_mismatch=next((item.id_mismatch for item in items if item.id_mismatch is not None), None),
        max_token_abs_diff=float(diffs.max()) if diffs.size else None,
        max_token_abs_diff_item=None if worst is None else worst[0],
        max_token_abs_diff_index=None if worst is None else worst[1],
        token_loss_diff_summary=_summarize_loss(tokens),
        min_abs_epsilon=_min_abs_epsilon(tokens, rule),
        rank_delta_summary=_summarize_ranks(tokens),
        position_buckets=_bucket(tokens),
        kl_base_masked_max_abs_diff=_worst_kl(items, "kl_base_masked"),
        kl_masked_base_max_abs_diff=_worst_kl(items, "kl_masked_base"),
        unavailable_fields=unavailable_fields,
    )


def _region(item: ItemPairs) -> tuple[int, int]:
    """[start, stop) of the consecutive mismatches from the first divergence on."""
    assert item.first_divergence is not None
    start = item.first_divergence.index
    after = np.flatnonzero(item.codes.values[start:] != _MISMATCH)
    return start, start + int(after[0]) if after.size else len(item.codes)


def _worst_kl(items: Sequence[ItemPairs], name: str) -> float | None:
    found: list[WorstKl] = [item.worst_kl[name] for item in items if name in item.worst_kl]
    return max((one.diff for one in found), default=None)


def mean(values: npt.NDArray[np.float64]) -> float:
    return math.fsum(values.tolist()) / len(values)


def _summarize_loss(tokens: _Tokens) -> LossDiffSummary | None:
    diffs = tokens.diffs
    if not diffs.size:
        return None
    p50, p95, p99 = (float(value) for value in np.percentile(diffs, [50, 95, 99]))  # linear between two values
    # nll is -logprob, so nll_right - nll_left is left - right.
    bias = mean(tokens.left[tokens.finite] - tokens.right[tokens.finite])
    return LossDiffSummary(float(diffs.max()), mean(diffs), p50, p95, p99, bias)


def _min_abs_epsilon(tokens: _Tokens, rule: PassRule) -> float | None:
    """The least abs_epsilon with which nothing would have failed. None where a mismatch is not one of two numbers."""
    wrong = tokens.codes == _MISMATCH
    if not tokens.finite.any() or (wrong & ~tokens.finite).any():
        return None
    left, right = tokens.left[tokens.finite], tokens.right[tokens.finite]
    return least_abs_epsilon(left, right, rule.rel_epsilon)


def least_abs_epsilon(left: FloatArray, right: FloatArray, rel_epsilon: float) -> float:
    """For finite values; exact up to one rounding, and always enough."""
    diffs = np.abs(left - right)
    room = rel_epsilon * np.maximum(np.abs(left), np.abs(right))
    found = max(0.0, float((diffs - room).max()))
    step = float(np.spacing(diffs.max()))
    while not (diffs <= found + room).all():  # the sum may round down
        found += step
    return found


def _summarize_ranks(tokens: _Tokens) -> RankDeltaSummary | None:
    known = (tokens.left_ranks > 0) & (tokens.right_ranks > 0)
    known &= (tokens.codes == _MATCH) | (tokens.codes == _MISMATCH)
    left, right = tokens.left_ranks[known].astype(np.int64), tokens.right_ranks[known].astype(np.int64)
    if not left.size:
        return None
    drops = right - left
    at = int(np.argmax(drops))
    worst = max(0, int(drops[at]))
    item, index = tokens.place(known, at) if worst else (None, None)
    mrr_left, mrr_right = mean(1.0 / left), mean(1.0 / right)
    return RankDeltaSummary(
        mrr_left=mrr_left,
        mrr_right=mrr_right,
        mrr_delta=mrr_right - mrr_left,
        worst_rank_drop=worst,
        worst_rank_drop_item=item,
        worst_rank_drop_index=index,
        changed=int((drops != 0).sum()),
    )


def _bucket(tokens: _Tokens) -> tuple[PositionBucket, ...]:
    judged = (tokens.codes == _MATCH) | (tokens.codes == _MISMATCH)
    buckets = []
    for start, stop in pairwise(BUCKET_EDGES):
        inside = (tokens.indices >= start) & (tokens.indices < stop)
        finite = inside & tokens.finite
        if not (inside & judged).any():
            continue
        diffs = np.abs(tokens.left[finite] - tokens.right[finite])
        buckets.append(
            PositionBucket(
                start=start,
                stop=stop,
                count=int((inside & judged).sum()),
                mismatches=int((inside & (tokens.codes == _MISMATCH)).sum()),
                max_abs_diff=float(diffs.max()) if diffs.size else None,
                mean_abs_diff=mean(diffs) if diffs.size else None,
            )
        )
    return tuple(buckets)
