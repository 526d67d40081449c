"""Adapters on every family, fused projections and those outside the layers among them, are what peft computes."""

from __future__ import annotations

from functools import cache

import pytest

from backend_jax import load
from backend_jax.engine import JaxEngine
from dualtrace.engine import Batch, EngineSettings, Read, Readout, Segment
from dualtrace.views import finetuned
from tests.support.tiny_families import FAMILIES, family_model
from tests.torch.test_adapters_on_families import (
    EVERY_ID,
    FUSED,
    IDS,
    PEFT_EPSILON,
    ROWS,
    VIEWS,
    largest_difference,
    theirs,
    with_peft,
)

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
]

PARTS = FUSED | {"opt": "project_in", "llama": "down_proj"}


@cache
def engine_of(family: str) -> JaxEngine:
    return load(EngineSettings(model=family_model(family), adapters=(("a", with_peft(family)[0]),)))


def views_beside_each_other(family: str) -> dict[int, Readout]:
    segments = tuple(Segment(IDS, ROWS, view=view) for view, _strength in VIEWS.values())
    reads = (Read(ROWS, extra_ids=EVERY_ID),) * len(segments)
    steps = engine_of(family).forward(Batch(segments), reads, lambda _: True)
    return {readout.segment: readout for step in steps for readout in step}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_wears_an_adapter_as_peft_does(family: str) -> None:
    found = views_beside_each_other(family)
    for number, (_view, strength) in enumerate(VIEWS.values()):
        assert largest_difference(found[number], theirs(family, strength)) <= PEFT_EPSILON


@pytest.mark.parametrize("family", PARTS)
def test_what_got_a_delta_is_named(family: str) -> None:
    batch, reads = Batch((Segment(IDS, ROWS, view=finetuned("a")),)), (Read(ROWS[:1]),)
    (readout,) = next(engine_of(family).forward(batch, reads, lambda _: True))
    assert readout.delta_modules is not None
    assert any(module.endswith(PARTS[family]) for module in readout.delta_modules)
