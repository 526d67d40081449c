"""A checkpoint is loaded whole and understood, or refused by the name of what was not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualtrace.checkpoint import open_checkpoint
from dualtrace.engine import EngineSettings
from dualtrace.models.weight_file import write_weights
from dualtrace.problems import Problem, Reason
from dualtrace.reference.engine import load
from tests.support.tiny import made_tensor, tiny_model


def copy_with_config(target: Path, model: dict[str, Any], **changes: Any) -> Path:
    """A copy of a tiny model with config keys changed; a key set to ... is removed."""
    shutil.copytree(tiny_model(**model), target, dirs_exist_ok=True)
    config = {**json.loads((target / "config.json").read_text()), **changes}
    (target / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return target


def copy_with_tensors(
    target: Path, model: dict[str, Any], rename: dict[str, str | None], extra: tuple[str, ...]
) -> Path:
    """A copy of a tiny model with tensors renamed, dropped (None) or added."""
    shutil.copytree(tiny_model(**model), target, dirs_exist_ok=True)
    opened = open_checkpoint(tiny_model(**model))
    named = {rename.get(name, name): opened.values(name, np.float32) for name in opened.tensors}
    named |= {name: np.ones(1, np.float32) for name in extra}
    tensors = [made_tensor(name, values) for name, values in named.items() if name is not None]
    write_weights(target / "model.safetensors", tensors)
    return target


def refusal(directory: Path) -> Problem:
    with pytest.raises(Problem) as caught:
        load(EngineSettings(model=directory))
    return caught.value


LLAMA: dict[str, Any] = {"attention": "gqa"}
GPT2: dict[str, Any] = {"family": "gpt2"}


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (LLAMA, {"logit_scale": 2.0}),
        (LLAMA, {"sliding_window": 16}),
        (LLAMA, {"partial_rotary_factor": 0.5}),
        (LLAMA, {"hidden_act": "gelu"}),
        (LLAMA, {"pretraining_tp": 2}),
        (LLAMA, {"auto_map": {"AutoModel": "x.Y"}}),
        (LLAMA, {"quantization_config": {"bits": 4}}),
        (GPT2, {"activation_function": "relu"}),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}),
        (GPT2, {"reorder_and_upcast_attn": True}),
        (GPT2, {"add_cross_attention": True}),
    ],
)
def test_a_config_key_that_changes_the_maths_is_refused_by_name(
    model: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    problem = refusal(copy_with_config(tmp_path, model, **changes))
    assert problem.reason is Reason.MODEL_UNSUPPORTED
    assert next(iter(changes)) in problem.detail.message


@pytest.mark.parametrize("rope", [{"rope_type": "yarn"}, {"rope_type": "dynamic"}, {"partial_rotary_factor": 0.5}])
def test_a_kind_of_rope_that_is_not_implemented_is_refused(rope: dict[str, Any], tmp_path: Path) -> None:
    problem = refusal(copy_with_config(tmp_path, LLAMA, rope_parameters={"rope_theta": 1e4, "factor": 2.0, **rope}))
    assert problem.reason is Reason.MODEL_UNSUPPORTED


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 500.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"hidden_size": ...},
        {"vocab_size": "429"},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": True},
        {"num_key_value_heads": 3},
        {"num_key_value_heads": 4},
        {"vocab_size": 430},
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 4},
        {"head_dim": 7},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"rms_norm_eps": 0},
        {"rms_norm_eps": "small"},
    ],
    ids=str,
)
def test_a_config_that_contradicts_itself_or_its_weights_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    assert refusal(copy_with_config(tmp_path, LLAMA, **changes)).reason is Reason.MODEL_INVALID


@pytest.mark.parametrize("family", ["mistral", None, ["llama"]])
def test_another_family_is_refused_by_name(family: Any, tmp_path: Path) -> None:
    problem = refusal(copy_with_config(tmp_path, LLAMA, model_type=family))
    assert problem.reason is Reason.MODEL_UNSUPPORTED
    assert "llama, gpt2" in problem.detail.message


def test_keys_that_change_nothing_are_ignored(tmp_path: Path) -> None:
    directory = copy_with_config(
        tmp_path,
        LLAMA,
        use_cache=False,
        transformers_version="5.0",
        pretraining_tp=1,
        sliding_window=None,
        rope_theta=1e4,
    )
    assert load(EngineSettings(model=directory)).card.provenance.family == "llama"


@pytest.mark.parametrize("model", [LLAMA, GPT2])
def test_a_weight_without_a_use_is_refused(model: dict[str, Any], tmp_path: Path) -> None:
    problem = refusal(copy_with_tensors(tmp_path, model, {}, ("model.extra.weight",)))
    assert problem.reason is Reason.MODEL_INVALID
    assert "model.extra.weight" in problem.detail.message


@pytest.mark.parametrize(("model", "name"), [(LLAMA, "model.norm.weight"), (GPT2, "transformer.h.1.attn.c_attn.bias")])
def test_a_missing_weight_is_refused(model: dict[str, Any], name: str, tmp_path: Path) -> None:
    problem = refusal(copy_with_tensors(tmp_path, model, {name: None}, ()))
    assert problem.reason is Reason.MODEL_INVALID
    assert name in problem.detail.message


@pytest.mark.parametrize(
    ("model", "buffers"),
    [
        (LLAMA, ("model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq")),
        (GPT2, ("transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias")),
    ],
)
def test_buffers_that_follow_from_the_config_are_ignored(
    model: dict[str, Any], buffers: tuple[str, ...], tmp_path: Path
) -> None:
    assert load(EngineSettings(model=copy_with_tensors(tmp_path, model, {}, buffers))).card.layers == 3


def test_gpt2_weights_saved_without_their_head_load_too(tmp_path: Path) -> None:
    names = open_checkpoint(tiny_model(**GPT2)).tensors
    bare: dict[str, str | None] = {name: name.removeprefix("transformer.") for name in names}
    assert load(EngineSettings(model=copy_with_tensors(tmp_path, GPT2, bare, ()))).card.layers == 3


def test_a_tied_head_that_differs_from_the_embedding_is_refused(tmp_path: Path) -> None:
    problem = refusal(copy_with_config(tmp_path, LLAMA, tie_word_embeddings=True))
    assert "lm_head.weight" in problem.detail.message
