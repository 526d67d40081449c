"""Every family that the torch engine claims: what it answers is what transformers answers."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import numpy as np
import pytest

from dualtrace.arrays import FloatArray, IntArray
from dualtrace.engine import NOTHING, Batch, Engine, EngineSettings, Read, Readout, Segment, int_array
from dualtrace.masks import receipt
from dualtrace.masks import spec as s
from dualtrace.masks.plan import MaskPlan, compile_mask
from dualtrace.masks.resolve import MaskContext, geometry_of, resolve
from tests.support.tiny_families import FAMILIES, VOCABULARY, WINDOW, family_model
from tests.support.tolerances import FLOAT64

pytestmark = [pytest.mark.torch, pytest.mark.parametrize("family", FAMILIES)]

TOKENS = 40
IDS = np.random.default_rng(3).integers(3, VOCABULARY, TOKENS, dtype=np.int32)
ROWS = int_array(range(TOKENS))
EVERY_ID = int_array(range(VOCABULARY))
PLANTED = "planted_eager"


@pytest.fixture(autouse=True)
def no_float32_islands(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes norms, softmax and angles in float32 even in a float64 model: here it may not, on either
    side, so that what is left is only our doing."""
    import torch

    engine_of(family), engine_of(family, step_tokens=7)  # loading needs the true float32
    transformers_model(family, "eager"), transformers_model(family, PLANTED)
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@cache
def engine_of(family: str, step_tokens: int = 256) -> Engine:
    import backend_torch

    settings = EngineSettings(model=family_model(family), dtype="float64", step_tokens=step_tokens)
    return backend_torch.load(settings)


def planted_eager(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **others: Any) -> Any:
    """The family's own eager attention, given the mask of the layer: what a hook on eager does."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    biases = others.pop("planted_biases")
    return eager(module, query, key, value, biases[module.layer_idx], **others)


@cache
def transformers_model(family: str, attention: str) -> Any:
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(PLANTED, planted_eager)
    AttentionMaskInterface.register(PLANTED, lambda *_, **__: None)
    model: Any = AutoModelForCausalLM.from_pretrained(
        family_model(family), attn_implementation=attention, dtype=torch.float64
    )
    return model.requires_grad_(False).train(False)


def theirs(family: str, plan: MaskPlan | None = None) -> FloatArray:
    """[T,V] log-softmax rows of transformers' own forward."""
    import torch

    named: dict[str, Any] = {}
    if plan is not None:
        blocks = [torch.from_numpy(plan.block(layer, 0, TOKENS)) for layer in range(plan.layers)]
        named["planted_biases"] = [
            torch.zeros(block.shape, dtype=torch.float64).masked_fill(~block, float("-inf"))[None] for block in blocks
        ]
    model = transformers_model(family, "eager" if plan is None else PLANTED)
    with torch.no_grad():
        logits = model(torch.tensor([IDS.tolist()]), use_cache=False, **named).logits[0]
    rows: FloatArray = logits.log_softmax(-1).numpy()
    return rows


def cut_plan(family: str) -> MaskPlan:
    """Cuts in one layer and two heads, and in all heads of the last layer; native windows stay."""
    edges = (
        s.Edge(s.TokenRange(20, TOKENS), s.TokenRange(12, 19), layers=(1,), heads=(0, 3)),
        s.Edge(s.TokenRange(30, TOKENS), s.TokenRange(2, 28), layers=(2,)),
    )
    geometry = geometry_of(engine_of(family).card)
    return compile_mask(resolve(s.MaskSpec(edges=edges), MaskContext(TOKENS, geometry)))


def collect(engine: Engine, segments: list[Segment], reads: list[Read]) -> dict[int, list[Readout]]:
    found: dict[int, list[Readout]] = {}
    for step in engine.forward(Batch(tuple(segments)), tuple(reads), lambda _: True):
        for readout in step:
            found.setdefault(readout.segment, []).append(readout)
    return found


def ours(engine: Engine, segments: list[Segment], reads: list[Read], index: int) -> FloatArray:
    parts = [readout.extra_logprobs for readout in collect(engine, segments, reads)[index]]
    return np.concatenate([part for part in parts if part is not None])


def whole(plan: MaskPlan | None = None) -> Segment:
    return Segment(IDS, ROWS, mask=plan)


def rest(start: int, parent: int, plan: MaskPlan | None = None) -> Segment:
    return Segment(IDS[start:], ROWS[start:], parent, mask=plan)


def everything(rows: IntArray = ROWS) -> Read:
    return Read(rows, extra_ids=EVERY_ID)


def largest_difference(left: FloatArray, right: FloatArray) -> float:
    assert left.shape == right.shape
    return float(np.abs(left - right).max())


def test_the_text_is_longer_than_the_window(family: str) -> None:
    assert WINDOW < TOKENS
    assert all(window in (None, WINDOW) for window in engine_of(family).card.windows)


def test_a_plain_text_equals_transformers_own_forward(family: str) -> None:
    found = ours(engine_of(family), [whole()], [everything()], 0)
    assert largest_difference(found, theirs(family)) <= FLOAT64.abs_epsilon


def test_a_mask_of_layers_and_heads_equals_eager_with_that_mask(family: str) -> None:
    plan = cut_plan(family)
    found = ours(engine_of(family), [whole(plan)], [everything()], 0)
    assert largest_difference(found, theirs(family, plan)) <= FLOAT64.abs_epsilon


def test_the_mask_is_not_without_effect(family: str) -> None:
    assert largest_difference(theirs(family, cut_plan(family)), theirs(family)) > 1e-3


def test_steps_equal_one_forward(family: str) -> None:
    found = ours(engine_of(family, step_tokens=7), [whole()], [everything()], 0)
    assert largest_difference(found, theirs(family)) <= FLOAT64.abs_epsilon


def test_masked_steps_equal_eager_and_prove_the_mask(family: str) -> None:
    plan = cut_plan(family)
    readouts = collect(engine_of(family, step_tokens=7), [whole(plan)], [everything()])[0]
    found = np.concatenate([r.extra_logprobs for r in readouts if r.extra_logprobs is not None])
    assert largest_difference(found, theirs(family, plan)) <= FLOAT64.abs_epsilon
    counts = [readout.counts for readout in readouts if readout.counts is not None]
    receipt.check(sum(counts[1:], counts[0]), plan)


@pytest.fixture
def variants(family: str) -> dict[int, list[Readout]]:
    """Base and cut behind one prefix of 20 rows: below layer 1 they are the same computation."""
    plan = cut_plan(family)
    causal = compile_mask(resolve(s.MaskSpec(), MaskContext(TOKENS, geometry_of(engine_of(family).card))))
    prefix = Segment(IDS[:20], ROWS[:20], mask=causal)
    segments = [prefix, rest(20, 0, causal), rest(20, 0, plan), rest(20, 0, causal)]
    return collect(engine_of(family), segments, [NOTHING, *[everything(ROWS[19:])] * 3])


def test_variants_that_part_at_a_layer_equal_full_forwards(family: str, variants: dict[int, list[Readout]]) -> None:
    for index, plan in ((1, None), (2, cut_plan(family)), (3, None)):
        (readout,) = variants[index]
        assert readout.extra_logprobs is not None
        assert largest_difference(readout.extra_logprobs, theirs(family, plan)[19:]) <= FLOAT64.abs_epsilon


def test_a_variant_that_never_parts_is_not_computed_again(family: str, variants: dict[int, list[Readout]]) -> None:
    assert [variants[index][0].computed_tokens for index in (1, 2, 3)] == [20, 20, 0]
