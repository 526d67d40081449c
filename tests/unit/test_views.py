"""A view says which face of the weights answers; its key says which views are the same face."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dualtrace.problems import Problem, Reason
from dualtrace.views import BASE, Face, Noise, View, finetuned, null, scaled


def test_fully_on_and_scaled_by_one_are_one_view() -> None:
    assert finetuned("a").key == scaled("a", 1.0).key


def test_a_whole_number_and_the_same_float_are_one_strength() -> None:
    assert scaled("a", 2).key == scaled("a", 2.0).key


@pytest.mark.parametrize("strength", [0.0, -0.0, 0])
def test_strength_zero_is_the_base(strength: float) -> None:
    assert scaled("a", strength).is_plain
    assert scaled("a", strength).key == BASE.key


def test_views_that_differ_have_keys_that_differ() -> None:
    noise = Noise(1)
    views = [
        BASE, finetuned("a"), finetuned("b"), scaled("a", 1.25), scaled("a", -1.0), scaled("a", 1.25 + 2**-52),
        null("a", noise), null("b", noise), null("a", Noise(2)), null("a", Noise(1, 0.03)),
        null("a", Noise(1, 0.02, 2.0)),
        null("a", Noise(1, variance_faithful=True)),
    ]  # fmt: skip
    assert len({view.key for view in views}) == len(views)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: finetuned(""), Reason.MISSING),
        (lambda: scaled("a", float("nan")), Reason.NOT_FINITE),
        (lambda: scaled("a", float("inf")), Reason.NOT_FINITE),
        (lambda: View(Face.NULL, "a"), Reason.CONFLICT),
        (lambda: View(Face.FINETUNED, "a", noise=Noise(1)), Reason.CONFLICT),
        (lambda: View(Face.FINETUNED, "a", strength=0.5), Reason.CONFLICT),
        (lambda: View(Face.BASE, "a"), Reason.CONFLICT),
        (lambda: Noise(2**63), Reason.OUT_OF_RANGE),
        (lambda: Noise(1, float("nan")), Reason.NOT_FINITE),
        (lambda: Noise(1, -0.1), Reason.OUT_OF_RANGE),
        (lambda: Noise(1, 0.02, 0.0), Reason.OUT_OF_RANGE),
        (lambda: Noise(1, 0.02, -1.0), Reason.OUT_OF_RANGE),
        (lambda: Noise(1, 0.02, float("inf")), Reason.NOT_FINITE),
    ],
)
def test_a_view_that_says_nothing_clear_is_refused(make: Callable[[], object], reason: Reason) -> None:
    with pytest.raises(Problem) as caught:
        make()
    assert caught.value.reason is reason


@pytest.mark.parametrize("seed", [-(2**63), 0, 2**63 - 1])
def test_every_seed_of_64_bits_is_legal(seed: int) -> None:
    assert Noise(seed).seed == seed
