"""TokenStream: readouts in, events out, by hand. What holds for every interleaving stands in tests/property."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dualtrace.engine import Readout
from dualtrace.problems import Exhausted, Reason
from dualtrace.questions.answers import ItemDone, ItemProblem, TokenChunk
from dualtrace.questions.asked import RollingQuestion, Variant
from dualtrace.questions.rolling import plan_rolling
from dualtrace.questions.token_plan import TokenPlan
from dualtrace.questions.token_stream import CHUNK_ENTRIES, TokenStream
from tests.support.answering import cut_readout, fake_context, fake_engine, gather, ids, run_rows


def rolled(*counts: int, **fields: Any) -> TokenPlan:
    return plan_rolling(RollingQuestion(tuple(ids(*range(n)) for n in counts), **fields), fake_context())


def readouts(made: TokenPlan, **spec: Any) -> list[tuple[int, Readout]]:
    return run_rows(fake_engine(**spec), [row.row for row in made.rows], share=False)


def chunk_sizes(events: list[Any]) -> list[int]:
    return [len(event.tokens) for event in events if isinstance(event, TokenChunk)]


def test_a_full_chunk_leaves_at_once_and_the_rest_waits() -> None:
    made = rolled(100)
    stream = TokenStream(made, 16)
    ((row, whole),) = readouts(made)
    assert chunk_sizes(stream.push(row, cut_readout(whole, 0, 40))) == [16, 16]
    assert stream.has_pending


def test_the_rest_leaves_with_the_end_of_the_item() -> None:
    made = rolled(100)
    events = TokenStream(made, 64).push(*readouts(made)[0])
    assert chunk_sizes(events) == [64, 35]
    assert isinstance(events[-1], ItemDone)


def test_a_flush_sends_what_waits_and_only_once() -> None:
    made = rolled(100)
    stream = TokenStream(made, 64)
    stream.push(0, cut_readout(readouts(made)[0][1], 0, 10))
    assert chunk_sizes(stream.flush()) == [10]
    assert stream.flush() == []
    assert not stream.has_pending


def test_a_window_that_ends_before_its_turn_waits_for_it() -> None:
    made = rolled(20, max_tokens=8)
    (first, second, third) = readouts(made)
    stream = TokenStream(made, 4)
    assert stream.push(*third) == []
    assert stream.push(*second) == []
    assert sum(chunk_sizes(stream.push(*first))) == 19


def test_chunks_shrink_when_the_top_is_large() -> None:
    made = rolled(100, top_k=100)
    stream = TokenStream(replace(made, top_k=CHUNK_ENTRIES // 10), 64)
    assert max(chunk_sizes(stream.push(*readouts(made)[0]))) == 10


def test_a_chunk_holds_a_token_at_least() -> None:
    made = rolled(5)
    assert chunk_sizes(TokenStream(made, 0).push(*readouts(made)[0])) == [1, 1, 1, 1]


def test_bad_numbers_end_the_item_and_nothing_comes_after() -> None:
    made = rolled(300)
    stream = TokenStream(made, 64)
    given = readouts(made, step=100, nan_at=150)
    events = [event for row, readout in given for event in stream.push(row, readout)] + stream.flush()
    problem = events[-1]
    assert isinstance(problem, ItemProblem)
    assert problem.problem.reason is Reason.NON_FINITE_LOGITS
    assert (stream.done, stream.failed) == (0, 1)


def test_bad_numbers_in_a_window_whose_turn_has_not_come_end_the_item_too() -> None:
    made = rolled(20, max_tokens=8)
    (first, second, third) = readouts(made)
    stream = TokenStream(made, 4)
    bad = replace(third[1], bad_rows=(7,))
    assert [type(event) for event in stream.push(third[0], bad)] == [ItemProblem]
    assert stream.push(*first) + stream.push(*second) + stream.flush() == []


def test_bad_numbers_name_the_row_and_the_token() -> None:
    made = rolled(20, max_tokens=8)
    (_first, second, _third) = readouts(made)
    (event,) = TokenStream(made, 4).push(second[0], replace(second[1], bad_rows=(2,)))
    assert isinstance(event, ItemProblem)
    feed_start = 8  # the second window feeds tokens 8-15
    assert f"row 2, which predicts token {feed_start + 3}" in event.problem.detail.message


def test_a_problem_is_placed_at_its_item_and_ends_it_once() -> None:
    made = rolled(5, 5)
    stream = TokenStream(made, 64)
    problem = Exhausted(Reason.OUT_OF_MEMORY, "too much")
    (event,) = stream.fail(1, problem)
    assert isinstance(event, ItemProblem)
    assert (event.item, event.problem.detail.item) == (1, 1)
    assert stream.fail(1, problem) == []


def test_one_variant_may_fail_while_the_other_goes_on() -> None:
    made = rolled(5, variants=(Variant(), Variant()))
    stream = TokenStream(made, 64)
    stream.fail(0, Exhausted(Reason.OUT_OF_MEMORY, "too much"))
    gathered = gather(stream.push(*readouts(made)[1]))
    assert list(gathered) == [(0, 1)]
    assert (stream.done, stream.failed) == (1, 1)


def test_items_with_nothing_to_score_are_done_before_any_forward() -> None:
    stream = TokenStream(rolled(0, 1, 5), 64)
    assert [(e.item, type(e)) for e in stream.opening() if isinstance(e, ItemDone)] == [(0, ItemDone), (1, ItemDone)]
    assert stream.done == 2


def test_a_gap_starts_a_new_chunk() -> None:
    made = rolled(10)
    whole = readouts(made)[0][1]
    keep = np.array([0, 1, 2, 5, 6, 8])
    assert whole.logprobs is not None
    assert whole.ranks is not None
    assert whole.ties is not None
    gapped = replace(
        whole, rows=whole.rows[keep], logprobs=whole.logprobs[keep], ranks=whole.ranks[keep], ties=whole.ties[keep]
    )
    stream = TokenStream(made, 64)
    events = stream.push(0, gapped) + stream.flush()
    chunks = [(event.first_index, len(event.tokens)) for event in events if isinstance(event, TokenChunk)]
    assert chunks == [(1, 3), (6, 2), (9, 1)]


def test_every_column_of_a_chunk_has_its_length() -> None:
    made = rolled(50, top_k=3)
    for event in TokenStream(made, 16).push(*readouts(made)[0]):
        if isinstance(event, TokenChunk):
            assert event.top_ids is not None
            assert event.top_logprobs is not None
            columns = (event.logprobs, event.ranks, event.ties, event.top_ids, event.top_logprobs)
            assert {len(column) for column in columns} == {len(event.tokens)}


@pytest.mark.parametrize("top_k", [0, 2])
def test_the_header_says_which_columns_come(top_k: int) -> None:
    made = rolled(5, top_k=top_k)
    header = TokenStream(made, 16).header(fake_engine().card.provenance, streams=True)
    assert (header.top_k, header.variants, header.has_pieces, header.has_offsets) == (top_k, 1, True, False)
