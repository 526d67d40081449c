"""The engines under contract: each loaded once a session by its own `load`, over tiny models where it needs one."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from dualtrace.engine_scorer import EngineScorer
from tests.support.contract import Subject, load_subject


@pytest.fixture(params=["llama", "gpt2"])
def subject(engine_name: str, request: pytest.FixtureRequest) -> Subject:
    """The engine under test over a tiny model of each family; the fake engine has none, its seed stands in."""
    return load_subject(engine_name, str(request.param))


@pytest.fixture
async def scorer(subject: Subject) -> AsyncIterator[EngineScorer]:
    """Questions to that engine, through queue and batches."""
    made = subject.scorer()
    yield made
    await made.close()
