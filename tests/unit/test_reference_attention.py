"""Attention and rotary positions do by the numbers what their definitions say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dualtrace.engine import int_array
from dualtrace.reference.attention import BLOCK_ROWS, CausalMask, Sight, attend, attend_rows, softmax_allowed
from dualtrace.reference.config import ConfigReader
from dualtrace.reference.rope import read_frequencies, turn

STREAM = np.random.default_rng(3)


def test_without_scores_a_row_reads_the_mean_of_what_it_sees() -> None:
    zeros, values = np.zeros((1, 4, 2)), STREAM.normal(size=(1, 4, 2))
    mixed = attend(zeros, zeros, values, CausalMask(4), 0, 1.0)
    assert mixed == pytest.approx(np.array([values[0, : row + 1].mean(axis=0) for row in range(4)]))


def test_scores_weigh_by_their_exponential() -> None:
    queries, keys = np.ones((1, 2, 1)), np.array([[[0.0], [math.log(3.0)]]])
    values = np.array([[[0.0], [1.0]]])
    assert attend(queries, keys, values, CausalMask(2), 0, 1.0)[1, 0] == pytest.approx(0.75)


def test_neighbouring_query_heads_share_a_key_head() -> None:
    queries, keys, values = (STREAM.normal(size=(heads, 5, 2)) for heads in (4, 2, 2))
    grouped = attend(queries, keys, values, CausalMask(5), 0, 0.7)
    spread = attend(queries, keys[[0, 0, 1, 1]], values[[0, 0, 1, 1]], CausalMask(5), 0, 0.7)
    assert np.array_equal(grouped, spread)


def test_each_head_obeys_its_own_mask() -> None:
    queries, keys, values = (STREAM.normal(size=(2, 3, 2)) for _ in range(3))
    causal, itself = np.tri(3, dtype=bool), np.eye(3, dtype=bool)
    mixed, _, _ = attend_rows(queries, keys, values, Sight(np.stack([causal, itself])), 1.0)
    assert np.array_equal(mixed[:, 1], values[1])


def test_a_row_that_sees_nothing_reads_zeros() -> None:
    assert softmax_allowed(np.zeros((1, 3)), np.zeros((1, 3), bool)).tolist() == [[0.0, 0.0, 0.0]]


def test_a_broken_row_does_not_reach_rows_that_may_not_see_it() -> None:
    queries, keys, values = (STREAM.normal(size=(1, 4, 2)) for _ in range(3))
    sound = attend(queries, keys, values, CausalMask(4), 0, 1.0)
    keys[0, 2], values[0, 2] = np.nan, np.nan
    broken = attend(queries, keys, values, CausalMask(4), 0, 1.0)
    assert broken[:2] == pytest.approx(sound[:2], rel=1e-15)
    assert np.isnan(broken[2:]).all()


def test_turning_keeps_lengths_and_turns_by_the_angle() -> None:
    turned = turn(np.array([[[1.0, 0.0]]]), int_array([3]), np.array([0.5]))
    assert turned[0, 0] == pytest.approx([math.cos(1.5), math.sin(1.5)])


def test_a_column_is_paired_with_the_one_half_a_head_away() -> None:
    turned = turn(np.array([[[1.0, 0.0, 0.0, 0.0]]]), int_array([1]), np.array([math.pi / 2, 0.0]))
    assert turned[0, 0] == pytest.approx([0.0, 0.0, 1.0, 0.0])


def frequencies(**config: object) -> list[float]:
    return [float(value) for value in read_frequencies(ConfigReader(config), 4)]


def test_frequencies_fall_geometrically_from_one() -> None:
    assert frequencies(rope_theta=100.0) == pytest.approx([1.0, 0.1])


def test_linear_scaling_slows_every_pair_alike() -> None:
    assert frequencies(rope_theta=100.0, rope_scaling={"type": "linear", "factor": 4.0}) == pytest.approx([0.25, 0.025])


def test_the_new_and_the_old_place_of_rope_settings_mean_the_same() -> None:
    new = frequencies(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0})
    assert new == frequencies(rope_theta=100.0, rope_scaling={"type": "linear", "factor": 4.0})


def test_llama3_scaling_keeps_quick_pairs_and_slows_slow_ones() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    kept, slowed = frequencies(rope_theta=1e8, rope_scaling={**scaling, "original_max_position_embeddings": 64})
    assert (kept, slowed) == pytest.approx((1.0, 1e-4 / 8))


def test_llama3_scaling_blends_in_between() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    # the pair of frequency 1 turns 13 / (2 pi) = 2.07 times in 13 positions, which lies between 1 and 4
    share = (13 / (2 * math.pi) - 1) / 3
    blended = frequencies(rope_scaling={**scaling, "original_max_position_embeddings": 13})[0]
    assert blended == pytest.approx(share + (1 - share) / 8)


def test_a_long_text_is_looked_at_a_block_of_rows_at_a_time() -> None:
    asked: list[tuple[int, int]] = []

    class Watched(CausalMask):
        def sight(self, layer: int, q0: int, q1: int) -> Sight:
            asked.append((q0, q1))
            return super().sight(layer, q0, q1)

    columns = np.zeros((1, 2 * BLOCK_ROWS + 1, 2))
    attend(columns, columns, columns, Watched(columns.shape[1]), 0, 1.0)
    assert asked == [(0, BLOCK_ROWS), (BLOCK_ROWS, 2 * BLOCK_ROWS), (2 * BLOCK_ROWS, 2 * BLOCK_ROWS + 1)]
