"""A stored run replayed: what comes out is what was stored, and no other question is answered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dualtrace.engine import EngineSettings, int_array
from dualtrace.engine_scorer import EngineScorer
from dualtrace.masks.json_form import parse_json
from dualtrace.problems import FailedPrecondition, Internal, InvalidArgument, Reason, Unsupported
from dualtrace.questions.answers import AnswerSummary, ItemDone, TokenChunk
from dualtrace.questions.asked import (
    ForwardQuestion,
    Input,
    LogprobItem,
    LogprobQuestion,
    MaskedForwardQuestion,
    NextTokenQuestion,
    RollingQuestion,
    ScoreQuestion,
    TokenizeQuestion,
    Variant,
)
from dualtrace.reference.engine import load
from dualtrace.runs.collector import RunCollector
from dualtrace.runs.run import Run, ScoredItem, read_run, run_to_text
from dualtrace.runs.stored_scorer import StoredScorer
from dualtrace.scorer import Scorer
from dualtrace.tokens import Tokenizer
from tests.support.scorers import all_events, fake_scorer, only
from tests.support.tiny import tiny_model

TEXT = "The answer is 🙂, they say."
QUESTIONS: dict[str, ForwardQuestion] = {
    "rolling": RollingQuestion((Input(text=TEXT), Input(ids=int_array([5, 6, 7]))), top_k=2),
    "windows": RollingQuestion((Input(text=TEXT),), max_tokens=6, stride=3),
    "logprob": LogprobQuestion((LogprobItem(Input(text="The"), Input(text=" answer is")),)),
    "a bad item": LogprobQuestion(
        (LogprobItem(Input(text="a"), Input(text="")), LogprobItem(Input(text="a"), Input(text="b")))
    ),
    "next": NextTokenQuestion((Input(text="The"), Input(ids=int_array([]))), 3, (9, 4)),
    "score": ScoreQuestion(Input(text="Is it "), (Input(text="so"), Input(text="not")), (5, 6), apply_softmax=True),
}


async def stored(scorer: Scorer, question: ForwardQuestion) -> Run:
    collector = RunCollector("fake:", question)
    for event in await all_events(scorer, question):
        collector.push(event)
    return read_run(run_to_text(collector.run()))


async def fake_run(question: ForwardQuestion) -> Run:
    scorer = fake_scorer()
    try:
        return await stored(scorer, question)
    finally:
        await scorer.close()


async def replayed(scorer: StoredScorer) -> Run:
    collector = RunCollector("fake:", scorer.question)
    for event in await all_events(scorer, scorer.question):
        collector.push(event)
    return collector.run()


async def until_it_breaks(scorer: StoredScorer) -> tuple[list[Any], Internal]:
    events: list[Any] = []
    try:
        async for event in scorer.ask(scorer.question):
            events.append(event)
    except Internal as problem:
        return events, problem
    raise AssertionError("it did not break off")


@pytest.mark.parametrize("name", QUESTIONS)
async def test_a_replayed_run_is_the_run(name: str) -> None:
    run = await fake_run(QUESTIONS[name])
    again = await replayed(StoredScorer(run, "a run"))
    assert run_to_text(replace(again, created=run.created)) == run_to_text(run)


async def test_documents_whose_first_token_is_unscored_leave_a_gap_in_the_replay() -> None:
    folder = tiny_model()
    mask = parse_json({"base": {"doc_isolation": {"boundaries": [4]}}})
    question = MaskedForwardQuestion(Input(ids=int_array(range(9))), (Variant(), Variant(mask=mask)))
    scorer = EngineScorer(load(EngineSettings(model=folder)), Tokenizer.from_directory(folder))
    try:
        run = await stored(scorer, question)
    finally:
        await scorer.close()
    chosen = StoredScorer(run, "a run", 1)
    chunks = only(await all_events(chosen, chosen.question), TokenChunk)
    assert [chunk.first_index for chunk in chunks] == [1, 5]
    again = await replayed(chosen)
    assert run_to_text(replace(again, created=run.created)) == run_to_text(chosen.narrowed_run)


async def test_a_run_of_several_variants_asks_which() -> None:
    run = await fake_run(replace(QUESTIONS["rolling"], variants=(Variant(), Variant())))
    with pytest.raises(InvalidArgument, match="0-1"):
        StoredScorer(run, "a run")
    assert StoredScorer(run, "a run", 1).question.variants == (Variant(),)


async def test_another_question_is_refused() -> None:
    scorer = StoredScorer(await fake_run(QUESTIONS["rolling"]), "a run")
    with pytest.raises(FailedPrecondition) as caught:
        await all_events(scorer, RollingQuestion((Input(text="something else"),), top_k=2))
    assert caught.value.reason is Reason.CONFLICT


async def test_a_run_that_broke_off_tells_what_it_has_and_then_that_it_is_incomplete() -> None:
    run = replace(await fake_run(QUESTIONS["rolling"]), complete=False, usage=None, execution=None)
    scorer = StoredScorer(run, "a run")
    events, problem = await until_it_breaks(scorer)
    assert problem.reason is Reason.INCOMPLETE_STREAM
    assert len(only(events, TokenChunk)) == 2
    assert not only(events, AnswerSummary)


async def test_an_item_that_broke_off_is_not_done_in_the_replay() -> None:
    run = await fake_run(QUESTIONS["rolling"])
    first, second = run.entries
    assert isinstance(second, ScoredItem)
    half = replace(second, total_logprob=None, mean_logprob=None, perplexity=None, is_greedy=None)
    scorer = StoredScorer(replace(run, entries=(first, half), complete=False), "a run")
    events, _problem = await until_it_breaks(scorer)
    assert [event.item for event in only(events, ItemDone)] == [0]


async def test_tokens_are_no_numbers_to_replay() -> None:
    run = replace(await fake_run(QUESTIONS["rolling"]), question=TokenizeQuestion((Input(text="a"),)), entries=())
    with pytest.raises(Unsupported):
        StoredScorer(run, "a run")


async def test_entries_that_are_not_in_the_order_of_the_items_are_refused() -> None:
    run = await fake_run(QUESTIONS["rolling"])
    with pytest.raises(InvalidArgument, match="item"):
        StoredScorer(replace(run, entries=tuple(reversed(run.entries))), "a run")
