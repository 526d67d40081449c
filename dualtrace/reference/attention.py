"""Dense attention of one layer, head by head, in float64.

It knows queries, keys, values and a mask of booleans. It must not know where the mask came from.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..engine import FloatArray

BoolArray = npt.NDArray[np.bool_]

MaskProvider = Callable[[int], BoolArray]
"""`mask(layer)` -> [H or 1, T, T] bool, True where query row q may see key row k."""


def causal_mask(tokens: int) -> MaskProvider:
    """Every row sees itself and what stands before it, in every layer and head."""
    allowed = np.tri(tokens, dtype=np.bool_)[None]  # [1, T, T]
    return lambda layer: allowed


def attend(queries: FloatArray, keys: FloatArray, values: FloatArray, allowed: BoolArray, scale: float) -> FloatArray:
    """`queries` [H, T, D]; `keys` and `values` [G, T, D], query head h reads group h // (H / G). Returns [T, H * D]."""
    heads, tokens, width = queries.shape
    share = heads // keys.shape[0]
    output = np.empty((tokens, heads, width))
    for head in range(heads):
        group = head // share
        may_see = allowed[head if allowed.shape[0] > 1 else 0]
        scores = (queries[head] @ keys[group].T) * scale  # [T, T]
        output[:, head] = _mix(softmax_allowed(scores, may_see), may_see, values[group])
    return output.reshape(tokens, heads * width)


def softmax_allowed(scores: FloatArray, may_see: BoolArray) -> FloatArray:
    """Softmax over what each row may see, exactly zero elsewhere; a row that sees nothing gets zeros. [T, T]"""
    scores = np.where(may_see, scores, -np.inf)
    peak = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - np.where(np.isneginf(peak), 0.0, peak))
    total = weights.sum(axis=1, keepdims=True)
    shares: FloatArray = np.divide(weights, total, out=np.zeros_like(weights), where=total != 0)
    return shares


def _mix(weights: FloatArray, may_see: BoolArray, values: FloatArray) -> FloatArray:
    if np.isfinite(values).all():
        return weights @ values
    # 0 * NaN is NaN: a broken row must not reach the rows that may not see it
    return np.stack([row[seen] @ values[seen] for row, seen in zip(weights, may_see, strict=True)])
