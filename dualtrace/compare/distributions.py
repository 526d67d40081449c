"""Two next-token distributions, each known on some ids and by the mass of the rest: how far apart they must be.

All in float64 and nats. A divergence is never guessed from the known ids alone: the rest's mass bounds it, and each
bound is named for what it is. It must not know who answers, nor how a question reaches the ids that both sides know.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from dualtrace.arrays import FloatArray
from dualtrace.questions.answers import NextTokens, Tail
from dualtrace.questions.tails import UNDERFLOW_LOGPROB, tail_of

NOTHING = -math.inf


@dataclass(frozen=True)
class Mass:
    """A probability as bounds of its logarithm: equal where it was measured."""

    low: float
    high: float


@dataclass(frozen=True)
class Known:
    """One side's distribution: the ids that it told, and the rest."""

    logprobs: Mapping[int, float]  # id -> nats
    tail: Tail  # the mass of all other ids
    vocab_size: int


def known_of(found: NextTokens, extra_ids: tuple[int, ...]) -> Known:
    """What an answer tells, top-k and extra ids alike."""
    logprobs = dict(zip(found.top_ids.tolist(), found.top_logprobs.tolist(), strict=True))
    logprobs.update(zip(extra_ids, found.extra_logprobs.tolist(), strict=True))
    tail = found.tail if found.tail_beyond_extra is None else found.tail_beyond_extra
    return Known(logprobs, tail, found.vocab_size)


@dataclass(frozen=True)
class Divergences:
    """None where a bound is infinite."""

    kl_left_right_lower: float | None
    kl_right_left_lower: float | None
    js_lower: float
    js_upper: float


@dataclass(frozen=True)
class Shared:
    """Both distributions on the ids that both sides told; whatever else a side told went into its rest."""

    ids: tuple[int, ...]  # by the left side's logprob, descending, ties by lower id
    left: FloatArray  # [U] nats
    right: FloatArray  # [U]
    left_rest: Mass
    right_rest: Mass
    left_tail: Tail  # the rest in the words of an answer
    right_tail: Tail


def share(left: Known, right: Known) -> Shared:
    both = sorted(left.logprobs.keys() & right.logprobs.keys(), key=lambda one: (-left.logprobs[one], one))
    left_rest, right_rest = _rest(left, both), _rest(right, both)
    return Shared(
        tuple(both),
        np.array([left.logprobs[one] for one in both], np.float64),
        np.array([right.logprobs[one] for one in both], np.float64),
        left_rest,
        right_rest,
        _tail(left_rest, len(both), left.vocab_size),
        _tail(right_rest, len(both), right.vocab_size),
    )


def mass_of(tail: Tail) -> Mass:
    """Of a tail that was checked: `dualtrace.questions.soundness` refuses those that no mass can be."""
    if tail.state == "MEASURED":
        assert tail.logprob is not None, "a measured tail has its logprob"
        return Mass(tail.logprob, tail.logprob)
    return Mass(NOTHING, UNDERFLOW_LOGPROB if tail.state == "UNDERFLOW" else NOTHING)


def _rest(side: Known, shared: list[int]) -> Mass:
    """The tail and the ids that only this side told."""
    tail = mass_of(side.tail)
    own = [side.logprobs[one] for one in side.logprobs.keys() - set(shared)]
    return Mass(log_sum([tail.low, *own]), log_sum([tail.high, *own]))


def _tail(rest: Mass, shared: int, vocab_size: int) -> Tail:
    return Tail("UNDERFLOW") if rest.low == NOTHING < rest.high else tail_of(shared, vocab_size, rest.low)


def log_sum(values: Iterable[float]) -> float:
    """logsumexp, exact in its sum."""
    given = list(values)
    peak = max(given, default=NOTHING)
    if peak == NOTHING:
        return NOTHING
    return peak + math.log(math.fsum(math.exp(value - peak) for value in given))


def diverge(shared: Shared) -> Divergences:
    js_lower, js_upper = _js_bounds(shared)
    return Divergences(
        _kl_lower(shared.left, shared.right, shared.left_rest, shared.right_rest),
        _kl_lower(shared.right, shared.left, shared.right_rest, shared.left_rest),
        js_lower,
        js_upper,
    )


def _kl_lower(left: FloatArray, right: FloatArray, left_rest: Mass, right_rest: Mass) -> float | None:
    """sum_U p ln(p/q) + tP ln(tP/tQ): the rest taken as one token, which can only hide divergence.

    A rest that underflowed is taken as 2^-126 where it divides, and its own term is dropped.
    """
    terms = [math.exp(p) * (p - q) for p, q in zip(left.tolist(), right.tolist(), strict=True)]
    if left_rest.low != NOTHING:
        if right_rest.high == NOTHING:
            return None
        terms.append(math.exp(left_rest.low) * (left_rest.low - right_rest.high))
    # No divergence is below 0; a sum of rounded logprobs may be.
    return max(0.0, math.fsum(terms))


def _js_bounds(shared: Shared) -> tuple[float, float]:
    known = [_js_term(p, q) for p, q in zip(shared.left.tolist(), shared.right.tolist(), strict=True)]
    left, right = shared.left_rest, shared.right_rest
    lower = math.fsum([*known, _least_js_term(left, right)])
    upper = math.fsum([*known, (math.exp(left.high) + math.exp(right.high)) / 2 * math.log(2)])
    return min(max(0.0, lower), math.log(2)), min(max(0.0, upper, lower), math.log(2))


def _js_term(p: float, q: float) -> float:
    """What one id, or a bucket of ids, adds to JS: p/2 ln(p/m) + q/2 ln(q/m) with m = (p+q)/2; logs in, nats out."""
    if p == NOTHING and q == NOTHING:
        return 0.0
    middle = log_sum([p, q]) - math.log(2)
    return math.fsum(math.exp(one) / 2 * (one - middle) for one in (p, q) if one != NOTHING)


def _least_js_term(left: Mass, right: Mass) -> float:
    """The least over all masses within the bounds: the nearer the two, the smaller."""
    if left.low <= right.high and right.low <= left.high:
        return 0.0
    return _js_term(left.high, right.low) if left.high < right.low else _js_term(left.low, right.high)


def top_of(side: Known, *, holds_top: bool) -> int | None:
    """The most likely id, ties by lower id; None where an id that was not told may be more likely."""
    if not side.logprobs:
        return None
    best = min(side.logprobs, key=lambda one: (-side.logprobs[one], one))
    return best if holds_top or side.logprobs[best] > mass_of(side.tail).high else None
