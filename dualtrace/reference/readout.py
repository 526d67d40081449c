"""Reading logits: logprobs, ranks, ties, top-k, tails. Pure float64 numpy, one block of rows at a time.

It knows numbers only. It must not know where the logits come from. An engine walks `read_blocks(read)`, makes the
logits of each block's rows, gives both to `read_logits`, and puts the columns together with `assemble`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dualtrace.arrays import FloatArray, IntArray
from dualtrace.engine import Read, Readout
from dualtrace.problems import InvalidArgument, Reason

BLOCK_ROWS = 64  # rows of [rows, vocabulary] logits that exist at one time
BoolArray = npt.NDArray[np.bool_]
UNREAD = -1  # in integer columns of bad rows, where no NaN can stand


@dataclass(frozen=True)
class Columns:
    """The numbers of one block of rows; the fields of `Readout` by the same names and shapes."""

    rows: IntArray  # [R] int32
    logprobs: FloatArray | None  # [R]
    ranks: IntArray | None  # [R]
    ties: IntArray | None  # [R]
    top_ids: IntArray | None  # [R, k]
    top_logprobs: FloatArray | None  # [R, k]
    extra_logprobs: FloatArray | None  # [R, E]
    tail_logprobs: FloatArray | None  # [R]
    rest_logprobs: FloatArray | None  # [R], only where tail and extra_ids are both asked
    bad_rows: tuple[int, ...]
    kl_from_against: FloatArray | None = None  # [R]
    kl_to_against: FloatArray | None = None  # [R]


def read_blocks(read: Read, rows: int = BLOCK_ROWS) -> Iterator[Read]:
    """The same question in blocks of at most `rows` rows, in order."""
    for start in range(0, read.rows.size, rows):
        part = slice(start, start + rows)
        targets = None if read.targets is None else read.targets[part]
        yield replace(read, rows=read.rows[part], targets=targets)


def check_read(read: Read, vocab_size: int) -> None:
    """Refuse a read whose ids or top_k lie outside the logits."""
    if not 0 <= read.top_k <= vocab_size:
        raise InvalidArgument(
            Reason.OUT_OF_RANGE,
            f"top_k {read.top_k} asked; the logits hold {vocab_size} ids.",
            allowed=f"0-{vocab_size}",
        )
    for what, ids in (("target", read.targets), ("extra id", read.extra_ids)):
        if ids is not None and ids.size and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
            wrong = int(ids[(ids < 0) | (ids >= vocab_size)][0])
            raise InvalidArgument(
                Reason.TOKEN_OUT_OF_RANGE,
                f"{what} {wrong} asked; the logits hold the ids 0-{vocab_size - 1}.",
                allowed=f"0-{vocab_size - 1}",
            )


def read_logits(logits: FloatArray, read: Read, against: FloatArray | None = None) -> Columns:
    """Read a block: `logits` [R, V] float64 are those of `read.rows` [R], one row each. `logits` is not changed.

    `against` [R, V] are the logits of the same rows of the segment that `read.against` names.
    """
    check_read(read, logits.shape[1])
    good = np.logical_and.reduce(np.isfinite(logits), axis=1)  # [R] bool
    if against is not None:
        good &= np.logical_and.reduce(np.isfinite(against), axis=1)
    sound = logits if good.all() else np.where(good[:, None], logits, 0.0)
    total = log_sum_exp(sound)  # [R]
    targets = _read_targets(sound, total, read.targets)
    top_ids = _top_ids(sound, read.top_k) if read.top_k or read.tail else None
    extra = read.extra_ids
    tail, rest = _read_tails(sound, total, top_ids, extra) if read.tail and top_ids is not None else (None, None)
    top_ids = top_ids if read.top_k else None
    divergences = (None, None) if against is None else _diverge(np.where(good[:, None], against, 0.0), sound)
    columns = Columns(
        rows=read.rows,
        logprobs=targets[0],
        ranks=targets[1],
        ties=targets[2],
        top_ids=top_ids,
        top_logprobs=None if top_ids is None else np.take_along_axis(sound, top_ids, axis=1) - total[:, None],
        extra_logprobs=None if extra is None else sound[:, extra] - total[:, None],
        tail_logprobs=tail,
        rest_logprobs=rest,
        bad_rows=tuple(int(row) for row in read.rows[~good]),
        kl_from_against=divergences[0],
        kl_to_against=divergences[1],
    )
    return columns if good.all() else _blank(columns, ~good)


def assemble(
    segment: int, start: int, stop: int, read: Read, blocks: Sequence[Columns], computed_tokens: int
) -> Readout:
    """One readout of the columns of `read`'s blocks that lie in [start, stop), given in order."""
    rows = read.rows[(read.rows >= start) & (read.rows < stop)]
    if not np.array_equal(rows, np.concatenate([block.rows for block in blocks]) if blocks else []):
        raise ValueError(f"the blocks do not hold just the rows of [{start}, {stop}) that were asked")
    return Readout(
        segment=segment,
        start=start,
        stop=stop,
        rows=rows,
        computed_tokens=computed_tokens,
        logprobs=_join([block.logprobs for block in blocks]),
        ranks=_join_ids([block.ranks for block in blocks]),
        ties=_join_ids([block.ties for block in blocks]),
        top_ids=_join_ids([block.top_ids for block in blocks]),
        top_logprobs=_join([block.top_logprobs for block in blocks]),
        extra_logprobs=_join([block.extra_logprobs for block in blocks]),
        tail_logprobs=_join([block.tail_logprobs for block in blocks]),
        rest_logprobs=_join([block.rest_logprobs for block in blocks]),
        bad_rows=tuple(row for block in blocks for row in block.bad_rows),
        kl_from_against=_join([block.kl_from_against for block in blocks]),
        kl_to_against=_join([block.kl_to_against for block in blocks]),
    )


