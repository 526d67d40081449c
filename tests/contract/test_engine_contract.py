"""The waist: what every engine must give to whoever calls `forward`, whatever it computes and however it shares."""

from __future__ import annotations

import numpy as np
import pytest

from dualtrace.arrays import IntArray
from dualtrace.engine import NOTHING, Batch, Engine, Read, Readout, Segment, int_array
from dualtrace.problems import Problem, Reason
from dualtrace.rows import Row, plain_row
from tests.support.answering import joined, wanted
from tests.support.contract import Subject, assert_close, random_ids, run_layout

COUNT = 40


def sequence(subject: Subject, count: int = COUNT, seed: int = 0) -> IntArray:
    return int_array(random_ids(subject.engine.card, count, seed))


def every_row(ids: IntArray, **fields: object) -> Row:
    rows = int_array(range(ids.size))
    targets = np.roll(ids, -1)  # each row's next token; the last row is asked for the first one
    return plain_row(ids, Read(rows, targets=targets, **fields))  # type: ignore[arg-type]


def run(engine: Engine, *rows: Row, share: bool = False) -> list[list[Readout]]:
    """Per row its readouts, in the order they were given."""
    found: list[list[Readout]] = [[] for _ in rows]
    for readout in run_layout(engine, rows, share=share, live=wanted):
        found[readout.segment].append(readout)
    return found


def logprobs(readouts: list[Readout]) -> list[float]:
    values: list[float] = joined(readout.logprobs for readout in readouts if readout.rows.size).tolist()
    return values


def family_tree(subject: Subject) -> list[Row]:
    """Rows with a long common beginning, and one that has nothing in common."""
    stem = sequence(subject, 32).tolist()
    tails = [sequence(subject, count, seed).tolist() for count, seed in ((1, 1), (5, 2), (9, 3))]
    return [every_row(int_array(stem + tail)) for tail in tails] + [every_row(sequence(subject, 12, 9))]


def test_covers_are_disjoint_and_ascend(subject: Subject) -> None:
    for readouts in run(subject.engine, *family_tree(subject), share=True):
        edges = [edge for readout in readouts for edge in (readout.start, readout.stop)]
        assert edges == sorted(edges)
        assert all(readout.start < readout.stop for readout in readouts)


def test_the_rows_read_are_just_those_that_were_asked(subject: Subject) -> None:
    asked = int_array([0, 3, 4, 17, 39])
    row = plain_row(sequence(subject), Read(asked, targets=asked))
    ((*readouts,),) = run(subject.engine, row)
    assert [int(r) for readout in readouts for r in readout.rows] == asked.tolist()


def test_a_row_read_lies_in_its_readouts_cover(subject: Subject) -> None:
    for readouts in run(subject.engine, *family_tree(subject), share=True):
        for readout in readouts:
            assert all(readout.start <= row < readout.stop for row in readout.rows.tolist())


def test_a_field_that_was_not_asked_is_none(subject: Subject) -> None:
    row = plain_row(sequence(subject), Read(int_array([5])))
    ((readout, *_),) = [[r for r in readouts if r.rows.size] for readouts in run(subject.engine, row)]
    columns = ("logprobs", "ranks", "ties", "top_ids", "top_logprobs", "extra_logprobs", "tail_logprobs")
    assert [name for name in (*columns, "rest_logprobs") if getattr(readout, name) is not None] == []


def test_a_field_that_was_asked_has_its_shape_and_type(subject: Subject) -> None:
    asked = Read(int_array([1, 30]), targets=int_array([4, 5]), top_k=3, extra_ids=int_array([7, 8]), tail=True)
    ((*readouts,),) = run(subject.engine, plain_row(sequence(subject), asked))
    for readout in (readout for readout in readouts if readout.rows.size):
        count = readout.rows.size
        shapes = {
            "logprobs": ((count,), np.float64), "ranks": ((count,), np.int32), "ties": ((count,), np.int32),
            "top_ids": ((count, 3), np.int32), "top_logprobs": ((count, 3), np.float64),
            "extra_logprobs": ((count, 2), np.float64), "tail_logprobs": ((count,), np.float64),
            "rest_logprobs": ((count,), np.float64),
        }  # fmt: skip
        found = {name: (getattr(readout, name).shape, getattr(readout, name).dtype.type) for name in shapes}
        assert found == shapes


