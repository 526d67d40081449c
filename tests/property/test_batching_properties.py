"""What holds for every set of rows: nothing is lost, nothing is changed, and every token is accounted for."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dualtrace.batching import BLOCK_TOKENS, UniqueTokens, common_prefix, fill, lay_out
from dualtrace.engine import NOTHING, Read, Readout, int_array
from dualtrace.rows import Row
from tests.support.answering import fake_engine, joined, run_rows

WIDTH = 40
ENGINE = fake_engine(vocab=WIDTH, step=7)
FEW = settings(max_examples=80)
STEMS = [list(range(n, n + 48)) for n in (0, 1)] + [[5] * 48]  # prefixes that the rows have in common


@st.composite
def rows(draw: st.DrawFn) -> Row:
    stem = draw(st.sampled_from(STEMS))[: draw(st.integers(0, 48))]
    own = draw(st.lists(st.integers(0, WIDTH - 1), min_size=0 if stem else 1, max_size=5))
    ids = int_array([token % WIDTH for token in [*stem, *own]])
    start = draw(st.sampled_from([0, 0, 0, 3]))
    positions = np.arange(start, start + ids.size, dtype=np.int32)
    if draw(st.integers(0, 9)) == 0:
        positions[ids.size // 2 :] += 2
    read = sorted(draw(st.sets(st.integers(0, ids.size - 1), min_size=1, max_size=6)))
    return Row(ids, positions, Read(int_array(read), targets=ids[read], top_k=2, tail=True))


MANY = st.lists(rows(), max_size=8)


@FEW
@given(MANY)
def test_every_row_comes_back_from_its_segment_with_its_ids_positions_and_read(given_rows: list[Row]) -> None:
    layout = lay_out(given_rows, share=True)
    found = []
    for place, index in enumerate(layout.row_of_segment):
        if index is None:
            assert layout.reads[place] is NOTHING
            continue
        ids, positions = layout.batch.expand(place)
        assert np.array_equal(ids, given_rows[index].ids)
        assert np.array_equal(positions, given_rows[index].positions)
        assert layout.reads[place] is given_rows[index].read
        found.append(index)
    assert sorted(found) == list(range(len(given_rows)))


@FEW
@given(MANY)
def test_the_tokens_said_to_be_shared_are_just_those_that_the_batch_saves(given_rows: list[Row]) -> None:
    layout = lay_out(given_rows, share=True)
    in_batch = sum(int(segment.ids.size) for segment in layout.batch.segments)
    assert sum(layout.shared_tokens) == sum(row.length for row in given_rows) - in_batch


@FEW
@given(MANY)
def test_a_batch_is_never_larger_than_its_rows_apart(given_rows: list[Row]) -> None:
    assert all(
        0 <= shared < row.length + 1
        for shared, row in zip(lay_out(given_rows, share=True).shared_tokens, given_rows, strict=True)
    )


@FEW
@given(MANY)
def test_parents_come_first_stand_at_depth_one_and_hold_a_block_at_least(given_rows: list[Row]) -> None:
    segments = lay_out(given_rows, share=True).batch.segments
    for index, segment in enumerate(segments):
        if segment.parent is not None:
            assert segment.parent < index
            assert segments[segment.parent].parent is None
            assert segments[segment.parent].ids.size >= BLOCK_TOKENS


@FEW
@given(MANY, st.booleans(), st.booleans())
def test_without_sharing_every_row_is_one_segment_in_order(
    given_rows: list[Row], share: bool, deterministic: bool
) -> None:
    if share and not deterministic:
        return
    layout = lay_out(given_rows, share=share, deterministic=deterministic)
    assert sorted(layout.row_of_segment, key=str) == sorted(range(len(given_rows)), key=str)
    assert all(segment.parent is None for segment in layout.batch.segments)
    assert layout.shared_tokens == (0,) * len(given_rows)


@FEW
@given(MANY)
def test_the_fake_engine_answers_the_same_with_sharing_on_and_off(given_rows: list[Row]) -> None:
    shared, plain = by_row(run_rows(ENGINE, given_rows)), by_row(run_rows(ENGINE, given_rows, share=False))
    assert shared.keys() == plain.keys() == set(range(len(given_rows)))
    for index in shared:
        for column in ("logprobs", "tail_logprobs", "top_logprobs"):
            one = joined(getattr(readout, column) for readout in shared[index])
            two = joined(getattr(readout, column) for readout in plain[index])
            assert np.array_equal(one, two)


def by_row(given_readouts: list[tuple[int, Readout]]) -> dict[int, list[Readout]]:
    found: dict[int, list[Readout]] = {}
    for index, readout in given_readouts:
        found.setdefault(index, []).append(readout)
    return found


@FEW
@given(MANY)
def test_the_engine_runs_just_the_tokens_of_the_batch(given_rows: list[Row]) -> None:
    layout = lay_out(given_rows, share=True)
    steps = ENGINE.forward(layout.batch, layout.reads, lambda _segment: True)
    computed = sum(readout.computed_tokens for step in steps for readout in step)
    assert computed == sum(row.length for row in given_rows) - sum(layout.shared_tokens)


@FEW
@given(MANY, st.integers(1, 200), st.booleans())
def test_a_filled_batch_keeps_its_budget_and_takes_one_row_at_least(
    given_rows: list[Row], budget: int, share: bool
) -> None:
    taken = fill(given_rows, budget, share=share)
    assert taken >= min(1, len(given_rows))
    unique = unique_tokens(given_rows[:taken], share)
    assert taken <= 1 or unique <= budget
    if taken < len(given_rows):
        assert unique_tokens(given_rows[: taken + 1], share) > budget


def unique_tokens(given_rows: list[Row], share: bool) -> int:
    """By the definition: what each row has beyond the longest run of whole blocks that an earlier row began with."""
    total = 0
    for index, row in enumerate(given_rows):
        known = 0
        for other in given_rows[:index] if share else []:
            for end in range(BLOCK_TOKENS, min(row.length, other.length) + 1, BLOCK_TOKENS):
                equal = np.array_equal(row.ids[:end], other.ids[:end])
                if equal and np.array_equal(row.positions[:end], other.positions[:end]):
                    known = max(known, end)
        total += row.length - known
    return total


@FEW
@given(MANY, st.booleans())
def test_counting_one_by_one_is_counting_at_once(given_rows: list[Row], share: bool) -> None:
    unique = UniqueTokens(share)
    for row in given_rows:
        before, cost = unique.total, unique.cost(row)
        unique.add(row)
        assert unique.total == before + cost
    assert unique.total == unique_tokens(given_rows, share)


@FEW
@given(MANY)
def test_no_other_cut_of_the_ordered_rows_into_runs_saves_more(given_rows: list[Row]) -> None:
    order = sorted(range(len(given_rows)), key=lambda i: (given_rows[i].ids.tolist(), i))

    def most(start: int) -> int:
        """By trying every cut."""
        best = 0
        for end in range(start + 1, len(order) + 1):
            run = [given_rows[i] for i in order[start:end]]
            prefix = min((common_prefix(a, b) for a, b in itertools.pairwise(run)), default=0)
            best = max(best, (len(run) - 1) * (prefix if prefix >= BLOCK_TOKENS else 0) + most(end))
        return best

    assert sum(lay_out(given_rows, share=True).shared_tokens) >= most(0)
