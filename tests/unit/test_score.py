"""The Score API: what a score is, how query and item are put together, and whose labels are whose."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dualtrace.problems import Problem, Reason
from dualtrace.questions.answers import NextTokens, ScoreResult
from dualtrace.questions.asked import Input, NextTokenQuestion, ScoreQuestion, Variant
from dualtrace.questions.compose import Context
from dualtrace.questions.score import plan_score
from tests.support.answering import (
    TOKENIZER,
    answer_next,
    answer_score,
    answer_tokens,
    ask_logprob,
    fake_context,
    fake_engine,
    ids,
    text,
)
from tests.support.tokenizer_zoo import load


def ask(query: Input, *items: Input, **fields: object) -> ScoreQuestion:
    if "item_labels" not in fields:
        fields.setdefault("labels", (10, 20, 30))
    return ScoreQuestion(query, tuple(items), **fields)  # type: ignore[arg-type]


def answer(question: ScoreQuestion) -> tuple[ScoreResult, ...]:
    return answer_score(question, fake_context(), fake_engine())


def one(question: ScoreQuestion) -> ScoreResult:
    (result,) = answer(question)
    assert result.problem is None, result.problem
    return result


def test_a_score_is_the_probability_of_its_label() -> None:
    result = one(ask(ids(1, 2), ids(3)))
    assert result.scores == tuple(np.exp(np.array(result.label_logprobs)).tolist())


def test_the_logprob_of_a_label_is_over_the_whole_vocabulary() -> None:
    question = NextTokenQuestion((ids(1, 2, 3),), extra_token_ids=(10, 20, 30))
    outcome = answer_next(question, fake_context(), fake_engine())[0].outcome
    assert isinstance(outcome, NextTokens)
    assert one(ask(ids(1, 2), ids(3))).label_logprobs == tuple(outcome.extra_logprobs.tolist())


def test_a_label_is_read_after_the_item() -> None:
    scored = answer_tokens(ask_logprob((ids(1, 2, 3), ids(20))), fake_context(), fake_engine())[0, 0]
    assert [one(ask(ids(1, 2), ids(3))).label_logprobs[1]] == scored.logprobs


def test_with_softmax_the_scores_are_shares_of_the_labels() -> None:
    result = one(ask(ids(1, 2), ids(3), apply_softmax=True))
    weights = [math.exp(value) for value in result.label_logprobs]
    assert result.scores == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-14)


def test_a_temperature_divides_the_logprobs_before_the_softmax() -> None:
    result = one(ask(ids(1, 2), ids(3), apply_softmax=True, temperature=2.5))
    weights = [math.exp(value / 2.5) for value in result.label_logprobs]
    assert result.scores == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-14)


def test_no_temperature_is_a_temperature_of_one() -> None:
    pair = ask(ids(1), ids(3), apply_softmax=True), ask(ids(1), ids(3), apply_softmax=True, temperature=1.0)
    assert one(pair[0]).scores == one(pair[1]).scores


def test_a_temperature_does_not_touch_the_raw_logprobs() -> None:
    hot = ask(ids(1), ids(3), apply_softmax=True, temperature=9.0)
    assert one(hot).label_logprobs == one(ask(ids(1), ids(3))).label_logprobs


def test_scores_stand_in_the_order_of_the_labels() -> None:
    forward, backward = one(ask(ids(1), ids(2), labels=(7, 8))), one(ask(ids(1), ids(2), labels=(8, 7)))
    assert forward.scores == backward.scores[::-1]


def test_ids_are_put_together_and_nothing_is_added() -> None:
    made = plan_score(ask(ids(1, 2), ids(3, 4)), fake_context())
    assert made.rows[0].ids.tolist() == [1, 2, 3, 4]


def test_item_first_puts_the_item_before_the_query() -> None:
    made = plan_score(ask(ids(1, 2), ids(3, 4), item_first=True), fake_context())
    assert made.rows[0].ids.tolist() == [3, 4, 1, 2]


def test_texts_are_encoded_as_one_text() -> None:
    made = plan_score(ask(text("the ans"), text("wer is")), fake_context())
    assert made.rows[0].ids.tolist() == TOKENIZER.encode("the answer is", special_tokens=True).ids.tolist()


def test_texts_with_the_item_first_are_encoded_as_one_text() -> None:
    made = plan_score(ask(text("wer is"), text("the ans"), item_first=True), fake_context())
    assert made.rows[0].ids.tolist() == TOKENIZER.encode("the answer is", special_tokens=True).ids.tolist()


def test_texts_get_the_tokenizers_own_special_tokens() -> None:
    tokenizer = load("byte_level_both_specials")  # <s> = 1 in front, </s> = 2 behind
    made = plan_score(ask(text("the"), text(" of")), Context(tokenizer.size, fake_context().limits, tokenizer))
    assert made.rows[0].ids[[0, -1]].tolist() == [1, 2]


def test_text_and_its_ids_give_the_same_scores() -> None:
    whole = TOKENIZER.encode("Is it? Yes", special_tokens=True).ids.tolist()
    assert one(ask(text("Is it?"), text(" Yes"))).scores == one(ask(ids(*whole[:3]), ids(*whole[3:]))).scores


def test_each_item_may_have_labels_of_its_own() -> None:
    results = answer(ask(ids(1), ids(2), ids(2), item_labels=((10,), (20, 30))))
    assert [len(result.scores) for result in results] == [1, 2]
    assert results[0].scores + results[1].scores == one(ask(ids(1), ids(2))).scores


def test_a_label_may_be_the_last_id_of_the_logits() -> None:
    assert one(ask(ids(1), ids(2), labels=(TOKENIZER.size - 1,))).problem is None


def test_no_items_are_a_success_without_scores_tokens_or_a_forward() -> None:
    engine = fake_engine()
    assert answer_score(ask(ids(1, 2)), fake_context(), engine) == ()
    assert engine.steps == 0
    assert plan_score(ask(ids(1, 2)), fake_context()).prompt_tokens == 0


def test_labels_for_all_and_labels_for_each_are_not_both_given() -> None:
    with pytest.raises(Problem) as caught:
        plan_score(ScoreQuestion(ids(1), (ids(2),), labels=(10,), item_labels=((20,),)), fake_context())
    assert caught.value.reason is Reason.CONFLICT


def test_labels_are_checked_even_when_there_are_no_items() -> None:
    with pytest.raises(Problem) as caught:
        plan_score(ask(ids(1), labels=(-1,)), fake_context())
    assert (caught.value.reason, caught.value.detail.field) == (Reason.TOKEN_OUT_OF_RANGE, "label_token_ids.ids[0]")


def test_an_empty_query_is_fine() -> None:
    assert one(ask(ids(), ids(1, 2))).scores == one(ask(ids(1), ids(2))).scores


def test_an_item_of_empty_text_is_fine() -> None:
    assert one(ask(text("hello"), text(""))).scores == one(ask(text(""), text("hello"))).scores


def test_an_item_of_no_ids_is_fine() -> None:
    assert one(ask(ids(1, 2), ids())).prompt_tokens == 2


def test_no_tokens_at_all_are_an_empty_prompt_for_that_item_alone() -> None:
    results = answer(ask(ids(), ids(), ids(1)))
    problem = results[0].problem
    assert problem is not None
    assert (problem.reason, problem.detail.item, problem.detail.field) == (Reason.EMPTY_PROMPT, 0, "items[0]")
    assert results[1].problem is None


def test_one_bad_item_leaves_the_others_answered() -> None:
    results = answer(ask(ids(1), ids(2), ids(-2), ids(2)))
    assert [result.problem is None for result in results] == [True, False, True]
    assert results[0].scores == results[2].scores


def test_a_bad_item_has_no_scores() -> None:
    result = answer(ask(ids(1), ids(-2)))[0]
    assert (result.scores, result.label_logprobs, result.prompt_tokens) == ((), (), 0)


def test_bad_numbers_are_a_problem_of_their_item_and_never_a_score() -> None:
    results = answer_score(ask(ids(1), ids(2, 3), ids(2)), fake_context(), fake_engine(nan_at=2))
    problem = results[0].problem
    assert problem is not None
    assert (problem.reason, problem.detail.item) == (Reason.NON_FINITE_LOGITS, 0)
    assert results[0].scores == ()
    assert results[1].problem is None


def test_items_beside_each_other_equal_the_same_items_alone() -> None:
    query, items = ids(*range(40)), [ids(i, i + 1) for i in range(5)]
    together = answer(ask(query, *items))
    assert [result.scores for result in together] == [one(ask(query, item)).scores for item in items]


def test_results_stand_item_by_item_for_each_variant() -> None:
    results = answer(ask(ids(1), ids(2), ids(3), variants=(Variant(), Variant())))
    assert [(result.item, result.variant) for result in results] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_usage_counts_the_prompts_as_composed() -> None:
    made = plan_score(ask(ids(1, 2), ids(3), ids(4, 5), variants=(Variant(), Variant())), fake_context())
    assert made.prompt_tokens == 2 * (3 + 4)


def test_a_long_query_is_paid_for_with_every_item_before_it_is_encoded() -> None:
    question = ask(text("x" * 3000), *[text("")] * 1000)
    with pytest.raises(Problem) as caught:
        plan_score(question, fake_context(max_request_chars=1_000_000))
    assert caught.value.reason is Reason.TOO_MANY
