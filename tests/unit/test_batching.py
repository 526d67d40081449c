"""Which rows make a batch and which prefixes become one, on rows small enough to see. The rest is in tests/property."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dualtrace.batching import BLOCK_TOKENS, Layout, UniqueTokens, common_prefix, fill, lay_out
from dualtrace.engine import NOTHING, Read, int_array
from dualtrace.rows import Row, plain_row
from dualtrace.views import BASE, Face, View

QUERY = tuple(range(100, 140))  # forty tokens, two blocks and a half


def row(*token_ids: int) -> Row:
    return plain_row(int_array(token_ids), Read(int_array([len(token_ids) - 1])))


def parents(layout: Layout) -> list[int | None]:
    return [segment.parent for segment in layout.batch.segments]


def lengths(layout: Layout) -> list[int]:
    return [int(segment.ids.size) for segment in layout.batch.segments]


def test_rows_with_a_common_prefix_get_a_common_parent() -> None:
    layout = lay_out([row(*QUERY, 1), row(*QUERY, 2, 3)], share=True)
    assert (lengths(layout), parents(layout)) == ([40, 1, 2], [None, 0, 0])


def test_a_parent_is_read_by_nobody() -> None:
    layout = lay_out([row(*QUERY, 1), row(*QUERY, 2)], share=True)
    assert layout.reads[0] is NOTHING
    assert layout.row_of_segment[0] is None


def test_the_way_back_leads_to_the_rows_as_they_were_given() -> None:
    rows = [row(*QUERY, 9), row(1, 2, 3), row(*QUERY, 4)]
    layout = lay_out(rows, share=True)
    found = {
        index: layout.batch.expand(place)[0].tolist()
        for place, index in enumerate(layout.row_of_segment)
        if index is not None
    }
    assert found == {index: given.ids.tolist() for index, given in enumerate(rows)}


def test_reads_go_with_their_rows_unchanged() -> None:
    rows = [row(*QUERY, 9), row(1, 2, 3), row(*QUERY, 4)]
    layout = lay_out(rows, share=True)
    for place, index in enumerate(layout.row_of_segment):
        if index is not None:
            assert layout.reads[place] is rows[index].read


def test_a_short_prefix_is_not_worth_a_parent() -> None:
    common = QUERY[: BLOCK_TOKENS - 1]
    assert parents(lay_out([row(*common, 1), row(*common, 2)], share=True)) == [None, None]


def test_a_prefix_of_one_block_is() -> None:
    common = QUERY[:BLOCK_TOKENS]
    assert parents(lay_out([row(*common, 1), row(*common, 2)], share=True)) == [None, 0, 0]


def test_sharing_can_be_switched_off() -> None:
    assert parents(lay_out([row(*QUERY, 1), row(*QUERY, 2)], share=False)) == [None, None]


def test_a_deterministic_batch_never_shares() -> None:
    layout = lay_out([row(*QUERY, 1), row(*QUERY, 2)], share=True, deterministic=True)
    assert parents(layout) == [None, None]
    assert layout.batch.deterministic


def test_equal_ids_at_other_positions_are_not_shared() -> None:
    one = row(*QUERY, 1)
    moved = Row(one.ids, one.positions + np.int32(1), one.read)
    assert parents(lay_out([one, moved], share=True)) == [None, None]


def test_positions_that_part_end_the_prefix() -> None:
    one = row(*QUERY, 1, 2)
    positions = one.positions.copy()
    positions[20:] += 5
    assert common_prefix(one, Row(one.ids, positions, one.read)) == 20


def test_equal_rows_are_computed_once() -> None:
    layout = lay_out([row(*QUERY)] * 3, share=True)
    assert lengths(layout) == [40, 0, 0, 0]


def test_a_row_that_is_another_ones_prefix_has_no_tokens_of_its_own() -> None:
    layout = lay_out([row(*QUERY), row(*QUERY, 1)], share=True)
    assert lengths(layout) == [40, 0, 1]


def test_the_first_of_a_group_pays_for_the_prefix() -> None:
    layout = lay_out([row(*QUERY, 1), row(*QUERY, 2), row(*QUERY, 3)], share=True)
    assert sorted(layout.shared_tokens) == [0, 40, 40]


def test_views_that_are_asked_in_turn_share_each_among_themselves() -> None:
    tuned = View(Face.FINETUNED, "adapter")
    rows = [replace(row(*QUERY, item), view=view) for item in range(3) for view in (BASE, tuned)]
    assert sorted(lengths(lay_out(rows, share=True))) == [1] * 6 + [40] * 2


def test_a_row_that_is_measured_comes_after_the_one_it_is_measured_against() -> None:
    base = row(*QUERY, 9)
    measured = replace(row(*QUERY, 9), view=View(Face.FINETUNED, "adapter"), against=base)
    for rows in ([measured, base], [measured], [base, measured]):
        layout = lay_out(rows, share=True)
        place = layout.row_of_segment.index(rows.index(measured))
        against = layout.reads[place].against
        assert against is not None
        assert against < place
        assert layout.batch.expand(against)[0].tolist() == base.ids.tolist()


def test_two_queries_make_two_parents() -> None:
    other = tuple(range(200, 230))
    rows = [row(*QUERY, 1), row(*other, 1), row(*QUERY, 2), row(*other, 2)]
    assert sorted(lengths(lay_out(rows, share=True))) == [1, 1, 1, 1, 30, 40]


def test_a_longer_prefix_of_few_is_not_given_up_for_a_shorter_one_of_one_more() -> None:
    long = tuple(range(300, 500))
    rows = [row(*long, 1), row(*long, 2), row(*long[:20], 7)]
    assert sorted(lengths(lay_out(rows, share=True))) == [1, 1, 21, 200]


def test_an_empty_batch_is_empty() -> None:
    layout = lay_out([], share=True)
    assert (layout.batch.segments, layout.reads, layout.shared_tokens) == ((), (), ())


@pytest.mark.parametrize("share", [True, False])
def test_the_first_row_is_taken_however_long_it_is(share: bool) -> None:
    assert fill([row(*range(100)), row(1)], 10, share=share) == 1


def test_rows_are_taken_up_to_the_budget_and_not_beyond() -> None:
    assert fill([row(*range(4))] * 5, 12, share=False) == 3


def test_a_shared_prefix_is_counted_once_when_a_batch_is_filled() -> None:
    rows = [row(*QUERY[:32], i) for i in range(8)]
    assert fill(rows, 32 + 5, share=True) == 5
    assert fill(rows, 32 + 5, share=False) == 1


def test_no_rows_fill_nothing() -> None:
    assert fill([], 10, share=True) == 0


def test_rows_are_looked_at_no_further_than_the_budget_reaches() -> None:
    def endless() -> object:
        while True:
            yield row(1, 2, 3)

    assert fill(endless(), 9, share=False) == 3  # type: ignore[arg-type]


def test_the_cost_of_a_row_is_known_before_it_is_added() -> None:
    unique = UniqueTokens(share=True)
    unique.add(row(*QUERY))
    assert unique.cost(row(*QUERY, 1, 2)) == 42 - 32  # whole blocks are known
    assert unique.total == 40
