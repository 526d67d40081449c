"""Dense attention of one layer, head by head, in float64, a block of rows at a time.

It knows queries, keys, values and a mask of booleans. It must not know where the mask came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dualtrace.arrays import FloatArray

BLOCK_ROWS = 256  # rows whose scores against all keys exist at one time; nothing is ever [T, T]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Sight:
    """What a block of Q query rows may do with all K keys, in one layer. One head stands for all heads alike."""

    allowed: BoolArray  # [H or 1, Q, K] True where the row may see the key
    zeroed: BoolArray | None = None  # [H or 1, Q, K] weights set to zero after the softmax, not renormalised
    blank: BoolArray | None = None  # [H or 1, Q] rows whose output is zero


class Mask(Protocol):
    def sight(self, layer: int, q0: int, q1: int) -> Sight:
        """What the rows [q0, q1) may see."""
        ...

    def witness(self, layer: int, q0: int, allowed: BoolArray, zeroed: BoolArray | None) -> None:
        """Told what was applied to the rows from q0 on: [H, Q, K], the tensors that met the weights of each head."""
        ...


class CausalMask:
    """Every row sees itself and what stands before it, in every layer and head."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def sight(self, layer: int, q0: int, q1: int) -> Sight:
        return Sight(np.tri(q1 - q0, self._tokens, q0, dtype=np.bool_)[None])

    def witness(self, layer: int, q0: int, allowed: BoolArray, zeroed: BoolArray | None) -> None:
        """Nobody asks for the receipt of a mask that nobody sent."""


def attend(
    queries: FloatArray, keys: FloatArray, values: FloatArray, mask: Mask, layer: int, scale: float
) -> FloatArray:
    """`queries` [H, T, D]; `keys` and `values` [G, T, D], query head h reads group h // (H / G). Returns [T, H * D]."""
    heads, tokens, width = queries.shape
    output = np.empty((tokens, heads, width))
    for start in range(0, tokens, BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, tokens))
        sight = mask.sight(layer, rows.start, rows.stop)
        output[rows], allowed, zeroed = attend_rows(queries[:, rows], keys, values, sight, scale)
        mask.witness(layer, rows.start, allowed, zeroed)
    return output.reshape(tokens, heads * width)


def attend_rows(
    queries: FloatArray, keys: FloatArray, values: FloatArray, sight: Sight, scale: float
) -> tuple[FloatArray, BoolArray, BoolArray | None]:
    """Some rows, `queries` [H, Q, D], against all keys. Returns [Q, H, D] and what was applied, [H, Q, K] each."""
    heads, rows, width = queries.shape
    share = heads // keys.shape[0]
    output = np.empty((rows, heads, width))
    applied = np.empty((heads, rows, keys.shape[1]), np.bool_)
    zeroed = None if sight.zeroed is None else np.empty_like(applied)
    for head in range(heads):
        group = head // share
        may_see = counted = _of_head(sight.allowed, head)
        applied[head] = may_see
        weights = softmax_allowed((queries[head] @ keys[group].T) * scale, may_see)  # [Q, K]
        if sight.zeroed is not None and zeroed is not None:
            zeroed[head] = _of_head(sight.zeroed, head)
            weights[zeroed[head]] = 0.0
            counted = may_see & ~zeroed[head]
        mixed = _mix(weights, counted, values[group])
        if sight.blank is not None:
            mixed[_of_head(sight.blank, head)] = 0.0
        output[:, head] = mixed
    return output, applied, zeroed


def softmax_allowed(scores: FloatArray, may_see: BoolArray) -> FloatArray:
    """Softmax over what each row may see, exactly zero elsewhere; a row that sees nothing gets zeros. [Q, K]"""
    scores = np.where(may_see, scores, -np.inf)
    peak = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - np.where(np.isneginf(peak), 0.0, peak))
    total = weights.sum(axis=1, keepdims=True)
    shares: FloatArray = np.divide(weights, total, out=np.zeros_like(weights), where=total != 0)
    return shares


def _of_head(blocks: BoolArray, head: int) -> BoolArray:
    chosen: BoolArray = blocks[head if blocks.shape[0] > 1 else 0]
    return chosen


def _mix(weights: FloatArray, counted: BoolArray, values: FloatArray) -> FloatArray:
    if np.isfinite(values).all():
        return weights @ values
    # 0 * NaN is NaN: a broken row must not reach the rows that may not see it
    return np.stack([row[seen] @ values[seen] for row, seen in zip(weights, counted, strict=True)])
