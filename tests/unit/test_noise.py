"""Null noise is the same everywhere, normal, and independent from tensor to tensor."""

from __future__ import annotations

import hashlib
import math
import struct
from statistics import NormalDist

import numpy as np
import pytest

from dualtrace.noise import BLOCK_NUMBERS, deviation, draw, quantile, uniform
from dualtrace.views import Noise
from tests.support.vectors import Case, cases

NAME = "model.layers.0.self_attn.q_proj.lora_A.weight"
COUNT = 40_000
SIGMAS = 5.0  # one honest stream in a million and a half strays further from its expected value


def plain_python(seed: int, name: str, count: int) -> list[float]:
    """Steps 1 to 3 of the definition with the standard library alone."""
    raw = hashlib.shake_128(b"dualtrace.noise.v1\0" + str(seed).encode() + b"\0" + name.encode()).digest(8 * count)
    return [NormalDist().inv_cdf(((word >> 12) + 0.5) / 2**52) for (word,) in struct.iter_unpack("<Q", raw)]


def sample(seed: int = 0, name: str = NAME) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return draw(Noise(seed, init_scale=1.0), name, (COUNT,)).astype(np.float64)


@cases("null_noise")
def test_the_first_numbers_are_those_of_the_vectors(case: Case) -> None:
    noise = Noise(case["seed"], case["init_scale"], case["rank_scale"], case["variance_faithful"])
    values = draw(noise, case["parameter"], tuple(case["shape"])).reshape(-1)
    assert values[: len(case["first"])].tolist() == case["first"]


@cases("null_noise")
def test_every_bit_of_a_tensor_is_that_of_the_vectors(case: Case) -> None:
    noise = Noise(case["seed"], case["init_scale"], case["rank_scale"], case["variance_faithful"])
    values = draw(noise, case["parameter"], tuple(case["shape"]))
    assert hashlib.sha256(values.astype("<f4").tobytes()).hexdigest() == case["sha256"]


def test_the_definition_can_be_followed_with_the_standard_library_alone() -> None:
    values = draw(Noise(-7, init_scale=0.5), NAME, (500,))
    assert values.tolist() == [np.float32(0.5 * z) for z in plain_python(-7, NAME, 500)]


def test_the_quantile_is_that_of_the_standard_library_from_tail_to_tail() -> None:
    edges = [
        2.0**-53,
        1 - 2.0**-53,
        0.075,
        0.925,
        0.5,
        *(10.0**-n for n in range(1, 16)),
        *(1 - 10.0**-n for n in range(1, 16)),
    ]
    points = np.array([*edges, *np.random.default_rng(1).random(2000)])
    assert quantile(points).tolist() == [NormalDist().inv_cdf(point) for point in points.tolist()]


def test_no_bits_at_all_and_all_bits_give_finite_numbers() -> None:
    words = np.array([0, 2**64 - 1], np.uint64)
    low, high = quantile(uniform(words)).tolist()
    assert math.isfinite(low)
    assert low == -high


def test_a_tensor_is_filled_row_by_row() -> None:
    flat = draw(Noise(3), NAME, (12,))
    assert np.array_equal(draw(Noise(3), NAME, (3, 4)), flat.reshape(3, 4))


def test_a_longer_tensor_begins_with_the_shorter_one() -> None:
    long = draw(Noise(3), NAME, (BLOCK_NUMBERS + 10,))
    assert np.array_equal(long[:100], draw(Noise(3), NAME, (100,)))


def test_the_numbers_are_normal() -> None:
    ordered = np.sort(sample())
    expected = np.arange(COUNT) / COUNT
    reached = 0.5 * np.array([math.erfc(-value / math.sqrt(2)) for value in ordered])
    # Kolmogorov: P(distance > 2.5 / sqrt(n)) is below 8e-6
    assert np.abs(reached - expected).max() < 2.5 / math.sqrt(COUNT)


def test_mean_and_deviation_are_those_that_were_asked() -> None:
    values = sample(5)
    assert abs(values.mean()) < SIGMAS / math.sqrt(COUNT)
    assert abs(values.std() - 1.0) < SIGMAS / math.sqrt(2 * COUNT)


@pytest.mark.parametrize(
    ("seed", "name"),
    [(1, NAME), (-1, NAME), (0, NAME.replace("lora_A", "lora_B")), (0, NAME.replace("layers.0", "layers.1"))],
)
def test_another_seed_or_another_name_is_another_stream(seed: int, name: str) -> None:
    correlation = float(np.corrcoef(sample(), sample(seed, name))[0, 1])
    assert abs(correlation) < SIGMAS / math.sqrt(COUNT)


def test_neighbours_in_a_stream_are_independent() -> None:
    values = sample()
    assert abs(float(np.corrcoef(values[1:], values[:-1])[0, 1])) < SIGMAS / math.sqrt(COUNT)


def test_rank_scale_enters_by_its_square_root() -> None:
    assert deviation(Noise(0, 0.5, 4.0)) == 1.0


def test_rank_scale_enters_by_its_fourth_root_when_faithful_to_the_variance() -> None:
    assert deviation(Noise(0, 0.5, 16.0, variance_faithful=True)) == 1.0
