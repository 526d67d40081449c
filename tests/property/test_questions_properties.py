"""What holds for every interleaving of readouts, every split, every flush, and for every batch of questions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dualtrace.engine import Readout
from dualtrace.questions.answers import ItemDone, ItemProblem, NextTokens
from dualtrace.questions.asked import Input, NextTokenQuestion, RollingQuestion, ScoreQuestion, Variant
from dualtrace.questions.rolling import plan_rolling
from dualtrace.questions.token_plan import TokenPlan
from dualtrace.questions.token_stream import TokenStream
from dualtrace.tokens import Prefix
from tests.support.answering import (
    answer_next,
    answer_score,
    answer_tokens,
    ask_logprob,
    cut_readout,
    fake_context,
    fake_engine,
    gather,
    ids,
    run_rows,
)

FEW = settings(max_examples=60)
WIDTH = 64
CONTEXT = fake_context(vocab_size=WIDTH, tokenizer=False)
ENGINE = fake_engine(vocab=WIDTH, step=5)
ID = st.integers(0, WIDTH - 1)
IDS = st.lists(ID, min_size=1, max_size=30).map(lambda values: ids(*values))


@st.composite
def rolling_questions(draw: st.DrawFn) -> RollingQuestion:
    max_tokens = draw(st.integers(1, 12))
    return RollingQuestion(
        inputs=tuple(draw(st.lists(st.lists(ID, max_size=30).map(lambda v: ids(*v)), min_size=1, max_size=4))),
        prefix=Prefix(token_id=draw(st.none() | ID)),
        max_tokens=max_tokens,
        stride=draw(st.integers(1, max_tokens)),
        top_k=draw(st.integers(0, 3)),
        variants=(Variant(),) * draw(st.integers(1, 2)),
    )


@st.composite
def interleavings(draw: st.DrawFn) -> tuple[TokenPlan, list[tuple[int, Readout]]]:
    """A plan and its readouts cut anywhere, rows in any order among each other."""
    made = plan_rolling(draw(rolling_questions()), CONTEXT)
    queues: dict[int, list[Readout]] = {}
    for row, readout in run_rows(ENGINE, [planned.row for planned in made.rows]):
        size = int(readout.rows.size)
        cut = draw(st.integers(0, size))
        parts = [cut_readout(readout, a, b) for a, b in ((0, cut), (cut, size)) if a < b]
        queues.setdefault(row, []).extend(parts)
    given = []
    while queues:
        row = draw(st.sampled_from(sorted(queues)))
        given.append((row, queues[row].pop(0)))
        if not queues[row]:
            del queues[row]
    return made, given


def play(
    made: TokenPlan, given: list[tuple[int, Readout]], chunk_tokens: int, flushes: frozenset[int] = frozenset()
) -> list[Any]:
    stream = TokenStream(made, chunk_tokens)
    events: list[Any] = stream.opening()
    for number, (row, readout) in enumerate(given):
        events += stream.push(row, readout)
        if number in flushes:
            events += stream.flush()
    return events + stream.flush()


@FEW
@given(interleavings(), st.integers(1, 9), st.frozensets(st.integers(0, 40)))
def test_any_interleaving_gives_the_same_tokens_and_totals_bit_for_bit(
    played: tuple[TokenPlan, list[tuple[int, Readout]]], chunk_tokens: int, flushes: frozenset[int]
) -> None:
    made, given_readouts = played
    in_order = sorted(given_readouts, key=lambda pair: pair[0])
    one, two = gather(play(made, given_readouts, chunk_tokens, flushes)), gather(play(made, in_order, 1000))
    assert one.keys() == two.keys()
    for key, scored in one.items():
        assert (scored.ids, scored.logprobs, scored.ranks, scored.top_ids) == (
            two[key].ids, two[key].logprobs, two[key].ranks, two[key].top_ids,
        )  # fmt: skip
        assert scored.done == two[key].done


@FEW
@given(interleavings(), st.integers(1, 9), st.frozensets(st.integers(0, 40)))
def test_no_chunk_is_larger_than_asked_and_none_is_empty(
    played: tuple[TokenPlan, list[tuple[int, Readout]]], chunk_tokens: int, flushes: frozenset[int]
) -> None:
    sizes = [size for scored in gather(play(*played, chunk_tokens, flushes)).values() for size in scored.chunk_sizes]
    assert all(1 <= size <= chunk_tokens for size in sizes)


@FEW
@given(interleavings(), st.data())
def test_after_bad_numbers_nothing_more_is_said_of_that_item(
    played: tuple[TokenPlan, list[tuple[int, Readout]]], data: st.DataObject
) -> None:
    made, given_readouts = played
    if not given_readouts:
        return
    spoilt = data.draw(st.integers(0, len(given_readouts) - 1))
    row, readout = given_readouts[spoilt]
    given_readouts[spoilt] = (row, _spoil(readout))
    events = play(made, given_readouts, 3)
    key = (made.rows[row].item, made.rows[row].variant)
    about = [event for event in events if (getattr(event, "item", None), getattr(event, "variant", None)) == key]
    assert isinstance(about[-1], ItemProblem)
    assert not any(isinstance(event, ItemDone) for event in about)


def _spoil(readout: Readout) -> Readout:
    return replace(readout, bad_rows=(int(readout.rows[0]),))


@FEW
@given(interleavings())
def test_every_item_and_variant_ends_exactly_once(played: tuple[TokenPlan, list[tuple[int, Readout]]]) -> None:
    made, given_readouts = played
    ends = [(e.item, e.variant) for e in play(made, given_readouts, 4) if isinstance(e, ItemDone | ItemProblem)]
    assert sorted(ends) == [(i, v) for i in range(len(made.items)) for v in range(made.variants)]


@FEW
@given(rolling_questions())
def test_sharing_changes_no_number(question: RollingQuestion) -> None:
    shared = answer_tokens(question, CONTEXT, ENGINE, share=True)
    plain = answer_tokens(question, CONTEXT, ENGINE, share=False)
    assert {key: scored.logprobs for key, scored in shared.items()} == {k: s.logprobs for k, s in plain.items()}


@FEW
@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=4), st.integers(0, 3))
def test_a_batch_of_completions_equals_each_alone(pairs: list[tuple[Input, Input]], top_k: int) -> None:
    together = answer_tokens(ask_logprob(*pairs, top_k=top_k), CONTEXT, ENGINE)
    for index, pair in enumerate(pairs):
        alone = answer_tokens(ask_logprob(pair, top_k=top_k), CONTEXT, ENGINE)[0, 0]
        assert (together[index, 0].logprobs, together[index, 0].top_ids) == (alone.logprobs, alone.top_ids)


@FEW
@given(IDS, IDS, IDS)
def test_a_completion_in_two_parts_scores_as_one(prompt: Input, first: Input, second: Input) -> None:
    assert prompt.ids is not None
    assert first.ids is not None
    assert second.ids is not None
    whole = ids(*first.ids.tolist(), *second.ids.tolist())
    longer = ids(*prompt.ids.tolist(), *first.ids.tolist())
    parts = answer_tokens(ask_logprob((prompt, first), (longer, second)), CONTEXT, ENGINE)
    scored = answer_tokens(ask_logprob((prompt, whole)), CONTEXT, ENGINE)[0, 0]
    assert scored.logprobs == parts[0, 0].logprobs + parts[1, 0].logprobs


@FEW
@given(st.lists(IDS, min_size=1, max_size=4), st.integers(0, WIDTH), st.sets(ID, max_size=4))
def test_listed_and_tail_mass_always_sum_to_one(prompts: list[Input], top_k: int, extra: set[int]) -> None:
    question = NextTokenQuestion(tuple(prompts), top_k=top_k, extra_token_ids=tuple(extra))
    for result in answer_next(question, CONTEXT, ENGINE):
        outcome = result.outcome
        assert isinstance(outcome, NextTokens)
        listed = float(np.exp(outcome.top_logprobs).sum())
        assert math.isclose(listed + _mass(outcome.tail.logprob), 1.0, abs_tol=1e-12)
        if outcome.tail_beyond_extra is not None:
            top = set(outcome.top_ids.tolist())
            own = zip(extra, outcome.extra_logprobs.tolist(), strict=True)
            listed += sum(math.exp(value) for token_id, value in own if token_id not in top)
            assert math.isclose(listed + _mass(outcome.tail_beyond_extra.logprob), 1.0, abs_tol=1e-12)


def _mass(logprob: float | None) -> float:
    return 0.0 if logprob is None else math.exp(logprob)


@FEW
@given(IDS, st.lists(IDS, min_size=1, max_size=4), st.sets(ID, min_size=1, max_size=5), st.floats(1e-300, 1e300))
def test_softmax_scores_always_sum_to_one(
    query: Input, items: list[Input], labels: set[int], temperature: float
) -> None:
    question = ScoreQuestion(query, tuple(items), labels=tuple(labels), apply_softmax=True, temperature=temperature)
    for result in answer_score(question, CONTEXT, ENGINE):
        assert math.isclose(sum(result.scores), 1.0, abs_tol=1e-12)
        best = max(range(len(labels)), key=lambda i: result.label_logprobs[i])
        assert result.scores[best] == max(result.scores)


@FEW
@given(IDS, st.lists(IDS, min_size=1, max_size=4), st.sets(ID, min_size=1, max_size=5))
def test_query_first_and_item_first_are_the_same_question_with_sides_exchanged(
    query: Input, items: list[Input], labels: set[int]
) -> None:
    first = ScoreQuestion(query, (items[0],), labels=tuple(labels))
    last = ScoreQuestion(items[0], (query,), labels=tuple(labels), item_first=True)
    assert [r.scores for r in answer_score(first, CONTEXT, ENGINE)] == [
        r.scores for r in answer_score(last, CONTEXT, ENGINE)
    ]
