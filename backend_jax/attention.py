"""Attention of one layer over kept keys and own keys, under booleans, counted where they are applied.

Axes: N pasts, G key-value heads, C rows behind a past, R query heads of a group, T own tokens, P kept tokens, D
columns of a head. It knows arrays. It must not know masks' languages, layers or adapters.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Keys(NamedTuple):
    """Keys and values of one kind: own [N,G,C,T,D], or kept [N,G,P,D] with `score` and `mix` to fit."""

    keys: Array
    values: Array


class Allowed(NamedTuple):
    """May see, pre-softmax; `zeroed` is taken away after it. Axes of size 1 stand for all."""

    own: Array  # [N, 1|G, C, 1|R, T, T] bool
    past: Array | None  # [N, 1|G, 1|C, 1|R, 1|T, P] bool
    zeroed_own: Array | None = None
    zeroed_past: Array | None = None


class Mixes(NamedTuple):
    """The factors of the receipt's two sums for the rows and keys of a call, uint32."""

    rows: Array  # [2, N, C, T]
    own: Array  # [2, N, C, T]
    past: Array | None  # [2, N, P]


def attend(
    queries: Array, own: Keys, past: Keys | None, allowed: Allowed, scale: float, softcap: float | None
) -> Array:
    """Queries [N,G,C,R,T,D] -> [N,G,C,R,T,D]. A row that may see nothing gets zeros; what a row may not see cannot
    reach it, not even as NaN; what it may see and is not finite makes it NaN."""
    wide = jnp.float64 if queries.dtype == jnp.float64 else jnp.float32
    parts = [_score(queries, own.keys, "ngcrtd,ngcsd->ngcrts", allowed.own, scale, softcap, wide)]
    if past is not None:
        assert allowed.past is not None
        parts.append(_score(queries, past.keys, "ngcrtd,ngpd->ngcrtp", allowed.past, scale, softcap, wide))
    peak = parts[0].max(axis=-1, keepdims=True)
    for part in parts[1:]:
        peak = jnp.maximum(peak, part.max(axis=-1, keepdims=True))
    peak = jnp.where(jnp.isneginf(peak), jnp.zeros_like(peak), peak)
    weights = [jnp.exp(part - peak) for part in parts]
    total = sum((part.sum(axis=-1, keepdims=True) for part in weights[1:]), weights[0].sum(axis=-1, keepdims=True))
    share = jnp.where(total == 0, jnp.zeros_like(total), 1 / total)
    mixed = _mix(weights[0], own.values, "ngcrts,ngcsd->ngcrtd", allowed.own, allowed.zeroed_own)
    if past is not None and allowed.past is not None:
        mixed = mixed + _mix(weights[1], past.values, "ngcrtp,ngpd->ngcrtd", allowed.past, allowed.zeroed_past)
    return (mixed * share).astype(queries.dtype)


def _score(
    queries: Array, keys: Array, axes: str, allowed: Array, scale: float, softcap: float | None, wide: type
) -> Array:
    scores = jnp.einsum(axes, queries, keys, preferred_element_type=wide) * scale
    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    return jnp.where(allowed, scores, -jnp.inf)


def _mix(weights: Array, values: Array, axes: str, allowed: Array, zeroed: Array | None) -> Array:
    if zeroed is not None:
        allowed = allowed & ~zeroed
        weights = jnp.where(allowed, weights, jnp.zeros_like(weights))
    bad = ~jnp.isfinite(values).all(axis=-1)  # [N,G,C,T] or [N,G,P]: 0 * NaN is NaN, so these are taken out ...
    clean = jnp.where(bad[..., None], jnp.zeros_like(values), values)
    mixed = jnp.einsum(axes, weights.astype(values.dtype), clean, preferred_element_type=weights.dtype)
    spread = bad[:, :, :, None, None, :] if bad.ndim == 4 else bad[:, :, None, None, None, :]
    sees_bad = (allowed & spread).any(axis=-1, keepdims=True)  # ... and given back to the rows that may see them
    return jnp.where(sees_bad, jnp.nan, mixed)


def count_applied(allowed: Allowed, mixes: Mixes) -> Array:
    """[3 or 6, N, 1|G, C, 1|R, T] uint32 per row: entries, sum_a, sum_b, and the same of what was zeroed."""
    sums = _sum_entries(allowed.own, allowed.past, mixes)
    if allowed.zeroed_own is not None:
        past = None if allowed.past is None or allowed.zeroed_past is None else allowed.past & allowed.zeroed_past
        sums += _sum_entries(allowed.own & allowed.zeroed_own, past, mixes)
    return jnp.stack(sums)


def _sum_entries(own: Array, past: Array | None, mixes: Mixes) -> list[Array]:
    entries = own.sum(axis=-1, dtype=jnp.uint32)
    if past is not None:
        entries = entries + past.sum(axis=-1, dtype=jnp.uint32)
    sums = [entries]
    for which in range(2):
        factors = mixes.own[which][:, None, :, None, None, :]
        total = jnp.where(own, factors, jnp.zeros_like(factors)).sum(axis=-1, dtype=jnp.uint32)
        if past is not None and mixes.past is not None:
            factors = mixes.past[which][:, None, None, None, None, :]
            total = total + jnp.where(past, factors, jnp.zeros_like(factors)).sum(axis=-1, dtype=jnp.uint32)
        sums.append(total * mixes.rows[which][:, None, :, None, :])
    return sums
