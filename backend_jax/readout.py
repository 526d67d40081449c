"""Logits read inside compiled functions: logprobs, ranks, ties, the best ids, tails, exact divergence.

Logits are made for one small block of rows, in float32 or better, and never leave. log p = logit - logsumexp, the sum
shifted by the maximum and added up in float64. It knows arrays. It must not know segments or who asked.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
DIVERGED_COLUMNS = 4096  # at a time
COUNTED_COLUMNS = 16384  # at a time; below 2**15, so that two counts fit one 32-bit number


class Asked(NamedTuple):
    targets: Array  # [R] int32
    top: Array  # [R] int32: how many of the best ids count as top, at most `most`
    extra: Array  # [R, E] int32; the vocabulary's size stands for none


class Read(NamedTuple):
    """Logprobs are float64."""

    good: Array  # [R] bool: every logit is finite
    logprobs: Array  # [R]
    ranks: Array  # [R] int32
    ties: Array  # [R] int32
    top_ids: Array  # [R, most] int32
    top_logprobs: Array  # [R, most]
    extra_logprobs: Array  # [R, E]
    tails: Array | None  # [R] outside top
    rests: Array | None  # [R] outside top and extra


class Base(NamedTuple):
    """What others are measured against: one block of rows, whose logits are made once for all of them."""

    logits: Array  # [B, V]
    good: Array  # [B] bool


class Divergence(NamedTuple):
    both_good: Array  # [R] bool
    of_first: Array  # [R] float64: KL(first || second)
    of_second: Array  # [R] float64: KL(second || first)


def make_logits(hidden: Array, head: Array, softcap: float | None) -> Array:
    """[R, hidden] x [V, hidden] -> [R, V] float32 or float64."""
    wide = jnp.float64 if hidden.dtype == jnp.float64 else jnp.float32
    logits = jnp.einsum("rh,vh->rv", hidden, head, preferred_element_type=wide)
    return logits if softcap is None else jnp.tanh(logits / softcap) * softcap


def read_block(hidden: Array, head: Array, asked: Asked, *, softcap: float | None, most: int, tails: bool) -> Read:
    logits, good = _sound(make_logits(hidden, head, softcap))
    return _read_sound(logits, good, asked, most, tails)


def base_block(hidden: Array, head: Array, *, softcap: float | None) -> Base:
    return Base(*_sound(make_logits(hidden, head, softcap)))


def contrast_block(
    hidden: Array, head: Array, asked: Asked, base: Base, which: Array, *, softcap: float | None, most: int, tails: bool
) -> tuple[Read, Divergence]:
    """`read_block`, and the divergence of each row from the row `which` [R] of the base."""
    logits, good = _sound(make_logits(hidden, head, softcap))
    return _read_sound(logits, good, asked, most, tails), _diverge(base, which, logits, good)


def _read_sound(logits: Array, good: Array, asked: Asked, most: int, tails: bool) -> Read:
    total = log_sum_exp(logits)  # [R]
    own = _pick(logits, asked.targets[:, None])  # [R, 1]
    above, equal = _count(logits, own)
    best, top_ids = jax.lax.top_k(logits, most)
    top_ids = top_ids.astype(jnp.int32)
    tail, rest = _read_tails(logits, total, top_ids, asked) if tails else (None, None)
    one = jnp.asarray(1, jnp.int32)
    return Read(
        good=good,
        logprobs=own[:, 0].astype(jnp.float64) - total,
        ranks=above + one,
        ties=equal - one,
        top_ids=top_ids,
        top_logprobs=best.astype(jnp.float64) - total[:, None],
        extra_logprobs=_pick(logits, asked.extra).astype(jnp.float64) - total[:, None],
        tails=tail,
        rests=rest,
    )


def _diverge(base: Base, which: Array, logits: Array, good: Array) -> Divergence:
    """Over the whole vocabulary, in float64 from the logits on; equal sides give exactly 0.

    Some thousand columns at a time: float64 arrays of [R,V] would be written to memory and read again at every step.
    """
    peaks = base.logits.max(axis=-1), logits.max(axis=-1)  # [B], [R]

    def add(sums: tuple[Array, ...], start: Array, size: int) -> tuple[Array, ...]:
        left, right = (
            jax.lax.dynamic_slice_in_dim(side, start, size, 1).astype(jnp.float64) - peak[:, None].astype(jnp.float64)
            for side, peak in zip((base.logits, logits), peaks, strict=True)
        )
        left = jnp.take(left, which, axis=0, mode="clip")  # [R, size]
        share, other = jnp.exp(left), jnp.exp(right)
        gap = left - right
        terms = (share, other, share * gap, other * gap)
        return tuple(total + term.sum(axis=-1) for total, term in zip(sums, terms, strict=True))

    vocabulary = logits.shape[1]
    width = min(DIVERGED_COLUMNS, vocabulary)
    whole = vocabulary // width
    sums: tuple[Array, ...] = (jnp.zeros(logits.shape[0], jnp.float64),) * 4
    step = jnp.asarray(width, jnp.int32)
    sums = jax.lax.fori_loop(
        jnp.asarray(0, jnp.int32), jnp.asarray(whole, jnp.int32), lambda i, sums: add(sums, i * step, width), sums
    )
    if rest := vocabulary - whole * width:
        sums = add(sums, jnp.asarray(whole * width, jnp.int32), rest)
    all_left, all_right, gaps_left, gaps_right = sums
    offset = jnp.log(all_left) - jnp.log(all_right)
    nothing = jnp.zeros((), jnp.float64)  # rounding may fall below it, a divergence cannot
    return Divergence(
        both_good=good & jnp.take(base.good, which, axis=0, mode="clip"),
        of_first=jnp.maximum(gaps_left / all_left - offset, nothing),
        of_second=jnp.maximum(offset - gaps_right / all_right, nothing),
    )


def log_sum_exp(logits: Array) -> Array:
    """[R, V] -> [R] float64; -inf for a row of -inf only."""
    peak = logits.max(axis=-1)
    peak = jnp.where(jnp.isneginf(peak), jnp.zeros_like(peak), peak)
    summed = jnp.exp(logits - peak[:, None]).sum(axis=-1, dtype=jnp.float64)
    return peak.astype(jnp.float64) + jnp.log(summed)


def _sound(logits: Array) -> tuple[Array, Array]:
    """Rows with a logit that is not finite are read as zeros and reported. -0.0 becomes 0.0: they tie."""
    good = jnp.isfinite(logits).all(axis=-1)
    return jnp.where(good[:, None] & (logits != 0), logits, jnp.zeros_like(logits)), good


def _pick(logits: Array, ids: Array) -> Array:
    """logits [R,V] at ids [R,E]; an id beyond the end reads the last one and is dropped by the reader."""
    return jnp.take_along_axis(logits, ids, axis=-1, mode="clip")


def _count(logits: Array, own: Array) -> tuple[Array, Array]:
    """How many logits [R,V] lie above own [R,1], and how many equal it. Both are counted in the halves of one number,
    a few columns at a time: two counts would each write a [R,V] array of their own."""
    above = equal = jnp.zeros(logits.shape[0], jnp.int32)
    nothing, one, half = (jnp.asarray(value, jnp.int32) for value in (0, 1, 1 << 16))
    for start in range(0, logits.shape[1], COUNTED_COLUMNS):
        part = logits[:, start : start + COUNTED_COLUMNS]
        counts = jnp.where(part > own, one, jnp.where(part == own, half, nothing)).sum(axis=-1, dtype=jnp.int32)
        above, equal = above + counts % half, equal + counts // half
    return above, equal


def _read_tails(logits: Array, total: Array, top_ids: Array, asked: Asked) -> tuple[Array, Array]:
    """What remains is summed itself; 1 - sum of the rest would lose it."""
    vocabulary = jnp.asarray(logits.shape[1], jnp.int32)
    places = jnp.arange(top_ids.shape[1], dtype=jnp.int32)[None, :]
    removed = jnp.where(places < asked.top[:, None], top_ids, vocabulary)
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    remaining = logits.at[rows, removed].set(-jnp.inf, mode="drop")
    outside = remaining.at[rows, asked.extra].set(-jnp.inf, mode="drop")
    return log_sum_exp(remaining) - total, log_sum_exp(outside) - total
