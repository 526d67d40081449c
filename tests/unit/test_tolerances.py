"""The tolerance table: every number has a source, and a pair of sides finds the looser of the two."""

import math

import pytest

from tests.support.tolerances import (
    BY_PRECISION,
    FLOAT32_FAST,
    FLOAT32_HIGHEST,
    FLOAT64,
    LOG_SOFTMAX_LARGE,
    SUM_TOLERANCES,
    TOLERANCES,
    Precision,
    SumTolerance,
    Tolerance,
    find_tolerance,
)

SINGLE = Precision("float32", "highest")


@pytest.mark.parametrize("entry", [*TOLERANCES, *SUM_TOLERANCES], ids=lambda entry: str(entry.name))
def test_every_entry_says_where_its_numbers_come_from(entry: Tolerance | SumTolerance) -> None:
    assert len(entry.source) > 20


def test_every_precision_leads_to_an_entry_of_the_table() -> None:
    assert set(BY_PRECISION.values()) == set(TOLERANCES)


def test_the_table_goes_from_strict_to_loose() -> None:
    assert list(TOLERANCES) == sorted(TOLERANCES, key=lambda entry: (entry.abs_epsilon, entry.rel_epsilon))


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (SINGLE, SINGLE, FLOAT32_HIGHEST),
        (SINGLE, Precision("float32", "tf32"), FLOAT32_FAST),
        (Precision("float64", "float64"), SINGLE, FLOAT32_HIGHEST),
        (Precision("float64", "float64"), Precision("float64", "highest"), FLOAT64),
    ],
)
def test_a_pair_of_sides_is_held_to_the_looser_one(left: Precision, right: Precision, expected: Tolerance) -> None:
    assert find_tolerance(left, right) is find_tolerance(right, left) is expected


def test_a_precision_nobody_measured_is_refused_by_name() -> None:
    with pytest.raises(LookupError, match="float8"):
        find_tolerance(SINGLE, Precision("float8", "highest"))


def test_a_difference_just_over_the_tolerance_is_not_allowed() -> None:
    assert FLOAT32_HIGHEST.allows(0.0, 1.0e-4)
    assert not FLOAT32_HIGHEST.allows(0.0, 1.01e-4)


def test_nan_agrees_with_nothing() -> None:
    assert not FLOAT32_FAST.allows(math.nan, math.nan)


def test_a_sum_is_allowed_more_the_more_tokens_it_has() -> None:
    assert LOG_SOFTMAX_LARGE.epsilon(100) == pytest.approx(4.1e-3)