def test_every_row_of_a_long_segment_is_answered_once_over_all_steps(subject: Subject) -> None:
    ((*readouts,),) = run(subject.engine, every_row(sequence(subject)))
    assert [int(row) for readout in readouts for row in readout.rows] == list(range(COUNT))


def test_an_engine_that_says_it_has_steps_takes_some(subject: Subject) -> None:
    ((*readouts,),) = run(subject.engine, every_row(sequence(subject)))
    assert (len(readouts) > 1) == subject.engine.card.capabilities.steps


def test_a_prefix_tree_gives_the_numbers_of_plain_rows(subject: Subject) -> None:
    rows = family_tree(subject)
    shared, plain = run(subject.engine, *rows, share=True), run(subject.engine, *rows)
    for one, two in zip(shared, plain, strict=True):
        assert_close(logprobs(one), logprobs(two), subject.tolerance)


def test_rows_beside_each_other_give_the_numbers_of_each_alone(subject: Subject) -> None:
    rows = family_tree(subject)
    for row, beside in zip(rows, run(subject.engine, *rows), strict=True):
        assert_close(logprobs(beside), logprobs(run(subject.engine, row)[0]), subject.tolerance)


def test_a_later_token_changes_no_earlier_row(subject: Subject) -> None:
    ids = sequence(subject)
    changed = ids.copy()
    changed[30:] = (changed[30:] + 1) % subject.engine.card.vocab_size
    one, two = every_row(ids), every_row(changed)
    before = [logprobs(readouts)[:29] for readouts in run(subject.engine, one, two)]
    assert_close(before[0], before[1], subject.tolerance)


def test_an_earlier_token_changes_a_later_row(subject: Subject) -> None:
    ids = sequence(subject)
    changed = ids.copy()
    changed[0] = (changed[0] + 1) % subject.engine.card.vocab_size
    one, two = run(subject.engine, every_row(ids), every_row(changed))
    assert logprobs(one)[20] != logprobs(two)[20]


def test_a_child_reads_rows_that_only_its_parent_has(subject: Subject) -> None:
    ids = sequence(subject, 20)
    positions = np.arange(20, dtype=np.int32)
    asked = Read(int_array([2, 19]), targets=int_array([1, 1]))
    batch = Batch((Segment(ids[:16], positions[:16]), Segment(ids[16:], positions[16:], parent=0)))
    steps = list(subject.engine.forward(batch, (NOTHING, asked), wanted))
    tree = [readout for step in steps for readout in step if readout.segment == 1]
    plain = run(subject.engine, plain_row(ids, asked))[0]
    assert_close(logprobs(tree), logprobs(plain), subject.tolerance)


def test_a_child_without_tokens_of_its_own_reads_its_parents_rows(subject: Subject) -> None:
    ids = sequence(subject, 20)
    asked = Read(int_array([19]), targets=int_array([1]))
    empty = Segment(int_array([]), int_array([]), parent=0)
    batch = Batch((Segment(ids, np.arange(20, dtype=np.int32)), empty))
    steps = list(subject.engine.forward(batch, (NOTHING, asked), wanted))
    tree = [readout for step in steps for readout in step if readout.segment == 1]
    assert_close(logprobs(tree), logprobs(run(subject.engine, plain_row(ids, asked))[0]), subject.tolerance)


def test_positions_are_taken_as_they_are_given(subject: Subject) -> None:
    ids = sequence(subject, 20)
    asked = Read(int_array([19]), targets=int_array([1]))
    stretched = Row(ids, np.arange(0, 40, 2, dtype=np.int32), asked)
    one, two = run(subject.engine, plain_row(ids, asked), stretched)
    blind = subject.name == "fake"  # no model stands behind its numbers: they know ids alone
    assert (logprobs(one) == logprobs(two)) == blind


def test_the_tokens_said_to_be_computed_are_at_most_those_of_the_rows_and_not_none(subject: Subject) -> None:
    rows = family_tree(subject)
    computed = sum(readout.computed_tokens for readouts in run(subject.engine, *rows) for readout in readouts)
    assert 0 < computed <= sum(row.length for row in rows)


