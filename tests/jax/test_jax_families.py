"""Every family that the JAX engine claims: what it answers is what transformers answers in float64."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backend_jax import load
from backend_jax.families import family_names
from dualtrace.arrays import FloatArray
from dualtrace.engine import Batch, Engine, EngineSettings, Read, Readout, Segment, int_array
from dualtrace.masks import receipt
from dualtrace.masks import spec as s
from dualtrace.masks.plan import MaskPlan, compile_mask
from dualtrace.masks.resolve import MaskContext, geometry_of, resolve
from dualtrace.problems import Problem, Reason
from tests.support.tiny_families import FAMILIES, VOCABULARY, family_model
from tests.support.tolerances import FLOAT32_HIGHEST

pytestmark = pytest.mark.torch

TOKENS = 40  # longer than the window of those that have one
IDS = np.random.default_rng(3).integers(3, VOCABULARY, TOKENS, dtype=np.int32)
ROWS = int_array(range(TOKENS))


@cache
def engine_of(family: str) -> Engine:
    return load(EngineSettings(model=family_model(family), step_tokens=32))


@cache
def transformers_logprobs(family: str) -> FloatArray:
    """[T, V] float64"""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(family_model(family), attn_implementation="eager")
    model = model.double().train(False)
    with torch.no_grad():
        found: FloatArray = model(torch.tensor(IDS[None].astype(np.int64))).logits[0].log_softmax(-1).numpy()
    return found


def every_logprob(engine: Engine, mask: MaskPlan | None = None) -> tuple[FloatArray, list[Readout]]:
    batch = Batch((Segment(IDS, ROWS, mask=mask),))
    reads = (Read(ROWS, extra_ids=int_array(range(VOCABULARY))),)
    readouts = [readout for step in engine.forward(batch, reads, lambda _: True) for readout in step]
    parts = [readout.extra_logprobs for readout in readouts if readout.extra_logprobs is not None]
    return np.concatenate(parts), readouts


def plain_mask(engine: Engine) -> MaskPlan:
    """The causal mask, which takes the path of masks and leaves the model as it is."""
    context = MaskContext(TOKENS, geometry_of(engine.card))
    return compile_mask(resolve(s.MaskSpec(s.Causal()), context))


def test_every_family_of_the_registry_is_tested() -> None:
    tested = {json.loads((family_model(name) / "config.json").read_text())["model_type"] for name in FAMILIES}
    assert set(family_names()) == tested


@pytest.mark.parametrize("family", FAMILIES)
def test_every_logprob_is_that_of_transformers(family: str) -> None:
    found, _ = every_logprob(engine_of(family))
    assert np.abs(found - transformers_logprobs(family)).max() <= FLOAT32_HIGHEST.abs_epsilon


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_that_changes_nothing_keeps_the_native_windows(family: str) -> None:
    engine = engine_of(family)
    plan = plain_mask(engine)
    found, readouts = every_logprob(engine, plan)
    total = receipt.no_counts(engine.card.layers, engine.card.query_heads)
    for readout in readouts:
        assert readout.counts is not None
        total = total + readout.counts
    receipt.check(total, plan)
    assert np.abs(found - transformers_logprobs(family)).max() <= FLOAT32_HIGHEST.abs_epsilon


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma2", "gemma3", "phi3"])
def test_the_card_names_the_window_of_each_layer(family: str) -> None:
    card = engine_of(family).card
    assert len(card.windows) == card.layers
    assert any(window is not None for window in card.windows)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_config_key_is_refused_by_name(family: str, tmp_path: Path) -> None:
    folder = tmp_path / family
    shutil.copytree(family_model(family), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"logit_warp": 2}))
    with pytest.raises(Problem, match="logit_warp") as caught:
        load(EngineSettings(model=folder))
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED
