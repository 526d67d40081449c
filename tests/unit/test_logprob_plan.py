"""Logprob: which tokens are scored, from which rows, and what the header says of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dualtrace.problems import Problem, Reason
from dualtrace.questions.answers import ItemHeader
from dualtrace.questions.asked import Input, LogprobQuestion, Variant
from dualtrace.questions.logprob import plan_logprob
from dualtrace.questions.token_plan import PlannedItem
from dualtrace.tokens import Boundary, Prefix, PrefixKind
from tests.support.answering import (
    TOKENIZER,
    answer_tokens,
    fake_context,
    fake_engine,
    ids,
    next_logprobs,
    stream_tokens,
    text,
)
from tests.support.answering import (
    ask_logprob as ask,
)
from tests.support.tokenizer_zoo import load

NONE = Prefix(kind=PrefixKind.NONE)
BOS = Prefix(kind=PrefixKind.BOS)


def header(question: LogprobQuestion, **context: object) -> ItemHeader:
    item = plan_logprob(question, fake_context(**context)).items[0]  # type: ignore[arg-type]
    assert isinstance(item, PlannedItem), item
    return item.header


def test_each_token_is_read_from_the_row_before_it() -> None:
    engine = fake_engine()
    scored = answer_tokens(ask((ids(5, 6, 7), ids(8, 9))), fake_context(), engine)[0, 0]
    assert scored.ids == [8, 9]
    assert scored.logprobs == next_logprobs(engine, [5, 6, 7, 8, 9])[2:]


def test_only_the_completion_is_scored() -> None:
    assert header(ask((ids(5, 6, 7), ids(8, 9)))).scored_start == 3


def test_nothing_is_fed_that_is_not_needed() -> None:
    made = plan_logprob(ask((ids(5, 6, 7), ids(8, 9))), fake_context())
    assert [row.row.ids.tolist() for row in made.rows] == [[5, 6, 7, 8]]


def test_the_unscored_tokens_stand_in_the_header() -> None:
    unscored = header(ask((text("one two"), text(" three")))).unscored
    assert unscored is not None
    assert b"".join(unscored.pieces) == b"one two"


def test_ids_get_no_prefix_token_unless_asked() -> None:
    assert header(ask((ids(5), ids(6)))).prefix_token_id is None


def test_an_explicit_prefix_is_honoured_for_ids() -> None:
    engine = fake_engine()
    scored = answer_tokens(ask((ids(), ids(8, 9)), prefix=Prefix(token_id=3)), fake_context(), engine)[0, 0]
    assert scored.logprobs == next_logprobs(engine, [3, 8, 9])


def test_a_prefix_by_name_is_the_tokenizers_token() -> None:
    assert header(ask((ids(5), ids(6)), prefix=BOS)).prefix_token_id == TOKENIZER.bos_id


def test_text_gets_what_the_tokenizer_itself_adds() -> None:
    tokenizer = load("llama")  # it puts <s> = id 1 in front
    context = fake_context()
    context = type(context)(tokenizer.size, context.limits, tokenizer)
    made = plan_logprob(ask((text("the capital"), text(" of"))), context).items[0]
    assert isinstance(made, PlannedItem)
    assert made.header.prefix_token_id == 1


def test_a_prefix_token_does_not_shift_the_indices() -> None:
    without = header(ask((ids(5, 6), ids(7)), prefix=NONE))
    with_bos = header(ask((ids(5, 6), ids(7)), prefix=BOS))
    assert (without.scored_start, without.token_count) == (with_bos.scored_start, with_bos.token_count) == (2, 3)


def test_an_empty_prompt_behind_a_prefix_scores_every_token() -> None:
    assert header(ask((text(""), text("hello")), prefix=BOS)).scored_start == 0


def test_an_empty_prompt_without_a_prefix_leaves_the_first_token_unscored_and_says_so() -> None:
    engine = fake_engine()
    scored = answer_tokens(ask((ids(), ids(7, 8, 9)), prefix=NONE), fake_context(), engine)[0, 0]
    assert (scored.first_index, scored.ids) == (1, [8, 9])


def test_one_token_with_nothing_before_it_is_an_answer_without_scores() -> None:
    scored = answer_tokens(ask((ids(), ids(7)), prefix=NONE), fake_context(), fake_engine())[0, 0]
    done = scored.done
    assert done is not None
    assert (done.scored_tokens, done.total_logprob, done.mean_logprob, done.perplexity, done.is_greedy) == (
        0, None, None, None, None,
    )  # fmt: skip


def test_an_item_without_scores_says_that_scoring_never_started() -> None:
    made = header(ask((ids(), ids(7)), prefix=NONE))
    assert made.scored_start is None
    assert made.unscored is not None
    assert made.unscored.ids.tolist() == [7]


def test_a_token_that_straddles_belongs_to_the_completion() -> None:
    whole = TOKENIZER.encode("the answer", special_tokens=False)
    straddled = next(i for i, piece in enumerate(whole.pieces) if len(piece) > 1)
    assert whole.starts is not None
    cut = int(whole.starts[straddled]) + 1  # inside that token
    made = header(ask((text("the answer"[:cut]), text("the answer"[cut:])), prefix=BOS))
    assert made.boundary_token_merged
    assert made.scored_start == straddled


def test_a_boundary_between_tokens_is_not_called_merged() -> None:
    assert not header(ask((text("one"), text(" two")))).boundary_token_merged


def test_joint_is_the_default_boundary() -> None:
    pair = (text("the ans"), text("wer"))
    assert header(ask(pair)).boundary_token_merged == header(ask(pair, boundary=Boundary.JOINT)).boundary_token_merged


def test_separate_encodes_each_alone() -> None:
    made = header(ask((text("the ans"), text("wer")), boundary=Boundary.SEPARATE))
    alone = [len(TOKENIZER.encode(part, special_tokens=False)) for part in ("the ans", "wer")]
    assert (made.prompt_tokens, made.token_count) == (alone[0], sum(alone))


def test_strict_refuses_a_token_that_straddles_for_its_item_alone() -> None:
    straddling, plain = (text("th"), text("e answer")), (text("one"), text(" two"))
    answered = answer_tokens(ask(straddling, plain, boundary=Boundary.STRICT), fake_context(), fake_engine())
    problem = answered[0, 0].problem
    assert problem is not None
    assert (problem.reason, problem.detail.item, problem.detail.field) == (Reason.BOUNDARY_STRADDLED, 0, "boundary")
    assert answered[1, 0].done is not None


def test_text_and_ids_of_the_same_tokens_give_the_same_numbers() -> None:
    engine, context = fake_engine(), fake_context()
    prompt, completion = "Two and two are", " four, 🙂"
    by_text = answer_tokens(ask((text(prompt), text(completion)), prefix=NONE), context, engine)[0, 0]
    whole = TOKENIZER.encode(prompt + completion, special_tokens=False).ids.tolist()
    cut = len(whole) - len(by_text.ids)
    by_ids = answer_tokens(ask((ids(*whole[:cut]), ids(*whole[cut:]))), context, engine)[0, 0]
    assert (by_text.ids, by_text.logprobs, by_text.pieces) == (by_ids.ids, by_ids.logprobs, by_ids.pieces)


def test_the_sum_is_that_of_the_tokens_in_float64() -> None:
    scored = answer_tokens(ask((ids(1), ids(*range(2, 90)))), fake_context(), fake_engine())[0, 0]
    assert scored.done is not None
    assert scored.done.total_logprob == math.fsum(scored.logprobs)


def test_mean_and_perplexity_are_those_of_the_sum() -> None:
    scored = answer_tokens(ask((ids(1), ids(2, 3, 4))), fake_context(), fake_engine())[0, 0]
    assert scored.done is not None
    assert scored.done.mean_logprob == math.fsum(scored.logprobs) / 3
    assert scored.done.perplexity == math.exp(-math.fsum(scored.logprobs) / 3)


def test_a_span_is_greedy_when_every_token_has_rank_one() -> None:
    engine, context = fake_engine(), fake_context()
    sequence = [5]
    for _ in range(4):
        best = answer_tokens(ask((ids(*sequence), ids(0)), top_k=1), context, engine)[0, 0].top_ids[0][0]
        sequence.append(best)
    greedy = answer_tokens(ask((ids(5), ids(*sequence[1:]))), context, engine)[0, 0]
    spoilt = answer_tokens(ask((ids(5), ids(*sequence[1:-1], (sequence[-1] + 1) % 100))), context, engine)[0, 0]
    assert greedy.done is not None
    assert spoilt.done is not None
    assert (greedy.done.is_greedy, spoilt.done.is_greedy) == (True, False)


def test_the_top_k_of_each_token_are_columns_of_that_length() -> None:
    scored = answer_tokens(ask((ids(1), ids(2, 3, 4)), top_k=5), fake_context(), fake_engine())[0, 0]
    assert [len(row) for row in scored.top_ids] == [5, 5, 5]


def test_no_top_columns_are_there_when_none_were_asked() -> None:
    scored = answer_tokens(ask((ids(1), ids(2, 3, 4))), fake_context(), fake_engine())[0, 0]
    assert scored.top_ids == []


def test_one_bad_item_leaves_the_others_answered() -> None:
    question = ask((ids(1), ids(2)), (ids(1), ids(-4)), (ids(1), ids(3)), (ids(1), ids()))
    answered = answer_tokens(question, fake_context(), fake_engine())
    outcomes = [answered[item, 0].problem and answered[item, 0].problem.reason for item in range(4)]  # type: ignore[union-attr]
    assert outcomes == [None, Reason.TOKEN_OUT_OF_RANGE, None, Reason.EMPTY_COMPLETION]


def test_a_bad_item_has_an_empty_header_and_a_problem_under_every_variant() -> None:
    question = ask((ids(1), ids(-4)), variants=(Variant(), Variant()))
    made = plan_logprob(question, fake_context())
    assert isinstance(made.items[0], Problem)
    assert len(stream_tokens(made, [])) == 2


def test_variants_are_answered_one_by_one_with_the_same_numbers() -> None:
    question = ask((ids(1), ids(2, 3)), variants=(Variant(), Variant()))
    answered = answer_tokens(question, fake_context(), fake_engine())
    assert answered[0, 0].logprobs == answered[0, 1].logprobs


def test_items_in_a_batch_equal_the_same_items_alone() -> None:
    engine, context = fake_engine(), fake_context()
    common = tuple(range(40))
    pairs = [(ids(*common), ids(i, i + 1)) for i in range(6)]
    together = answer_tokens(ask(*pairs), context, engine)
    alone = [answer_tokens(ask(pair), context, engine)[0, 0] for pair in pairs]
    assert [together[i, 0].logprobs for i in range(6)] == [scored.logprobs for scored in alone]


def test_usage_counts_the_tokens_as_composed_under_every_variant() -> None:
    question = ask((ids(1, 2), ids(3)), (ids(), ids(4, 5)), variants=(Variant(), Variant()))
    assert plan_logprob(question, fake_context()).prompt_tokens == 2 * (3 + 2)


def test_a_text_of_exactly_the_models_length_fits() -> None:
    # N tokens need N - 1 inputs: the last one is only predicted.
    made = header(ask((ids(*[1] * 8), ids(2))), positions=8)
    assert made.token_count == 9


def test_a_prefix_token_counts_as_an_input() -> None:
    made = plan_logprob(ask((ids(*[1] * 8), ids(2)), prefix=BOS), fake_context(positions=8)).items[0]
    assert isinstance(made, Problem)
    assert (made.reason, made.detail.allowed) == (Reason.INPUT_TOO_LONG, "1-8")


def test_offsets_count_in_the_prompt_and_completion_together() -> None:
    made = plan_logprob(ask((text("one 🙂"), text(" two"))), fake_context()).items[0]
    assert isinstance(made, PlannedItem)
    assert made.tokens.ends is not None
    assert int(made.tokens.ends[-1]) == len("one 🙂 two")


@pytest.mark.parametrize("given", [ids(5, 6), text("ab")])
def test_offsets_are_announced_for_texts_alone(given: Input) -> None:
    made = plan_logprob(ask((given, given)), fake_context())
    assert made.has_offsets == (given.text is not None)


def test_a_scorer_without_a_tokenizer_announces_no_pieces() -> None:
    assert not plan_logprob(ask((ids(5), ids(6))), fake_context(tokenizer=False)).has_pieces


def test_positions_count_from_the_prefix_token() -> None:
    made = plan_logprob(ask((ids(5, 6), ids(7)), prefix=BOS), fake_context())
    assert np.array_equal(made.rows[0].row.positions, [0, 1, 2])
