"""Siblings behind one past go through attention apart, in a batch: each is what it is alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from dualtrace.arrays import FloatArray
from dualtrace.engine import NOTHING, Engine, EngineSettings, Read, Segment, int_array
from dualtrace.masks.plan import MaskPlan
from tests.support.masked import IDS, MASKS, TOKENS, plan_for, run
from tests.support.tiny import tiny_model
from tests.support.tolerances import FLOAT64

pytestmark = pytest.mark.torch

ROWS = int_array(range(TOKENS))
PAST = 10
STOPS = {"equally long": (TOKENS, TOKENS, TOKENS), "unequally long": (TOKENS, PAST + 1, 17)}
CUT_EVERYWHERE = (  # masks that let each of these texts end where it ends
    "causal", "sliding", "chunked", "documents", "array of layers, zero", "edge in one layer and head", "edges",
    "zeroed after the softmax", "rows that see nothing",
)  # fmt: skip


@cache
def engine_of(attention: str = "gqa", dtype: str = "float64") -> Engine:
    import backend_torch

    return backend_torch.load(EngineSettings(model=tiny_model(attention=attention), dtype=dtype))


def siblings(engine: Engine, plan: MaskPlan | None, stops: tuple[int, ...]) -> list[FloatArray]:
    leaves = [Segment(IDS[PAST:stop], ROWS[PAST:stop], 0, mask=plan) for stop in stops]
    reads = [Read(ROWS[PAST - 1 : stop], IDS[PAST - 1 : stop]) for stop in stops]
    answers = run(engine, [Segment(IDS[:PAST], ROWS[:PAST], mask=plan), *leaves], [NOTHING, *reads])
    return [answers[1 + number].logprobs for number in range(len(stops))]


def alone(engine: Engine, plan: MaskPlan | None) -> FloatArray:
    return run(engine, [Segment(IDS, ROWS, mask=plan)], [Read(ROWS[PAST - 1 :], IDS[PAST - 1 :])])[0].logprobs


def test_siblings_take_the_way_that_is_tested_here(monkeypatch: pytest.MonkeyPatch) -> None:
    import backend_torch.attention as attention

    calls: list[int] = []
    true_apart = attention.attend_apart

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return true_apart(*arguments)

    monkeypatch.setattr(attention, "attend_apart", counted)
    siblings(engine_of(), None, STOPS["unequally long"])
    assert len(calls) == engine_of().card.layers


@pytest.mark.parametrize("stops", STOPS)
@pytest.mark.parametrize("attention", ["mha", "gqa", "mqa"])
def test_a_plain_sibling_is_what_it_is_alone(attention: str, stops: str) -> None:
    wanted = alone(engine_of(attention), None)
    for found in siblings(engine_of(attention), None, STOPS[stops]):
        assert float(np.abs(found - wanted[: found.size]).max()) <= FLOAT64.abs_epsilon


@pytest.mark.parametrize("stops", STOPS)
@pytest.mark.parametrize("name", CUT_EVERYWHERE)
def test_a_masked_sibling_is_what_it_is_alone(name: str, stops: str) -> None:
    plan = plan_for(engine_of().card, MASKS[name])
    wanted = alone(engine_of(), plan)
    for found in siblings(engine_of(), plan, STOPS[stops]):
        assert float(np.abs(found - wanted[: found.size]).max()) <= FLOAT64.abs_epsilon


def test_siblings_of_different_texts_do_not_see_each_other() -> None:
    other = np.where(IDS == 42, 43, IDS)[PAST:][::-1].astype(np.int32)
    texts = [IDS[PAST:], other, IDS[PAST:]]
    leaves = [Segment(text, ROWS[PAST:], 0) for text in texts]
    reads = [NOTHING, *[Read(ROWS[PAST:], IDS[PAST:])] * 3]
    answers = run(engine_of(), [Segment(IDS[:PAST], ROWS[:PAST]), *leaves], reads)
    for number, text in enumerate(texts):
        whole = int_array([*IDS[:PAST], *text])
        wanted = run(engine_of(), [Segment(whole, ROWS)], [Read(ROWS[PAST:], IDS[PAST:])])[0].logprobs
        assert float(np.abs(answers[1 + number].logprobs - wanted).max()) <= FLOAT64.abs_epsilon
