"""Reading logits in JAX: ties, tails and sums against the float64 oracle; and how segments are packed into rows."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from backend_jax.device import house_rules
from backend_jax.readout import Asked, base_block, contrast_block, read_block
from backend_jax.shapes import RowPlan, pack, token_buckets
from dualtrace.arrays import IntArray
from dualtrace.engine import Read as Question
from dualtrace.engine import int_array
from dualtrace.reference.readout import read_logits
from tests.support.tolerances import FLOAT32_HIGHEST

ROWS, WIDTH = 8, 40_000  # two blocks of counted columns and a rest


def logits_of(seed: int, scale: float = 3.0) -> Any:
    return (np.random.default_rng(seed).normal(size=(ROWS, WIDTH)) * scale).astype(np.float32)


def read(logits: Any, targets: IntArray, top: int = 0, extra: tuple[int, ...] = ()) -> Any:
    """The rows' own numbers are the hidden states, the logits the head: one product, and they are themselves again."""
    asked = Asked(targets, np.full(ROWS, top, np.int32), np.tile(int_array(extra), (ROWS, 1)))  # type: ignore[arg-type]
    with house_rules():
        return read_block(np.eye(ROWS, dtype=np.float32), logits.T.copy(), asked, softcap=None, most=top, tails=True)  # type: ignore[arg-type]


def equal(found: Any, wanted: Any) -> bool:
    return np.array_equal(found, wanted)


def test_logprobs_ranks_and_tails_are_those_of_float64() -> None:
    logits, targets, extra = logits_of(0), int_array(range(100, 100 + ROWS)), (5, 39_999)
    found = read(logits, targets, 16, extra)
    question = Question(int_array(range(ROWS)), targets, 16, int_array(extra), tail=True)
    wanted = read_logits(logits.astype(np.float64), question)
    for ours, theirs in (
        (found.logprobs, wanted.logprobs), (found.top_logprobs, wanted.top_logprobs),
        (found.extra_logprobs, wanted.extra_logprobs), (found.tails, wanted.tail_logprobs),
        (found.rests, wanted.rest_logprobs),
    ):  # fmt: skip
        assert np.abs(np.asarray(ours) - theirs).max() <= FLOAT32_HIGHEST.abs_epsilon / 1000
    assert equal(found.ranks, wanted.ranks)
    assert equal(found.top_ids, wanted.top_ids)


def test_the_sum_over_the_vocabulary_has_no_bias() -> None:
    logits, targets = logits_of(1), np.zeros(ROWS, np.int32)
    wide = logits.astype(np.float64)
    exact = wide[:, 0] - np.log(np.exp(wide).sum(axis=1))
    assert abs(float((np.asarray(read(logits, targets).logprobs) - exact).mean())) < 1e-8


def test_ties_go_to_the_lower_id_and_minus_zero_ties_with_zero() -> None:
    logits = np.full((ROWS, WIDTH), -1.0, np.float32)
    logits[:, [9, 30_000]], logits[:, 3] = 0.0, -0.0
    found = read(logits, np.full(ROWS, 30_000, np.int32), 4)
    assert np.asarray(found.top_ids)[0].tolist() == [3, 9, 30_000, 0]
    assert np.asarray(found.ties)[0] == 2
    assert np.asarray(found.ranks)[0] == 1


def test_all_logits_equal_are_all_counted_as_ties() -> None:
    found = read(np.zeros((ROWS, WIDTH), np.float32), np.zeros(ROWS, np.int32))
    assert np.asarray(found.ties).tolist() == [WIDTH - 1] * ROWS


def test_a_tail_far_below_float32_is_still_measured() -> None:
    logits = np.full((ROWS, WIDTH), -300.0, np.float32)
    logits[:, 0] = 0.0
    assert np.asarray(read(logits, np.zeros(ROWS, np.int32), 1).tails)[0] == pytest.approx(-300 + np.log(WIDTH - 1))


def contrast(left: Any, right: Any, which: IntArray, broken: int | None = None) -> Any:
    """Rows of `right`, each measured against the row `which` of `left`; the row `broken` of `left` is infinite."""
    head = np.concatenate([left, right]).T.copy()  # [V, 2 * ROWS]
    one = np.eye(2 * ROWS, dtype=np.float32)
    if broken is not None:
        one[broken, broken] = np.inf
    asked: Any = Asked(np.zeros(ROWS, np.int32), np.zeros(ROWS, np.int32), np.zeros((ROWS, 0), np.int32))  # type: ignore[arg-type]
    with house_rules():
        base = base_block(one[:ROWS], head, softcap=None)  # type: ignore[arg-type]
        options: Any = {"softcap": None, "most": 0, "tails": False}
        return contrast_block(one[ROWS:], head, asked, base, which, **options)[1]  # type: ignore[arg-type]


def test_divergences_are_those_of_float64() -> None:
    left, right = logits_of(2), logits_of(2) + logits_of(3, 0.01)
    which = int_array(range(ROWS)[::-1])
    found = contrast(left, right[which], which)
    p, q = (wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)) for wide in map(np.float64, (left, right)))
    assert np.asarray(found.of_first) == pytest.approx((np.exp(p) * (p - q)).sum(axis=1)[which], rel=1e-9)
    assert np.asarray(found.of_second) == pytest.approx((np.exp(q) * (q - p)).sum(axis=1)[which], rel=1e-9)


def test_a_divergence_from_a_row_that_is_not_sound_is_reported() -> None:
    found = contrast(logits_of(2), logits_of(3), int_array([0, 3, 1, 3, 4, 5, 6, 7]), broken=3)
    assert np.flatnonzero(~np.asarray(found.both_good)).tolist() == [1, 3]


# ---- packing


def packed(lengths: list[int], *liked: tuple[int, int]) -> RowPlan:
    return pack(tuple(lengths), ("",) * len(lengths), frozenset(liked))


def test_segments_of_one_row_do_not_overlap_and_fit() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 40).tolist()
    plan = packed(lengths)
    cells = [(row, at + i) for (row, at), size in zip(plan.places, lengths, strict=True) for i in range(size)]
    assert len(set(cells)) == sum(lengths)
    assert all(row < plan.rows and at < plan.tokens for row, at in cells)


def test_short_completions_are_packed_with_little_padding() -> None:
    lengths = [8 + index * 7 % 17 for index in range(32)]
    plan = packed(lengths)
    assert plan.rows * plan.tokens <= 1.15 * sum(lengths)


def test_two_kinds_never_share_a_row() -> None:
    plan = pack((4,) * 10, ("a", "b") * 5, frozenset())
    assert not {row for row, _ in plan.places[::2]} & {row for row, _ in plan.places[1::2]}


def test_a_compiled_size_is_taken_when_it_costs_little_more() -> None:
    assert packed([100]).tokens == 128
    assert (packed([90], (1, 96), (1, 128)).tokens, packed([97], (1, 512)).tokens) == (96, 128)


def test_buckets_grow_by_a_half_at_most() -> None:
    sizes = token_buckets(8192)
    assert all(after <= 1.5 * before for before, after in itertools.pairwise(sizes))
    assert sizes[-1] == 8192
