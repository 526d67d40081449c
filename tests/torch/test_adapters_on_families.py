"""Adapters on every family, fused projections among them, are what peft computes: off, on and beyond."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualtrace.arrays import FloatArray
from dualtrace.engine import NOTHING, Batch, Engine, EngineSettings, Read, Readout, Segment, int_array
from dualtrace.masks import spec as s
from dualtrace.masks.plan import compile_mask
from dualtrace.masks.resolve import MaskContext, geometry_of, resolve
from dualtrace.views import BASE, View, finetuned, scaled
from tests.support.tiny_families import FAMILIES, VOCABULARY, family_model

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
]

TOKENS = 40
IDS = np.random.default_rng(5).integers(3, VOCABULARY, TOKENS, dtype=np.int32)
ROWS = int_array(range(TOKENS))
EVERY_ID = int_array(range(VOCABULARY))
PEFT_EPSILON = 1e-5  # issue "The PyTorch sidecar", point 5
VIEWS: dict[str, tuple[View, float]] = {
    "off": (BASE, 0.0),
    "on": (finetuned("a"), 1.0),
    "scaled": (scaled("a", 1.25), 1.25),
}
FUSED = {"gpt_neox": "query_key_value", "phi3": "qkv_proj", "gpt2": "c_attn"}


@cache
def with_peft(family: str) -> tuple[Path, Any]:
    """A folder that peft wrote, every linear module adapted and no factor zero; and the adapted model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(family_model(family), attn_implementation="eager")
    settings = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules="all-linear",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        fan_in_fan_out=family == "gpt2",
    )
    torch.manual_seed(1)
    adapted: Any = get_peft_model(base, settings)
    folder = Path(tempfile.mkdtemp(prefix="dualtrace-peft-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    adapted.save_pretrained(str(folder))
    return folder, adapted.requires_grad_(False).train(False)


@cache
def engine_of(family: str) -> Engine:
    import backend_torch

    return backend_torch.load(EngineSettings(model=family_model(family), adapters=(("a", with_peft(family)[0]),)))


@cache
def theirs(family: str, strength: float) -> FloatArray:
    """[T,V] log-softmax rows."""
    import torch

    adapted = with_peft(family)[1]
    scalings = [(module, getattr(module, "scaling", None)) for module in adapted.modules()]
    kept = [(module, dict(scaling)) for module, scaling in scalings if isinstance(scaling, dict)]
    for module, scaling in kept:
        module.scaling = {name: value * strength for name, value in scaling.items()}
    with torch.no_grad():
        logits = adapted(torch.tensor([IDS.tolist()]), use_cache=False).logits[0].double()
    for module, scaling in kept:
        module.scaling = scaling
    rows: FloatArray = logits.log_softmax(-1).numpy()
    return rows


def ours(family: str, segments: list[Segment], reads: list[Read]) -> dict[int, Readout]:
    steps = engine_of(family).forward(Batch(tuple(segments)), tuple(reads), lambda _: True)
    return {readout.segment: readout for step in steps for readout in step}


def largest_difference(readout: Readout, wanted: FloatArray) -> float:
    assert readout.extra_logprobs is not None
    return float(np.abs(readout.extra_logprobs - wanted).max())


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_wears_an_adapter_as_peft_does(family: str, name: str) -> None:
    view, strength = VIEWS[name]
    found = ours(family, [Segment(IDS, ROWS, view=view)], [Read(ROWS, extra_ids=EVERY_ID)])
    assert largest_difference(found[0], theirs(family, strength)) <= PEFT_EPSILON


@pytest.mark.parametrize("family", FAMILIES)
def test_views_of_one_batch_that_part_at_a_layer_stay_apart(family: str) -> None:
    """A cut in the last layer forks the rows there; each row must keep its own view before and after."""
    geometry = geometry_of(engine_of(family).card)
    cut = s.MaskSpec(edges=(s.Edge(s.TokenRange(30, TOKENS), s.TokenRange(2, 28), layers=(2,)),))
    causal, masked = (compile_mask(resolve(spec, MaskContext(TOKENS, geometry))) for spec in (s.MaskSpec(), cut))
    views = [view for view, _strength in VIEWS.values()]
    segments = [Segment(IDS, ROWS, view=view, mask=mask) for view in views for mask in (masked, causal)]
    found = ours(family, segments, [Read(ROWS, extra_ids=EVERY_ID)] * len(segments))
    for number, (_view, strength) in enumerate(VIEWS.values()):
        assert largest_difference(found[2 * number + 1], theirs(family, strength)) <= PEFT_EPSILON


@pytest.mark.parametrize("count", [6, 60], ids=["few turns", "many turns"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_texts_whose_views_take_turns_in_one_batch_are_what_they_are_alone(family: str, count: int) -> None:
    rows, views = ROWS[:16], [view for view, _strength in VIEWS.values()]
    segments = [Segment(np.roll(IDS, number)[:16], rows, view=views[number % 3]) for number in range(count)]
    read = Read(rows, extra_ids=EVERY_ID)
    found = ours(family, segments, [read] * count)
    for number, segment in enumerate(segments):
        alone = ours(family, [segment], [read])[0].extra_logprobs
        assert alone is not None
        assert largest_difference(found[number], alone) <= PEFT_EPSILON


@pytest.mark.parametrize("family", FUSED)
def test_a_fused_projection_is_among_the_modules_that_got_a_delta(family: str) -> None:
    found = ours(family, [Segment(IDS, ROWS, view=finetuned("a"))], [NOTHING])
    modules = found[0].delta_modules
    assert modules is not None
    assert sum(module.endswith(FUSED[family]) for module in modules) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_views_differ_so_that_these_tests_can_fail(family: str) -> None:
    rows = [theirs(family, strength) for _view, strength in VIEWS.values()]
    assert min(float(np.abs(rows[0] - rows[1]).max()), float(np.abs(rows[1] - rows[2]).max())) > 1e-2
