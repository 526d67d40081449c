"""From characters to tokens."""

from __future__ import annotations

import numpy as np
import pytest

from dualtrace.problems import Problem, Reason
from dualtrace.tokens import Alignment, Selected, Tokens, select_span
from tests.support import tokenizer_zoo as zoo


def tokens_at(*offsets: tuple[int, int]) -> Tokens:
    starts, ends = np.array(offsets, np.int32).T
    return Tokens(np.arange(len(offsets), dtype=np.int32), (b"?",) * len(offsets), starts, ends)


FOUR = tokens_at((0, 0), (0, 3), (3, 7), (7, 8))


@pytest.mark.parametrize("alignment", Alignment)
def test_a_span_on_token_edges_selects_exactly_those_tokens(alignment: Alignment) -> None:
    assert select_span(FOUR, 3, 8, alignment) == Selected(2, 4, False)


def test_overlap_includes_a_token_that_straddles_and_says_so() -> None:
    assert select_span(FOUR, 2, 4, Alignment.OVERLAP) == Selected(1, 3, True)


def test_overlap_of_one_character_selects_the_token_that_holds_it() -> None:
    assert select_span(FOUR, 4, 5, Alignment.OVERLAP) == Selected(2, 3, True)


@pytest.mark.parametrize(("start", "end", "named"), [(2, 7, "token 1 .*0-3"), (3, 4, "token 2 .*3-7")])
def test_strict_refuses_a_token_that_straddles_and_names_it(start: int, end: int, named: str) -> None:
    with pytest.raises(Problem, match=named) as caught:
        select_span(FOUR, start, end, Alignment.STRICT)
    assert caught.value.reason is Reason.UNALIGNABLE


def test_a_token_of_zero_width_is_never_selected_by_its_edge() -> None:
    assert select_span(FOUR, 0, 3, Alignment.STRICT) == Selected(1, 2, False)


def test_all_parts_of_a_character_are_selected() -> None:
    tokens = zoo.load("byte_level").encode("a𐍈b", special_tokens=False)
    assert select_span(tokens, 1, 2, Alignment.STRICT) == Selected(1, 5, False)


@pytest.mark.parametrize(("start", "end"), [(-1, 3), (0, 9), (5, 3), (9, 9)])
def test_a_span_outside_the_text_is_refused_with_the_allowed_range(start: int, end: int) -> None:
    with pytest.raises(Problem, match="0-8") as caught:
        select_span(FOUR, start, end, Alignment.OVERLAP)
    assert caught.value.reason is Reason.OUT_OF_RANGE


def test_an_empty_span_is_refused() -> None:
    with pytest.raises(Problem) as caught:
        select_span(FOUR, 3, 3, Alignment.OVERLAP)
    assert caught.value.reason is Reason.EMPTY


def test_a_span_of_characters_that_the_tokenizer_drops_is_refused() -> None:
    tokens = zoo.load("wordpiece").encode("The capital", special_tokens=False)
    with pytest.raises(Problem, match="no token stands for") as caught:
        select_span(tokens, 3, 4, Alignment.OVERLAP)
    assert caught.value.reason is Reason.UNALIGNABLE


def test_characters_of_given_ids_are_refused() -> None:
    with pytest.raises(Problem, match="token ids") as caught:
        select_span(zoo.load("byte_level").describe_ids([1, 2]), 0, 1, Alignment.OVERLAP)
    assert caught.value.reason is Reason.UNALIGNABLE
