"""The windows of a rolling score: every token once, never more than fits, as much past as fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualtrace.questions.windows import window_count, windows


@st.composite
def grids(draw: st.DrawFn) -> tuple[int, int, int]:
    max_tokens = draw(st.integers(1, 40))
    return draw(st.integers(0, 200)), max_tokens, draw(st.integers(1, max_tokens))


@given(grids())
def test_every_token_but_the_first_is_scored_exactly_once_in_order(grid: tuple[int, int, int]) -> None:
    scored = [index for w in windows(*grid) for index in range(w.score_start, w.score_stop)]
    assert scored == [*range(1, grid[0])]


@given(grids())
def test_a_window_never_feeds_more_than_its_size(grid: tuple[int, int, int]) -> None:
    assert all(1 <= w.feed_stop - w.feed_start <= grid[1] for w in windows(*grid))


@given(grids())
def test_a_window_feeds_just_up_to_the_token_before_the_last_it_scores(grid: tuple[int, int, int]) -> None:
    assert all(w.feed_stop == w.score_stop - 1 for w in windows(*grid))


@given(grids())
def test_a_scored_token_has_its_predecessor_in_the_window(grid: tuple[int, int, int]) -> None:
    assert all(w.feed_start <= w.score_start - 1 for w in windows(*grid))


@given(grids())
def test_a_later_window_is_full(grid: tuple[int, int, int]) -> None:
    assert all(w.feed_stop - w.feed_start == grid[1] for w in list(windows(*grid))[1:])


@given(grids())
def test_a_later_window_scores_one_stride_but_the_last(grid: tuple[int, int, int]) -> None:
    assert all(w.score_stop - w.score_start == grid[2] for w in list(windows(*grid))[1:-1])


@given(grids())
def test_the_windows_are_counted_without_making_them(grid: tuple[int, int, int]) -> None:
    assert window_count(*grid) == len(list(windows(*grid)))


@given(grids())
def test_a_token_of_a_later_window_has_all_the_past_that_the_stride_promises(grid: tuple[int, int, int]) -> None:
    later = list(windows(*grid))[1:]
    assert all(w.score_start - w.feed_start >= grid[1] - grid[2] + 1 for w in later)


def test_windows_over_a_long_text_are_made_one_at_a_time() -> None:
    assert next(windows(10**12, 4, 1)).feed_stop == 4


@pytest.mark.parametrize(("max_tokens", "stride"), [(4, 0), (4, 5), (0, 0)])
def test_a_grid_that_would_not_move_on_is_a_bug_of_the_caller(max_tokens: int, stride: int) -> None:
    with pytest.raises(AssertionError):
        list(windows(10, max_tokens, stride))
