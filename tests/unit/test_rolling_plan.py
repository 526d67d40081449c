"""RollingLogprob: how many values N tokens give, what each window feeds, and what is absent when nothing is scored."""

from __future__ import annotations

import math

import pytest

from dualtrace.problems import Problem, Reason
from dualtrace.questions.answers import ItemDone, RollingWindows
from dualtrace.questions.asked import Input, RollingQuestion, Variant
from dualtrace.questions.rolling import plan_rolling
from dualtrace.questions.token_plan import PlannedItem
from dualtrace.questions.token_stream import TokenStream
from dualtrace.tokens import Prefix, PrefixKind
from tests.support.answering import (
    TOKENIZER,
    Scored,
    answer_tokens,
    fake_context,
    fake_engine,
    forward_alone,
    ids,
    next_logprobs,
    text,
)
from tests.support.vectors import Case, cases

PREFIX = Prefix(token_id=3)


def roll(*inputs: Input, **fields: object) -> RollingQuestion:
    return RollingQuestion(tuple(inputs), **fields)  # type: ignore[arg-type]


def one(question: RollingQuestion, **context: object) -> Scored:
    return answer_tokens(question, fake_context(**context), fake_engine())[0, 0]  # type: ignore[arg-type]


def done(scored: Scored) -> ItemDone:
    assert scored.done is not None
    return scored.done


@pytest.mark.parametrize(("count", "values"), [(0, 0), (1, 0), (2, 1), (7, 6)])
def test_n_ids_without_a_prefix_give_one_value_less(count: int, values: int) -> None:
    assert done(one(roll(ids(*range(count))))).scored_tokens == values


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_n_ids_with_a_prefix_give_n_values(count: int) -> None:
    assert done(one(roll(ids(*range(count)), prefix=PREFIX))).scored_tokens == count


def test_values_are_those_of_the_whole_text_where_it_fits() -> None:
    assert one(roll(ids(4, 5, 6, 7))).logprobs == next_logprobs(fake_engine(), [4, 5, 6, 7])


def test_values_behind_a_prefix_are_those_behind_it() -> None:
    assert one(roll(ids(4, 5, 6), prefix=PREFIX)).logprobs == next_logprobs(fake_engine(), [3, 4, 5, 6])


@pytest.mark.parametrize("given", [ids(), ids(9), text("")])
def test_mean_and_perplexity_are_absent_when_nothing_could_be_scored(given: Input) -> None:
    end = done(one(roll(given, prefix=Prefix(kind=PrefixKind.NONE))))
    assert (end.total_logprob, end.mean_logprob, end.perplexity, end.is_greedy) == (None, None, None, None)


def test_perplexity_is_exp_of_the_negative_mean() -> None:
    scored = one(roll(ids(1, 2, 3, 4)))
    assert done(scored).perplexity == math.exp(-math.fsum(scored.logprobs) / 3)


@cases("rolling_windows")
def test_planned_rows_feed_and_score_what_the_vectors_say(case: Case) -> None:
    count, has_prefix = case["tokens"], case["has_prefix"]
    question = roll(
        ids(*range(10, 10 + count)),  # token index i has id 10 + i, P has id 3
        prefix=PREFIX if has_prefix else Prefix(),
        max_tokens=case["max_tokens"],
        stride=case["stride"],
    )
    made = plan_rolling(question, fake_context())
    found = []
    for planned in made.rows:
        row = planned.row
        assert row.read.targets is not None
        feeds = ["P" if i == 3 else i - 10 for i in row.ids.tolist()]
        targets = [i - 10 for i in row.read.targets.tolist()]
        assert [int(r) + planned.token_offset for r in row.read.rows] == targets, "a row knows its tokens' places"
        found.append({"feeds": feeds, "scores": targets})
    assert found == case["windows"]


def test_each_window_is_a_forward_of_its_own_inputs_alone() -> None:
    engine, sequence = fake_engine(), [*range(20, 40)]
    scored = answer_tokens(roll(ids(*sequence), max_tokens=8, stride=5), fake_context(), engine)[0, 0]
    by_hand = next_logprobs(engine, sequence[:9])
    for stop in (14, 19, 20):  # windows score 9-13, 14-18, 19
        first = {14: 9, 19: 14, 20: 19}[stop]
        feed = sequence[stop - 1 - 8 : stop]
        by_hand += next_logprobs(engine, feed)[-(stop - first) :]
    assert scored.logprobs == by_hand


