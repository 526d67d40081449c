"""One token is bent in a sidecar; a coordinator finds it at its place, wherever that is, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dualtrace.client import Connection
from dualtrace.compare.events import FirstDivergence
from dualtrace.compare.report import CompareReport, Verdict
from dualtrace.compare.tolerance import Tolerance
from dualtrace.coordinator_client import CompareOutcome, CoordinatorClient
from dualtrace.engine import int_array
from dualtrace.library import ComparePlan, SideSpec
from dualtrace.masks import spec as s
from dualtrace.questions.asked import (
    Input,
    LogprobItem,
    LogprobQuestion,
    NextTokenQuestion,
    Question,
    RollingQuestion,
    ScoreQuestion,
    Variant,
)
from dualtrace.tokens import Prefix
from tests.support.contract import changed_model, set_row
from tests.support.coordinated import House
from tests.support.processes import Processes
from tests.support.tiny import tiny_model

ROW = 16  # the row whose logits are bent; it predicts the token after it
TOKEN = ROW + 1
BENT = f"plant_at={ROW},plant=3"
# Backends whose engines make one step, end a step with the bent row, begin one with it.
STEPS = {"whole": BENT, "cut-behind": f"step={ROW + 1},{BENT}", "cut-before": f"step={ROW},{BENT}"}

SPOILT = 99  # the id whose embedding is spoilt in the checkpoint of `broken`
AT, LENGTH = 10, 24  # where it stands, in a text of so many tokens
CLOSE = Tolerance("given", 1e-9, 0.0, "both sides are the same float64 numbers but for what was planted")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("planted")
    broken = changed_model(folder, "model.embed_tokens.weight", set_row(SPOILT, 0.5))
    models = {"sound": tiny_model(), "broken": broken}
    with Processes(folder) as processes:
        yield House(processes, folder / "data", {"plain": "", **STEPS}, models=models).start()


def ids(count: int) -> Input:
    return Input(ids=int_array([i * 7 % 250 for i in range(count)]))


async def compare(house: House, question: Question, left: SideSpec, right: SideSpec) -> CompareReport:
    """The report; and what was announced on the way is what it says."""
    plan = ComparePlan(question, left, right, tolerance=CLOSE, store=False)  # type: ignore[arg-type]
    async with CoordinatorClient(Connection(house.address)) as client:
        told = [event async for event in client.compare(plan)]
    outcome = told[-1]
    assert isinstance(outcome, CompareOutcome)
    announced = [(event.item, event.index) for event in told if isinstance(event, FirstDivergence)]
    tokens = outcome.report.tokens
    if tokens is not None:
        assert announced == [(tokens.first_divergence_item, tokens.first_divergence_index)]
    return outcome.report


async def compare_with(house: House, question: Question, name: str = "whole") -> CompareReport:
    report = await compare(house, question, SideSpec("backend:plain"), SideSpec(f"backend:{name}"))
    assert report.verdict is Verdict.FAIL
    return report


def found_in(report: CompareReport) -> tuple[int | None, int | None, int]:
    """Item and index of the first divergence, and how many tokens part."""
    assert report.tokens is not None
    tokens = report.tokens
    return tokens.first_divergence_item, tokens.first_divergence_index, tokens.token_mismatch_count


PLACES: dict[str, tuple[Question, int, int]] = {
    "first scored": (LogprobQuestion((LogprobItem(ids(TOKEN), ids(8)),)), 0, TOKEN),
    "middle": (RollingQuestion((ids(40),)), 0, TOKEN),
    "last": (RollingQuestion((ids(TOKEN + 1),)), 0, TOKEN),
    "behind a prefix": (RollingQuestion((ids(40),), prefix=Prefix(token_id=1)), 0, TOKEN - 1),
    "second item": (LogprobQuestion((LogprobItem(ids(4), ids(8)), LogprobItem(ids(4), ids(30)))), 1, TOKEN),
}


@pytest.mark.parametrize("place", PLACES)
async def test_a_bent_token_is_found_where_it_stands(house: House, place: str) -> None:
    question, item, index = PLACES[place]
    assert found_in(await compare_with(house, question)) == (item, index, 1)


@pytest.mark.parametrize("name", STEPS)
async def test_a_bent_token_beside_a_step_cut_is_one_token(house: House, name: str) -> None:
    report = await compare_with(house, RollingQuestion((ids(40),)), name)
    assert found_in(report) == (0, TOKEN, 1)


@pytest.mark.parametrize(
    ("masked", "count"), [(True, 1), (False, LENGTH - AT - 1)], ids=["under a mask that hides it", "without a mask"]
)
async def test_a_fault_in_one_token_is_as_wide_as_what_sees_it(house: House, masked: bool, count: int) -> None:
    cut = s.MaskSpec(edges=(s.Edge(s.TokenRange(AT + 1, LENGTH), s.TokenRange(AT, AT + 1)),))
    variant = Variant(mask=cut) if masked else Variant()
    sequence = [i * 7 % 90 for i in range(LENGTH)]
    sequence[AT] = SPOILT
    question = RollingQuestion((Input(ids=int_array(sequence)),))
    report = await compare(house, question, SideSpec("backend:sound", variant), SideSpec("backend:broken", variant))
    assert found_in(report) == (0, AT + 1, count)


async def test_a_bent_row_is_found_in_the_prompt_that_reads_it(house: House) -> None:
    report = await compare_with(house, NextTokenQuestion((ids(5), ids(TOKEN), ids(TOKEN + 1)), top_k=3))
    assert [one.status for one in report.distributions] == ["MATCH", "MISMATCH", "MATCH"]


async def test_a_bent_row_is_found_in_the_item_whose_labels_it_reads(house: House) -> None:
    question = ScoreQuestion(ids(10), (ids(2), ids(TOKEN - 10), ids(12)), labels=(0, 5))
    report = await compare_with(house, question)
    assert [one.status for one in report.labels] == ["MATCH", "MISMATCH", "MATCH"]
