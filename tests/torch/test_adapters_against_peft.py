"""Views are what peft computes for the same folder, in float64 and in float32."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualtrace.arrays import FloatArray
from dualtrace.engine import EngineSettings
from dualtrace.reference.engine import ReferenceEngine, load
from dualtrace.views import BASE, View, finetuned, scaled
from tests.support.adapters import Config, Tensors, changed_adapter, tiny_adapter
from tests.support.engines import MODELS
from tests.support.masked import IDS, ask
from tests.support.tiny import tiny_model
from tests.support.tolerances import FLOAT32_HIGHEST, FLOAT64, Tolerance

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
]

ADAPTERS: dict[str, dict[str, Any]] = {
    "usual": {},
    "all linear": {"targets": "all-linear", "rank": 2, "alpha": 3},
    "rank stabilised": {"targets": "all-linear", "rank": 8, "alpha": 2, "rslora": True},
}
VIEWS = {"base": (BASE, 0.0), "finetuned": (finetuned("a"), 1.0), "beyond": (scaled("a", 1.25), 1.25)}
DTYPES = {"float64": FLOAT64, "float32": FLOAT32_HIGHEST}


@cache
def engine_of(model: str, adapter: str) -> ReferenceEngine:
    folder = tiny_model(**dict(MODELS[model]))
    return load(EngineSettings(model=folder, adapters=(("a", tiny_adapter(folder, **ADAPTERS[adapter])),)))


def with_peft(model: Path, adapter: Path, strength: float, dtype: str, monkeypatch: pytest.MonkeyPatch) -> FloatArray:
    """[T] logprobs of the token after each row, and of token 0 after the last."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    adapted: Any = PeftModel.from_pretrained(base, adapter)
    if dtype == "float64":
        adapted = adapted.double()
        # transformers computes norms, softmax and rotary angles in float32 even in a float64 model: here it may not
        monkeypatch.setattr(torch, "float32", torch.float64)
        monkeypatch.setattr(torch, "float", torch.float64)
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        if hasattr(base.model if hasattr(base, "model") else base, "rotary_emb"):
            base.model.rotary_emb = type(base.model.rotary_emb)(base.config)
    adapted.requires_grad_(False).train(False)
    for module in adapted.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling = {name: value * strength for name, value in module.scaling.items()}
    with torch.no_grad():
        logits = adapted(torch.tensor([IDS.tolist()]), use_cache=False).logits[0].double()
    targets = torch.tensor([*IDS[1:].tolist(), 0])
    rows: FloatArray = (logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)).numpy()
    return rows


def worst(found: FloatArray, wanted: FloatArray, tolerance: Tolerance) -> float:
    """How far the worst row is out; 0 or less when all agree."""
    allowed = tolerance.abs_epsilon + tolerance.rel_epsilon * np.maximum(np.abs(found), np.abs(wanted))
    return float((np.abs(found - wanted) - allowed).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("model", MODELS)
def test_every_view_is_what_peft_computes(model: str, name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    view, strength = VIEWS[name]
    folder = tiny_model(**dict(MODELS[model]))
    expected = with_peft(folder, tiny_adapter(folder), strength, dtype, monkeypatch)
    assert worst(ask(engine_of(model, "usual"), view=view).logprobs, expected, DTYPES[dtype]) <= 0


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("model", ["llama gqa", "gpt2"])
def test_every_kind_of_adapter_is_what_peft_computes(model: str, adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model(**dict(MODELS[model]))
    expected = with_peft(folder, tiny_adapter(folder, **ADAPTERS[adapter]), 1.0, "float64", monkeypatch)
    found = ask(engine_of(model, adapter), view=finetuned("a")).logprobs
    assert worst(found, expected, FLOAT64) <= 0


def _ranks(tensors: Tensors) -> None:
    for name in list(tensors):
        if ".layers.1.self_attn.q_proj." in name:
            axis = 0 if "lora_A" in name else 1
            tensors[name] = np.repeat(tensors[name], 2, axis=axis)


def _layers(tensors: Tensors) -> None:
    for name in list(tensors):
        if ".layers.2." not in name:
            del tensors[name]


CONFIGS: dict[str, tuple[Config, Any]] = {
    "rank pattern": ({"rank_pattern": {"layers.1.self_attn.q_proj": 8}}, _ranks),
    "alpha pattern": ({"alpha_pattern": {"q_proj": 3, "layers.0.self_attn.v_proj": 1}}, None),
    "layers to transform": ({"layers_to_transform": [2]}, _layers),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_patterns_and_layers_mean_what_peft_means(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, change_tensors = CONFIGS[name]
    model = tiny_model(attention="gqa")
    folder = changed_adapter(
        tiny_adapter(model), tmp_path, config=lambda config: config.update(changes), tensors=change_tensors
    )
    expected = with_peft(model, folder, 1.0, "float64", monkeypatch)
    engine = load(EngineSettings(model=model, adapters=(("a", folder),)))
    assert worst(ask(engine, view=finetuned("a")).logprobs, expected, FLOAT64) <= 0


@pytest.mark.parametrize("model", ["llama gqa", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "use_rslora": True, "init_lora_weights": False},
        {"target_modules": "all-linear", "r": 3, "lora_alpha": 5, "lora_dropout": 0.1, "bias": "none"},
    ],
)
def test_a_folder_that_peft_wrote_is_read(options: Config, model: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tiny_model(**dict(MODELS[model]))
    base: Any = AutoModelForCausalLM.from_pretrained(folder)
    settings = LoraConfig(**options, task_type="CAUSAL_LM", fan_in_fan_out=model == "gpt2")
    get_peft_model(base, settings).save_pretrained(str(tmp_path))
    engine = load(EngineSettings(model=folder, adapters=(("a", tmp_path),)))
    assert (
        ask(engine, view=finetuned("a")).delta_modules
        == ask(engine_of(model, "all linear"), view=finetuned("a")).delta_modules
    )


def test_a_view_is_not_the_base_so_that_these_tests_can_fail() -> None:
    engine = engine_of("llama gqa", "usual")
    views: list[View] = [BASE, finetuned("a"), scaled("a", 1.25)]
    found = [ask(engine, view=view).logprobs for view in views]
    assert min(worst(found[0], found[1], FLOAT32_HIGHEST), worst(found[1], found[2], FLOAT32_HIGHEST)) > 0