def test_a_window_really_loses_what_lies_before_it() -> None:
    whole, cut = one(roll(ids(*range(30)))), one(roll(ids(*range(30)), max_tokens=4))
    assert whole.logprobs[:4] == cut.logprobs[:4]
    assert whole.logprobs[10:] != cut.logprobs[10:]


def test_the_prefix_stands_in_the_first_window_only() -> None:
    made = plan_rolling(roll(ids(*range(10, 30)), prefix=PREFIX, max_tokens=5), fake_context())
    assert [3 in planned.row.ids for planned in made.rows] == [True, False, False, False]


def test_the_windows_travel_with_the_number() -> None:
    item = plan_rolling(roll(ids(*range(20)), max_tokens=8, stride=5), fake_context()).items[0]
    assert isinstance(item, PlannedItem)
    assert item.header.windows == RollingWindows(count=4, max_tokens=8, stride=5)


def test_max_tokens_is_the_models_positions_and_stride_is_max_tokens_when_absent() -> None:
    item = plan_rolling(roll(ids(1, 2)), fake_context(positions=77)).items[0]
    assert isinstance(item, PlannedItem)
    assert item.header.windows == RollingWindows(count=1, max_tokens=77, stride=77)


def test_a_text_longer_than_the_model_is_answered_in_windows() -> None:
    assert done(one(roll(ids(*[5] * 100)), positions=16)).scored_tokens == 99


def test_text_is_scored_without_the_tokenizers_own_special_tokens_in_the_middle() -> None:
    scored = one(roll(text("Two and two are four."), prefix=Prefix(kind=PrefixKind.BOS)))
    assert scored.ids == TOKENIZER.encode("Two and two are four.", special_tokens=False).ids.tolist()


def test_pieces_of_the_scored_tokens_are_the_text() -> None:
    assert b"".join(one(roll(text("naïve 🙂"), prefix=PREFIX)).pieces).decode() == "naïve 🙂"


def test_one_bad_input_leaves_the_others_answered() -> None:
    answered = answer_tokens(roll(ids(1, 2), ids(1, 10**6), ids(1, 2)), fake_context(), fake_engine())
    problem = answered[1, 0].problem
    assert problem is not None
    assert (problem.reason, problem.detail.item, problem.detail.field) == (
        Reason.TOKEN_OUT_OF_RANGE, 1, "inputs[1].ids[1]",
    )  # fmt: skip
    assert answered[0, 0].logprobs == answered[2, 0].logprobs != []


def test_a_stride_of_one_over_a_long_text_is_refused_before_its_windows_are_made() -> None:
    with pytest.raises(Problem) as caught:
        plan_rolling(roll(ids(*[1] * 100_000), max_tokens=512, stride=1), fake_context())
    assert caught.value.reason is Reason.TOO_MANY


def test_every_variant_costs_its_own_windows() -> None:
    question = roll(ids(*[1] * 1000), max_tokens=500, variants=(Variant(),) * 3)
    with pytest.raises(Problem, match="forward tokens"):
        plan_rolling(question, fake_context(max_work_tokens=4000))


def test_items_before_and_after_nothing_to_score_keep_their_places() -> None:
    answered = answer_tokens(roll(ids(1), ids(1, 2), ids()), fake_context(), fake_engine())
    assert [done(answered[i, 0]).scored_tokens for i in range(3)] == [0, 1, 0]


def test_a_row_of_bad_numbers_fails_its_own_item_only() -> None:
    engine = fake_engine(nan_at=5)
    answered = answer_tokens(roll(ids(*range(9)), ids(1, 2, 3)), fake_context(), engine)
    problem = answered[0, 0].problem
    assert problem is not None
    assert problem.reason is Reason.NON_FINITE_LOGITS
    assert "row 5, which predicts token 6" in problem.detail.message
    assert done(answered[1, 0]).scored_tokens == 2


def test_a_perplexity_too_large_for_a_double_is_absent_while_its_mean_is_there() -> None:
    made = plan_rolling(roll(ids(1, 2)), fake_context())
    readout = forward_alone(fake_engine(), [1, 2])[0]
    assert readout.logprobs is not None
    readout.logprobs[:] = -800.0
    *_, end = TokenStream(made, 64).push(0, readout)
    assert isinstance(end, ItemDone)
    assert (end.mean_logprob, end.perplexity) == (-800.0, None)
