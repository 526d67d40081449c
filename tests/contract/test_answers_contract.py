"""Every question through every engine, in process and over the wire: what must hold between answers."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
import pytest

from dualtrace.engine import int_array
from dualtrace.problems import Problem, Reason
from dualtrace.questions.answers import AnswerHeader, AnswerSummary, NextTokens, ScoreResult
from dualtrace.questions.asked import (
    Input,
    LogprobItem,
    LogprobQuestion,
    NextTokenQuestion,
    PreflightQuestion,
    RollingQuestion,
    ScoreQuestion,
    TokenizeQuestion,
)
from dualtrace.scorer import Scorer, ask_one
from dualtrace.tokens import Prefix, PrefixKind, Tokens
from tests.support.answering import Scored, ask_logprob, gather, ids, text
from tests.support.contract import Subject, assert_close, random_ids
from tests.support.scorers import all_events, only

PROMPT = "The capital of France is"
TEXT = "Two and two are four; naïve cafés cost 3 € 🙂, and water is made of hydrogen and oxygen."
NONE = Prefix(kind=PrefixKind.NONE)


async def scored(scorer: Scorer, question: Any) -> list[Scored]:
    """The items of the first variant, in order."""
    gathered = gather(await all_events(scorer, question))
    return [gathered[item, 0] for item in range(len(gathered))]


async def following(scorer: Scorer, *prompts: Input, **fields: Any) -> list[NextTokens]:
    answer = await ask_one(scorer, NextTokenQuestion(prompts, **fields))
    outcomes = [result.outcome for result in answer.results]
    assert all(isinstance(outcome, NextTokens) for outcome in outcomes), outcomes
    return outcomes  # type: ignore[return-value]


async def scores(scorer: Scorer, question: ScoreQuestion) -> list[ScoreResult]:
    results = list((await ask_one(scorer, question)).results)
    assert [result.problem for result in results] == [None] * len(results)
    return results


def encode(subject: Subject, given: str) -> list[int]:
    ids_of: list[int] = subject.tokenizer.encode(given, special_tokens=False).ids.tolist()
    return ids_of


async def test_a_stream_begins_with_its_header_and_ends_with_its_summary(scorer: Scorer) -> None:
    events = await all_events(scorer, ask_logprob((text(PROMPT), text(" Paris"))))
    assert (type(events[0]), type(events[-1])) == (AnswerHeader, AnswerSummary)
    assert len(only(events, AnswerHeader)) == len(only(events, AnswerSummary)) == 1


async def test_the_sum_of_a_completion_is_that_of_its_tokens(scorer: Scorer) -> None:
    (item,) = await scored(scorer, ask_logprob((text(PROMPT), text(" Paris, of course"))))
    assert item.done is not None
    assert item.done.total_logprob == math.fsum(item.logprobs)
    assert item.done.scored_tokens == len(item.ids) > 0


async def test_every_logprob_is_a_logprob(scorer: Scorer) -> None:
    (item,) = await scored(scorer, RollingQuestion((text(TEXT),)))
    assert all(-200 < value < 0 for value in item.logprobs)


async def test_a_completion_in_a_batch_is_the_same_alone(scorer: Scorer, subject: Subject) -> None:
    pairs = [(text(PROMPT), text(completion)) for completion in (" Paris", " Rome and Berlin", " not known 🙂")]
    together = await scored(scorer, ask_logprob(*pairs))
    for pair, beside in zip(pairs, together, strict=True):
        (alone,) = await scored(scorer, ask_logprob(pair))
        assert alone.ids == beside.ids
        assert_close(alone.logprobs, beside.logprobs, subject.tolerance)


async def test_questions_asked_at_once_get_the_answers_they_get_alone(scorer: Scorer, subject: Subject) -> None:
    questions = [
        ask_logprob((text(PROMPT), text(" Paris"))),
        RollingQuestion((text(TEXT),)),
        RollingQuestion((text(TEXT),), max_tokens=10, stride=4),
        ask_logprob((text(PROMPT), text(" Rome")), (text(""), text("x")), prefix=Prefix(kind=PrefixKind.BOS)),
    ]
    together = await asyncio.gather(*(scored(scorer, question) for question in questions))
    for question, beside in zip(questions, together, strict=True):
        for one, two in zip(await scored(scorer, question), beside, strict=True):
            assert_close(one.logprobs, two.logprobs, subject.tolerance)


async def test_ids_and_text_of_the_same_tokens_give_the_same_numbers(scorer: Scorer, subject: Subject) -> None:
    by_text, by_ids = (
        await scored(scorer, RollingQuestion((text(TEXT),), prefix=NONE)),
        await scored(scorer, RollingQuestion((ids(*encode(subject, TEXT)),), prefix=NONE)),
    )
    assert by_text[0].ids == by_ids[0].ids
    assert_close(by_text[0].logprobs, by_ids[0].logprobs, subject.tolerance)


async def test_rolling_over_one_window_is_the_logprob_of_the_whole(scorer: Scorer, subject: Subject) -> None:
    whole = encode(subject, TEXT)
    (rolled,) = await scored(scorer, RollingQuestion((ids(*whole),)))
    (item,) = await scored(scorer, ask_logprob((ids(), ids(*whole)), prefix=NONE))
    assert rolled.first_index == item.first_index == 1
    assert_close(rolled.logprobs, item.logprobs, subject.tolerance)


async def test_every_window_is_a_forward_of_its_own(scorer: Scorer, subject: Subject) -> None:
    sequence = random_ids(subject.engine.card, 22, 4)
    (rolled,) = await scored(scorer, RollingQuestion((ids(*sequence),), max_tokens=8, stride=5))
    by_hand: list[float] = []
    for first, stop in ((1, 9), (9, 14), (14, 19), (19, 22)):
        past = sequence[max(0, stop - 1 - 8) : first]
        (window,) = await scored(scorer, ask_logprob((ids(*past), ids(*sequence[first:stop])), prefix=NONE))
        by_hand += window.logprobs
    assert_close(rolled.logprobs, by_hand, subject.tolerance)


async def test_n_ids_give_n_minus_one_values_and_n_behind_a_prefix(scorer: Scorer) -> None:
    plain = await scored(scorer, RollingQuestion((ids(5, 6, 7, 8),)))
    behind = await scored(scorer, RollingQuestion((ids(5, 6, 7, 8),), prefix=Prefix(token_id=1)))
    assert (len(plain[0].logprobs), len(behind[0].logprobs)) == (3, 4)


async def test_rank_and_ties_agree_with_the_top(scorer: Scorer) -> None:
    (item,) = await scored(scorer, RollingQuestion((text(TEXT),), top_k=20))
    inside = 0
    for at, token_id in enumerate(item.ids):
        if token_id in item.top_ids[at]:
            inside += 1
            place = item.top_ids[at].index(token_id)
            assert item.ranks[at] <= place + 1 <= item.ranks[at] + item.ties[at]
            assert item.top_logprobs[at][place] == item.logprobs[at]
        else:
            assert item.ranks[at] + item.ties[at] > 20
    assert inside


async def test_top_and_tail_sum_to_one(scorer: Scorer, subject: Subject) -> None:
    for outcome in await following(scorer, text(PROMPT), text(TEXT), top_k=15):
        assert outcome.tail.logprob is not None
        mass = np.exp(outcome.top_logprobs).sum() + math.exp(outcome.tail.logprob)
        assert mass == pytest.approx(1.0, abs=subject.tolerance.abs_epsilon)


async def test_the_whole_vocabulary_has_no_tail(scorer: Scorer) -> None:
    width = (await scorer.describe()).limits.max_top_k
    (outcome,) = await following(scorer, text(PROMPT), top_k=width)
    assert (outcome.tail.state, sorted(outcome.top_ids.tolist())) == ("FULL_COVERAGE", list(range(width)))


async def test_the_next_token_has_the_logprob_of_that_completion(scorer: Scorer, subject: Subject) -> None:
    prompt = encode(subject, PROMPT)
    (outcome,) = await following(scorer, ids(*prompt), top_k=3, extra_token_ids=(9, 2))
    wanted = [*outcome.top_ids.tolist(), 9, 2]
    items = await scored(scorer, ask_logprob(*[(ids(*prompt), ids(token_id)) for token_id in wanted]))
    found = [*outcome.top_logprobs.tolist(), *outcome.extra_logprobs.tolist()]
    assert_close(found, [item.logprobs[0] for item in items], subject.tolerance)


async def test_the_best_next_token_has_rank_one(scorer: Scorer, subject: Subject) -> None:
    prompt = ids(*encode(subject, PROMPT))
    (outcome,) = await following(scorer, prompt, top_k=1)
    (item,) = await scored(scorer, ask_logprob((prompt, ids(int(outcome.top_ids[0])))))
    assert item.ranks == [1]
    assert item.done is not None
    assert item.done.is_greedy


async def test_prompts_in_a_batch_are_the_same_alone(scorer: Scorer, subject: Subject) -> None:
    prompts = [text(PROMPT), text(PROMPT + " Paris"), text("x"), text(TEXT)]
    together = await following(scorer, *prompts, top_k=5, extra_token_ids=(3, 4))
    for prompt, beside in zip(prompts, together, strict=True):
        (alone,) = await following(scorer, prompt, top_k=5, extra_token_ids=(3, 4))
        assert_close(alone.extra_logprobs.tolist(), beside.extra_logprobs.tolist(), subject.tolerance)
        assert_close(alone.top_logprobs.tolist(), beside.top_logprobs.tolist(), subject.tolerance)


async def test_the_probability_of_a_label_is_that_of_the_next_token(scorer: Scorer, subject: Subject) -> None:
    query, item = encode(subject, PROMPT), encode(subject, " it")
    (result,) = await scores(scorer, ScoreQuestion(ids(*query), (ids(*item),), labels=(7, 70)))
    (outcome,) = await following(scorer, ids(*query, *item), extra_token_ids=(7, 70))
    assert_close(result.label_logprobs, outcome.extra_logprobs.tolist(), subject.tolerance)
    assert result.scores == tuple(np.exp(np.array(result.label_logprobs)).tolist())


async def test_scores_of_items_beside_each_other_are_those_alone(scorer: Scorer, subject: Subject) -> None:
    items = [text(item) for item in (" Paris", " Rome", "", " a longer answer than the others")]
    together = await scores(scorer, ScoreQuestion(text(PROMPT), tuple(items), labels=(7, 70)))
    for item, beside in zip(items, together, strict=True):
        (alone,) = await scores(scorer, ScoreQuestion(text(PROMPT), (item,), labels=(7, 70)))
        assert_close(alone.label_logprobs, beside.label_logprobs, subject.tolerance)


async def test_shares_of_the_labels_sum_to_one(scorer: Scorer) -> None:
    question = ScoreQuestion(text(PROMPT), (text(" a"),), labels=(1, 2, 3), apply_softmax=True, temperature=0.7)
    (result,) = await scores(scorer, question)
    assert sum(result.scores) == pytest.approx(1.0, abs=1e-12)


async def test_pieces_and_offsets_lead_back_to_the_text(scorer: Scorer) -> None:
    answer = await ask_one(scorer, TokenizeQuestion((text(TEXT),)))
    (tokens,) = answer.results
    assert isinstance(tokens, Tokens)
    assert b"".join(tokens.pieces).decode().strip() == TEXT.strip()


async def test_preflight_finds_a_sound_model_sound(scorer: Scorer) -> None:
    answer = await ask_one(scorer, PreflightQuestion())
    assert [(result.ok, result.problem) for result in answer.results] == [(True, None)]


async def test_a_sequence_longer_than_the_model_is_refused_for_its_item_alone(scorer: Scorer) -> None:
    most = (await scorer.describe()).limits.max_positions
    items = await scored(scorer, ask_logprob((ids(*[1] * most), ids(2, 3)), (ids(1), ids(2))))
    assert items[0].problem is not None
    assert (items[0].problem.reason, items[0].problem.detail.allowed) == (Reason.INPUT_TOO_LONG, f"1-{most}")
    assert items[1].done is not None


async def test_a_sequence_of_just_the_models_length_is_answered(scorer: Scorer) -> None:
    most = (await scorer.describe()).limits.max_positions
    (item,) = await scored(scorer, ask_logprob((ids(*[1] * most), ids(2))))
    assert item.done is not None


async def test_an_empty_batch_is_an_empty_success_without_a_forward(scorer: Scorer) -> None:
    answer = await ask_one(scorer, NextTokenQuestion((), top_k=3))
    assert (answer.results, answer.usage.computed_tokens) == ((), 0)


async def test_usage_counts_what_was_sent_and_what_was_run(scorer: Scorer) -> None:
    events = await all_events(scorer, ask_logprob((ids(*range(30)), ids(3, 4)), (ids(*range(30)), ids(5, 6))))
    (summary,) = only(events, AnswerSummary)
    assert summary.usage.prompt_tokens == 64
    assert 0 < summary.usage.computed_tokens <= 62
    shares = (await scorer.describe()).capabilities.shares_prefixes
    assert (summary.usage.computed_tokens < 62) == shares


async def test_every_answer_carries_its_provenance(scorer: Scorer, subject: Subject) -> None:
    (header,) = only(await all_events(scorer, RollingQuestion((text("x"),))), AnswerHeader)
    card = await scorer.describe()
    assert header.provenance == card.provenance
    assert header.provenance.tokenizer_digest == subject.tokenizer.digest


async def test_a_deterministic_answer_is_the_same_to_the_last_bit_whatever_stands_beside_it(
    scorer: Scorer, subject: Subject
) -> None:
    assert subject.engine.card.capabilities.deterministic, "every engine of the house has a deterministic mode"
    question = LogprobQuestion(
        (LogprobItem(text(PROMPT), text(" Paris")), LogprobItem(text(TEXT), text(" x"))), deterministic=True
    )
    (alone, _) = await scored(scorer, question)
    noise = [RollingQuestion((text(TEXT * 2),)), RollingQuestion((text(PROMPT),), deterministic=True)]
    beside, *_ = await asyncio.gather(scored(scorer, question), *(scored(scorer, other) for other in noise))
    assert beside[0].logprobs == alone.logprobs
    lonely = LogprobQuestion(question.items[:1], deterministic=True)
    assert (await scored(scorer, lonely))[0].logprobs == alone.logprobs


async def test_no_answer_ever_holds_a_nan(scorer: Scorer) -> None:
    (item,) = await scored(scorer, RollingQuestion((text(TEXT),), top_k=4))
    (outcome,) = await following(scorer, text(TEXT), top_k=4, extra_token_ids=(1,))
    values = [*item.logprobs, *(v for row in item.top_logprobs for v in row), *outcome.extra_logprobs.tolist()]
    assert not any(math.isnan(value) for value in values)


async def test_an_id_that_no_token_stands_for_is_still_an_id(scorer: Scorer, subject: Subject) -> None:
    last = subject.engine.card.vocab_size - 1
    (item,) = await scored(scorer, ask_logprob((ids(1), ids(last, last))))
    assert item.done is not None
    assert int_array(item.ids).tolist() == [last, last]


async def test_a_refused_question_leaves_the_scorer_usable(scorer: Scorer) -> None:
    with pytest.raises(Problem):
        await all_events(scorer, RollingQuestion(()))
    assert (await scored(scorer, RollingQuestion((text("still here"),))))[0].done is not None
