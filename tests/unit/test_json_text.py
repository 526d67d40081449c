"""JSON text written sooner is the very text that json.dumps writes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualtrace.json_text import LONG, FloatTexts, dump_json

NUMBERS = st.none() | st.floats(allow_nan=False, allow_infinity=False)
COLUMNS = st.lists(NUMBERS, max_size=3).map(lambda values: values * LONG)
PLAIN = st.none() | st.booleans() | st.integers() | st.text() | NUMBERS
VALUES = st.recursive(PLAIN | COLUMNS, lambda one: st.lists(one) | st.dictionaries(st.text(), one), max_leaves=20)


@given(VALUES, st.booleans())
def test_the_text_is_that_of_json(value: Any, compact: bool) -> None:
    separators = (",", ":") if compact else (", ", ": ")
    assert dump_json(value, compact=compact) == json.dumps(value, allow_nan=False, separators=separators)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False)))
def test_a_number_that_is_known_is_spelled_as_before(values: list[float]) -> None:
    texts = FloatTexts()
    texts.learn(values)
    texts.learn(-value for value in values)
    assert [texts[value] for value in values] == [repr(value) for value in values]


def test_texts_are_remembered_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualtrace.json_text.MOST_KEPT", 10)
    texts = FloatTexts()
    texts.learn([n + 0.5 for n in range(100)])
    assert len(texts) <= 11
    assert texts[99.5] == "99.5"


def test_both_zeros_keep_their_sign() -> None:
    column = [0.0, -0.0] * LONG
    assert dump_json(column) == json.dumps(column)


def test_what_a_backend_streams_is_learned_as_far_as_it_is_a_number() -> None:
    texts = FloatTexts()
    texts.learn([float("nan"), -1.5, float("-inf")])
    assert texts[-1.5] == "-1.5"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("count", [1, LONG])
def test_a_number_that_json_does_not_have_is_refused(value: float, count: int) -> None:
    with pytest.raises(ValueError, match=r"JSON|compliant"):
        dump_json([value] * count)