def test_a_segment_that_nobody_wants_is_not_answered(subject: Subject) -> None:
    rows = family_tree(subject)
    batch = Batch(tuple(Segment(row.ids, row.positions) for row in rows))
    steps = subject.engine.forward(batch, tuple(row.read for row in rows), lambda segment: segment != 1)
    assert {readout.segment for step in steps for readout in step} == {0, 2, 3}


def test_a_segment_that_everybody_left_stops_before_its_end(subject: Subject) -> None:
    row = every_row(sequence(subject))
    batch = Batch((Segment(row.ids, row.positions),))
    seen: list[Readout] = []
    forward = subject.engine.forward(batch, (row.read,), lambda _segment: not seen)
    for step in forward:
        seen += step
    whole = not subject.engine.card.capabilities.steps
    assert (sum(readout.rows.size for readout in seen) == COUNT) == whole


def test_a_forward_that_is_left_in_the_middle_does_not_spoil_the_next_one(subject: Subject) -> None:
    row = every_row(sequence(subject))
    before = logprobs(run(subject.engine, row)[0])
    batch = Batch((Segment(row.ids, row.positions),))
    next(iter(subject.engine.forward(batch, (row.read,), wanted)))
    assert logprobs(run(subject.engine, row)[0]) == before


def test_two_forwards_may_be_interleaved(subject: Subject) -> None:
    one, two = every_row(sequence(subject)), every_row(sequence(subject, 25, seed=8))
    batches = [Batch((Segment(row.ids, row.positions),)) for row in (one, two)]
    forwards = [subject.engine.forward(b, (row.read,), wanted) for b, row in zip(batches, (one, two), strict=True)]
    found: list[list[Readout]] = [[], []]
    running = [0, 1]
    while running:
        for index in list(running):
            step = next(iter(forwards[index]), None)
            if step is None:
                running.remove(index)
            else:
                found[index] += step
    for row, readouts in zip((one, two), found, strict=True):
        assert_close(logprobs(readouts), logprobs(run(subject.engine, row)[0]), subject.tolerance)


def test_nothing_to_run_is_no_step(subject: Subject) -> None:
    assert list(subject.engine.forward(Batch(()), (), wanted)) == []


def test_ranks_and_ties_count_in_the_very_logits_of_the_top(subject: Subject) -> None:
    ids = sequence(subject, 12)
    width = subject.engine.card.vocab_size
    ((*readouts,),) = run(subject.engine, every_row(ids, top_k=width))
    for readout in (readout for readout in readouts if readout.rows.size):
        assert readout.top_ids is not None
        assert readout.top_logprobs is not None
        assert readout.ranks is not None
        assert readout.ties is not None
        for at, row in enumerate(readout.rows.tolist()):
            target = int(np.roll(ids, -1)[row])
            own = readout.top_logprobs[at][readout.top_ids[at] == target][0]
            assert readout.ranks[at] == 1 + int((readout.top_logprobs[at] > own).sum())
            assert readout.ties[at] == int((readout.top_logprobs[at] == own).sum()) - 1


def test_the_whole_distribution_sums_to_one(subject: Subject) -> None:
    width = subject.engine.card.vocab_size
    ((*readouts,),) = run(subject.engine, every_row(sequence(subject, 5), top_k=width))
    tops = np.concatenate([readout.top_logprobs for readout in readouts if readout.top_logprobs is not None])
    assert np.exp(tops).sum(axis=1) == pytest.approx(1.0, abs=subject.tolerance.abs_epsilon)


def test_an_id_outside_the_logits_is_refused_and_never_read(subject: Subject) -> None:
    read = Read(int_array([0]), extra_ids=int_array([subject.engine.card.vocab_size]))
    row = plain_row(sequence(subject, 3), read)
    with pytest.raises(Problem) as caught:
        run(subject.engine, row)
    assert caught.value.reason is Reason.TOKEN_OUT_OF_RANGE


def test_the_card_is_complete(subject: Subject) -> None:
    card = subject.engine.card
    assert min(card.vocab_size, card.max_positions, card.layers, card.query_heads, card.kv_heads, card.hidden_size) > 0
    assert card.provenance.weights_digest.startswith("sha256:")
    assert card.provenance.framework == subject.name
