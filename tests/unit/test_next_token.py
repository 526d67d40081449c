"""NextTokenDist: the order of the top, the mass outside it, and prompts that stand beside each other."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dualtrace.problems import Exhausted, Problem, Reason
from dualtrace.questions.answers import NextTokenResult, NextTokens, Tail
from dualtrace.questions.asked import Input, NextTokenQuestion, Variant
from dualtrace.questions.next_token import plan_next_token, read_next_token
from dualtrace.questions.outcome import Outcome
from dualtrace.tokens import Prefix, PrefixKind
from tests.support.answering import (
    TOKENIZER,
    answer_next,
    answer_tokens,
    ask_logprob,
    collect,
    fake_context,
    fake_engine,
    ids,
    text,
)

WIDTH = TOKENIZER.size


def ask(*prompts: Input, **fields: object) -> NextTokenQuestion:
    return NextTokenQuestion(tuple(prompts), **fields)  # type: ignore[arg-type]


def answer(*prompts: Input, **fields: object) -> tuple[NextTokenResult, ...]:
    return answer_next(ask(*prompts, **fields), fake_context(), fake_engine())


def one(prompt: Input, **fields: object) -> NextTokens:
    outcome = answer(prompt, **fields)[0].outcome
    assert isinstance(outcome, NextTokens), outcome
    return outcome


def mass(tail: Tail | None) -> float:
    assert tail is not None
    assert tail.logprob is not None
    return math.exp(tail.logprob)


def test_the_top_descends() -> None:
    assert (np.diff(one(ids(1, 2), top_k=50).top_logprobs) <= 0).all()


def test_ties_stand_by_the_lower_id() -> None:
    engine = fake_engine(vocab=8)
    engine._logits[:] = np.array([1.0, 3.0, 1.0, 3.0, 2.0, 2.0, 3.0, 0.0])
    outcome = answer_next(ask(ids(1), top_k=7), fake_context(vocab_size=8), engine)[0].outcome
    assert isinstance(outcome, NextTokens)
    assert outcome.top_ids.tolist() == [1, 3, 6, 4, 5, 0, 2]


def test_top_and_tail_sum_to_one() -> None:
    outcome = one(ids(1, 2), top_k=10)
    assert np.exp(outcome.top_logprobs).sum() + mass(outcome.tail) == pytest.approx(1.0, abs=1e-14)


def test_nothing_listed_leaves_all_of_the_mass_outside() -> None:
    assert mass(one(ids(1)).tail) == pytest.approx(1.0, abs=1e-14)


def test_the_tail_is_never_above_zero() -> None:
    tails = [one(ids(i)).tail.logprob for i in range(30)]
    assert all(value is not None and value <= 0.0 for value in tails)


def test_the_whole_vocabulary_leaves_no_tail() -> None:
    assert one(ids(1), top_k=WIDTH).tail == Tail("FULL_COVERAGE")


def test_a_tail_that_float32_cannot_hold_is_said_to_underflow() -> None:
    engine = fake_engine(vocab=4)
    engine._logits[:] = np.array([100.0, 0.0, 0.0, 0.0])
    outcome = answer_next(ask(ids(1), top_k=1), fake_context(vocab_size=4), engine)[0].outcome
    assert isinstance(outcome, NextTokens)
    assert outcome.tail == Tail("UNDERFLOW")


def test_extra_ids_are_read_in_the_order_asked_whatever_their_rank() -> None:
    everything = one(ids(1), top_k=WIDTH)
    by_id = dict(zip(everything.top_ids.tolist(), everything.top_logprobs.tolist(), strict=True))
    extra = one(ids(1), extra_token_ids=(200, 3, 77)).extra_logprobs.tolist()
    assert extra == [by_id[200], by_id[3], by_id[77]]


def test_without_extra_ids_no_mass_beyond_them_is_given() -> None:
    assert one(ids(1), top_k=3).tail_beyond_extra is None


def test_the_mass_beyond_extra_ids_is_outside_both_lists() -> None:
    plain = one(ids(1), top_k=5)
    best = int(plain.top_ids[0])
    other = next(i for i in range(WIDTH) if i not in plain.top_ids)
    outcome = one(ids(1), top_k=5, extra_token_ids=(best, other))
    outside = 1.0 - np.exp(outcome.top_logprobs).sum() - math.exp(outcome.extra_logprobs[1])
    assert mass(outcome.tail_beyond_extra) == pytest.approx(outside, abs=1e-13)


def test_extra_ids_do_not_change_the_tail_of_the_top() -> None:
    assert one(ids(1), top_k=5, extra_token_ids=(9, 10)).tail == one(ids(1), top_k=5).tail


def test_extra_ids_that_are_all_of_the_vocabulary_leave_nothing_beyond() -> None:
    assert one(ids(1), extra_token_ids=tuple(range(WIDTH))).tail_beyond_extra == Tail("FULL_COVERAGE")


def test_the_pieces_stand_beside_their_ids() -> None:
    outcome = one(ids(1), top_k=4)
    assert outcome.top_pieces == TOKENIZER.describe_ids(outcome.top_ids).pieces


def test_a_scorer_without_a_tokenizer_gives_no_pieces() -> None:
    outcome = answer_next(ask(ids(1), top_k=4), fake_context(tokenizer=False), fake_engine())[0].outcome
    assert isinstance(outcome, NextTokens)
    assert outcome.top_pieces == ()


def test_the_answer_names_the_logit_width() -> None:
    assert one(ids(1)).vocab_size == WIDTH


def test_the_logprob_of_the_next_token_is_that_of_logprob() -> None:
    extra = one(ids(4, 5, 6), extra_token_ids=(7,)).extra_logprobs[0]
    scored = answer_tokens(ask_logprob((ids(4, 5, 6), ids(7))), fake_context(), fake_engine())[0, 0]
    assert scored.logprobs == [extra]


def test_prompts_beside_each_other_equal_the_same_prompts_alone() -> None:
    prompts = [ids(*range(30), i) for i in range(5)] + [text("hello"), ids(1)]
    together = answer(*prompts, top_k=6, extra_token_ids=(3,))
    for index, prompt in enumerate(prompts):
        beside, alone = together[index].outcome, one(prompt, top_k=6, extra_token_ids=(3,))
        assert isinstance(beside, NextTokens)
        assert np.array_equal(beside.top_ids, alone.top_ids)
        assert np.array_equal(beside.top_logprobs, alone.top_logprobs)
        assert beside.tail == alone.tail


def test_results_stand_in_the_order_asked_variant_by_variant() -> None:
    results = answer(ids(1), ids(2), variants=(Variant(), Variant()))
    assert [(result.item, result.variant) for result in results] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_no_prompts_are_an_empty_success_without_a_forward() -> None:
    engine = fake_engine()
    assert answer_next(ask(top_k=5), fake_context(), engine) == ()
    assert engine.steps == 0


def test_one_bad_prompt_leaves_the_others_answered() -> None:
    kinds = [type(result.outcome) for result in answer(ids(1), ids(), ids(2))]
    assert kinds[0] is kinds[2] is NextTokens
    problem = answer(ids(1), ids(), ids(2))[1].outcome
    assert isinstance(problem, Problem)
    assert (problem.reason, problem.detail.item, problem.detail.field) == (Reason.EMPTY_PROMPT, 1, "prompts[1]")


def test_an_empty_prompt_behind_a_prefix_is_read_at_the_prefix() -> None:
    outcome = one(ids(), prefix=Prefix(token_id=3), top_k=3)
    assert (outcome.prompt_tokens, outcome.prefix_token_id) == (1, 3)
    assert np.array_equal(outcome.top_ids, one(ids(3), top_k=3).top_ids)


def test_the_prompts_tokens_count_its_prefix() -> None:
    assert one(text("a"), prefix=Prefix(kind=PrefixKind.BOS)).prompt_tokens == 2


def test_usage_counts_every_prompt_under_every_variant() -> None:
    made = plan_next_token(ask(ids(1, 2), ids(3), variants=(Variant(), Variant())), fake_context())
    assert made.prompt_tokens == 6


def test_only_the_last_row_is_read() -> None:
    made = plan_next_token(ask(ids(1, 2, 3), top_k=2), fake_context())
    assert made.rows[0].read.rows.tolist() == [2]


def test_a_prompt_of_exactly_the_models_length_fits_and_one_more_does_not() -> None:
    context = fake_context(positions=4)
    made = plan_next_token(ask(ids(1, 2, 3, 4), ids(1, 2, 3, 4, 5)), context)
    refused = made.places[1].problem
    assert len(made.rows) == 1
    assert refused is not None
    assert (refused.reason, refused.detail.allowed) == (Reason.INPUT_TOO_LONG, "1-4")


def test_bad_numbers_are_a_problem_of_their_prompt_and_never_a_distribution() -> None:
    results = answer_next(ask(ids(1, 2, 3), ids(1), top_k=3), fake_context(), fake_engine(nan_at=2))
    problem = results[0].outcome
    assert isinstance(problem, Problem)
    assert (problem.reason, problem.detail.item) == (Reason.NON_FINITE_LOGITS, 0)
    assert isinstance(results[1].outcome, NextTokens)


def test_a_failure_of_the_engine_is_placed_at_its_prompt() -> None:
    made = plan_next_token(ask(ids(1), ids(2)), fake_context())
    outcomes = collect(fake_engine(), made.rows)
    outcomes[1] = Outcome(Exhausted(Reason.OUT_OF_MEMORY, "too much"))
    failed = read_next_token(made, outcomes, fake_context())[1].outcome
    assert isinstance(failed, Problem)
    assert failed.detail.item == 1
