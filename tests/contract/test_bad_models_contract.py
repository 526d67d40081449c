"""Models whose numbers are unusable: never a score, never ready, and the items that are sound are still answered."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from dualtrace.engine import Engine
from dualtrace.engine_scorer import EngineScorer
from dualtrace.fake import fake_tokenizer
from dualtrace.problems import BadNumbers, Reason
from dualtrace.questions.asked import NextTokenQuestion, PreflightQuestion, RollingQuestion, ScoreQuestion
from dualtrace.scorer import ask_one
from dualtrace.tokens import Tokenizer
from tests.support.answering import ask_logprob, gather, ids
from tests.support.contract import changed_model, set_row
from tests.support.engines import load_engine
from tests.support.scorers import all_events
from tests.support.tiny import tiny_model

SPOILT = 7  # the token id whose embedding is spoilt, or the row where the fake engine's logits are


def scorer_over(engine: Engine) -> EngineScorer:
    tokenizer = fake_tokenizer() if engine.card.provenance.synthetic else Tokenizer.from_directory(tiny_model())
    return EngineScorer(engine, tokenizer)


@pytest.fixture(params=[math.nan, math.inf], ids=["nan", "infinity"])
def one_bad_token(engine_name: str, request: pytest.FixtureRequest, tmp_path: Path) -> EngineScorer:
    """A model that gives bad numbers wherever token SPOILT was seen, and nowhere else."""
    if engine_name == "fake":
        return scorer_over(load_engine("fake", Path(), spec=f"nan_at={SPOILT}"))
    folder = changed_model(tmp_path, "model.embed_tokens.weight", set_row(SPOILT, request.param))
    return scorer_over(load_engine(engine_name, folder))


@pytest.fixture
def broken(engine_name: str, tmp_path: Path) -> EngineScorer:
    """A model that gives bad numbers everywhere."""
    if engine_name == "fake":
        return scorer_over(load_engine("fake", Path(), spec="nan_at=3"))
    return scorer_over(load_engine(engine_name, changed_model(tmp_path, "model.norm.weight", set_row(0, math.nan))))


BAD = [1] * SPOILT + [SPOILT, 1, 1]  # both the token and the row that are spoilt
GOOD = [1, 2, 3]


async def test_a_bad_completion_is_a_problem_of_its_item_and_the_other_is_answered(one_bad_token: EngineScorer) -> None:
    question = ask_logprob((ids(*BAD[: SPOILT + 1]), ids(1)), (ids(*GOOD), ids(1)))
    gathered = gather(await all_events(one_bad_token, question))
    await one_bad_token.close()
    problem = gathered[0, 0].problem
    assert isinstance(problem, BadNumbers)
    assert (problem.reason, problem.detail.item) == (Reason.NON_FINITE_LOGITS, 0)
    assert gathered[1, 0].done is not None
    assert np.isfinite(gathered[1, 0].logprobs).all()


async def test_a_bad_text_is_a_problem_of_its_item_with_row_and_token(one_bad_token: EngineScorer) -> None:
    gathered = gather(await all_events(one_bad_token, RollingQuestion((ids(*BAD), ids(*GOOD)))))
    await one_bad_token.close()
    problem = gathered[0, 0].problem
    assert isinstance(problem, BadNumbers)
    assert (problem.reason, problem.detail.item) == (Reason.NON_FINITE_LOGITS, 0)
    assert f"row {SPOILT}, which predicts token {SPOILT + 1}" in problem.detail.message
    assert gathered[1, 0].done is not None


async def test_a_bad_prompt_has_no_distribution_and_a_bad_item_no_score(one_bad_token: EngineScorer) -> None:
    prompt = BAD[: SPOILT + 1]
    following = await ask_one(one_bad_token, NextTokenQuestion((ids(*prompt), ids(*GOOD)), top_k=2))
    scored = await ask_one(one_bad_token, ScoreQuestion(ids(), (ids(*prompt), ids(*GOOD)), labels=(1, 2)))
    await one_bad_token.close()
    assert isinstance(following.results[0].outcome, BadNumbers)
    assert not isinstance(following.results[1].outcome, BadNumbers)
    assert isinstance(scored.results[0].problem, BadNumbers)
    assert scored.results[0].scores == ()
    assert scored.results[1].problem is None


async def test_preflight_names_the_view_whose_numbers_are_bad(broken: EngineScorer) -> None:
    answer = await ask_one(broken, PreflightQuestion())
    await broken.close()
    (result,) = answer.results
    assert not result.ok
    assert isinstance(result.problem, BadNumbers)
    assert result.problem.reason is Reason.NON_FINITE_LOGITS
    assert "base" in result.problem.detail.message
