"""The engines under contract: each loaded once a session by its own `load`, over tiny models where it needs one."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from dualtrace.scorer import Scorer
from tests.support.contract import Subject, load_subject
from tests.support.scorers import connected


@pytest.fixture(params=["llama", "gpt2"])
def subject(engine_name: str, request: pytest.FixtureRequest) -> Subject:
    """The engine under test over a tiny model of each family; the fake engine has none, its seed stands in."""
    return load_subject(engine_name, str(request.param))


@pytest.fixture(params=["in process", "over the wire"])
async def scorer(subject: Subject, request: pytest.FixtureRequest) -> AsyncIterator[Scorer]:
    """Questions to that engine through queue and batches; and all of them again from behind a socket."""
    made = subject.scorer()
    if request.param == "in process":
        yield made
        await made.close()
    else:
        async with connected(made, preflight=False) as client:
            yield client