def log_sum_exp(values: FloatArray) -> FloatArray:
    """log(sum(exp(values))) of each row, max-shifted; -inf for a row of none or of -inf only. [R, N] -> [R]"""
    if values.shape[1] == 0:
        return np.full(values.shape[0], -np.inf)
    peak = values.max(axis=1)
    shift = np.where(np.isneginf(peak), 0.0, peak)
    with np.errstate(divide="ignore"):
        summed: FloatArray = shift + np.log(np.exp(values - shift[:, None]).sum(axis=1))
    return summed


def _read_targets(
    logits: FloatArray, total: FloatArray, targets: IntArray | None
) -> tuple[FloatArray, IntArray, IntArray] | tuple[None, None, None]:
    if targets is None:
        return None, None, None
    own = np.take_along_axis(logits, targets[:, None], axis=1)  # [R, 1]
    ranks = 1 + np.count_nonzero(logits > own, axis=1)
    ties = np.count_nonzero(logits == own, axis=1) - 1
    return own[:, 0] - total, ranks.astype(np.int32), ties.astype(np.int32)


def _top_ids(logits: FloatArray, k: int) -> IntArray:
    """The k best ids of each row, best first, ties by the lower id; a partition finds them without a full sort."""
    rows, width = logits.shape
    ids = np.empty((rows, k), np.int32)
    if k == 0:
        return ids
    floors = np.partition(logits, width - k, axis=1)[:, width - k]  # the k-th best logit of each row
    for row, (values, floor) in enumerate(zip(logits, floors, strict=True)):
        above = np.flatnonzero(values > floor)
        chosen = np.concatenate([above, np.flatnonzero(values == floor)[: k - above.size]])
        ids[row] = chosen[np.lexsort((chosen, -values[chosen]))]
    return ids


def _read_tails(
    logits: FloatArray, total: FloatArray, top_ids: IntArray, extra_ids: IntArray | None
) -> tuple[FloatArray, FloatArray | None]:
    """The mass outside the top ids, and outside top and extra ids, summed over what remains (never 1 - sum)."""
    remaining = logits.copy()
    np.put_along_axis(remaining, top_ids, -np.inf, axis=1)
    tail = log_sum_exp(remaining) - total
    if extra_ids is None:
        return tail, None
    remaining[:, extra_ids] = -np.inf
    return tail, log_sum_exp(remaining) - total


def _diverge(left: FloatArray, right: FloatArray) -> tuple[FloatArray, FloatArray]:
    """KL(left || right) and KL(right || left) of each row of logits, over the whole vocabulary. [R, V] -> [R] each"""
    left = left - log_sum_exp(left)[:, None]
    right = right - log_sum_exp(right)[:, None]
    gap = left - right
    forth, back = (np.exp(left) * gap).sum(axis=1), -(np.exp(right) * gap).sum(axis=1)
    return np.maximum(forth, 0.0), np.maximum(back, 0.0)  # equal rows may come out a rounding below zero


def _blank(columns: Columns, bad: BoolArray) -> Columns:
    """Rows with NaN or infinite logits must not pass for numbers."""

    def numbers(values: FloatArray | None) -> FloatArray | None:
        return None if values is None else np.where(bad.reshape(-1, *[1] * (values.ndim - 1)), np.nan, values)

    def ids(values: IntArray | None) -> IntArray | None:
        if values is None:
            return None
        return np.where(bad.reshape(-1, *[1] * (values.ndim - 1)), np.int32(UNREAD), values)

    return Columns(
        rows=columns.rows,
        logprobs=numbers(columns.logprobs),
        ranks=ids(columns.ranks),
        ties=ids(columns.ties),
        top_ids=ids(columns.top_ids),
        top_logprobs=numbers(columns.top_logprobs),
        extra_logprobs=numbers(columns.extra_logprobs),
        tail_logprobs=numbers(columns.tail_logprobs),
        rest_logprobs=numbers(columns.rest_logprobs),
        bad_rows=columns.bad_rows,
        kl_from_against=numbers(columns.kl_from_against),
        kl_to_against=numbers(columns.kl_to_against),
    )


def _join(parts: Sequence[FloatArray | None]) -> FloatArray | None:
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present else None


def _join_ids(parts: Sequence[IntArray | None]) -> IntArray | None:
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present else None
