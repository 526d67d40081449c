"""Packed scoring: the positions and masks of both delimiter conventions, held to the words of semantics.md."""

from __future__ import annotations

from itertools import pairwise

import pytest

from dualtrace.masks import packing
from dualtrace.masks.packing import Convention
from dualtrace.masks.plan import MaskPlan, compile_mask
from dualtrace.masks.resolve import Geometry, MaskContext, resolve
from dualtrace.problems import Problem, Reason

HIDDEN, VISIBLE = Convention.MIS_HIDDEN_DELIMITER, Convention.MIS_VISIBLE_DELIMITER
PACKS = [((7, 9, 11, 13), 14), ((4, 7, 10), 13), ((1, 2, 3, 6), 7), ((5,), 6), ((2,), 5)]


def plan(delimiters: tuple[int, ...], length: int, convention: Convention) -> MaskPlan:
    spec = packing.mask(delimiters, length, convention)
    positions = packing.positions(delimiters, length, convention)
    return compile_mask(resolve(spec, MaskContext(length, Geometry(1, 1), positions=positions)))


def distance(delimiters: tuple[int, ...], q: int) -> int:
    return q - max(d for d in delimiters if d <= q)


def test_the_first_check_vector_of_the_contract() -> None:
    assert packing.positions([7, 9, 11, 13], 14, HIDDEN).tolist() == [*range(7), 6, 7, 6, 7, 6, 7, 6]


def test_the_second_check_vector_of_the_contract() -> None:
    assert packing.positions([4, 7, 10], 13, HIDDEN).tolist() == [*range(4), 3, 4, 5, 3, 4, 5, 3, 4, 5]


def test_a_visible_delimiter_stands_right_after_the_query() -> None:
    assert packing.positions([4, 7, 10], 13, VISIBLE).tolist() == [*range(4), 4, 5, 6, 4, 5, 6, 4, 5, 6]


@pytest.mark.parametrize(("delimiters", "length"), PACKS)
@pytest.mark.parametrize("convention", Convention)
def test_every_row_sees_what_the_convention_says(
    delimiters: tuple[int, ...], length: int, convention: Convention
) -> None:
    seen = plan(delimiters, length, convention).block(0, 0, length)[0]
    prefix = delimiters[0]
    for q in range(length):
        if q < prefix:
            wanted = [k <= q for k in range(length)]
        elif convention is HIDDEN:
            wanted = [k <= q and (k < prefix or k > q - distance(delimiters, q)) for k in range(length)]
        else:
            wanted = [k <= q and (k < prefix or k >= q - distance(delimiters, q)) for k in range(length)]
        assert seen[q].tolist() == wanted


@pytest.mark.parametrize("convention", Convention)
def test_each_items_rows_have_the_positions_they_would_have_alone(convention: Convention) -> None:
    delimiters, length = (4, 7, 10), 13
    positions = packing.positions(delimiters, length, convention)
    packed = plan(delimiters, length, convention)
    for start, end in pairwise([*delimiters, length]):
        for q in range(start + 1, end):
            seen = [positions[k] for a, b in packed.row_runs(0, 0, q) for k in range(a, b)]
            assert seen == list(range(positions[q] + 1))


def test_delimiters_stand_where_the_lengths_put_them() -> None:
    assert packing.delimiter_indices(4, [2, 0, 3]) == (4, 7, 8, 12)


def test_a_hidden_item_is_read_at_its_last_token_and_an_empty_one_at_the_query() -> None:
    assert packing.read_rows((4, 7, 8, 12), 13, HIDDEN) == (6, 3, 11)


def test_a_visible_empty_item_is_read_at_its_own_delimiter() -> None:
    assert packing.read_rows((4, 7, 8, 12), 13, VISIBLE) == (6, 7, 11)


def test_an_open_last_item_is_read_at_the_end() -> None:
    assert packing.read_rows((4, 7, 10), 13, HIDDEN) == (6, 9, 12)


@pytest.mark.parametrize(
    ("delimiters", "length", "reason"),
    [
        ((0, 3), 4, Reason.EMPTY_PROMPT),
        ((), 4, Reason.EMPTY),
        ((3, 3), 4, Reason.DUPLICATE),
        ((3, 2), 4, Reason.MALFORMED),
        ((3, 4), 4, Reason.OUT_OF_RANGE),
        ((-1,), 4, Reason.OUT_OF_RANGE),
    ],
)
def test_delimiters_that_cannot_be_are_refused(delimiters: tuple[int, ...], length: int, reason: Reason) -> None:
    with pytest.raises(Problem) as caught:
        packing.positions(delimiters, length, HIDDEN)
    assert caught.value.reason is reason


def test_a_visible_delimiter_needs_no_query() -> None:
    assert packing.positions((0, 2), 4, VISIBLE).tolist() == [0, 1, 0, 1]
