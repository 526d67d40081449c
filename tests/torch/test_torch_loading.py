"""What the torch engine refuses to load, by name, and what it says of what it loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualtrace.engine import EngineSettings
from dualtrace.model_card import ModelCard
from dualtrace.models.weight_file import write_weights
from dualtrace.problems import Problem, Reason
from dualtrace.reference import load as load_reference
from tests.support.adapters import tiny_adapter
from tests.support.tiny import made_tensor, tiny_model
from tests.support.tiny_families import FAMILIES, family_model

pytestmark = pytest.mark.torch


def copied(target: Path, change: Callable[[dict[str, Any]], None], source: Path | None = None) -> Path:
    """A model directory whose config was changed."""
    shutil.copytree(source or tiny_model(), target)
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


def card_of(**fields: Any) -> ModelCard:
    import backend_torch

    return backend_torch.load(EngineSettings(**fields)).card


def refusal(**fields: Any) -> Problem:
    with pytest.raises(Problem) as caught:
        card_of(**fields)
    return caught.value


UNKNOWN_SETTINGS: list[dict[str, Any]] = [
    {"dtype": "int8"}, {"device": "tpu"}, {"device": "cuda:99"}, {"options": {"speed": "11"}}, {"threads": 0},
]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_sinks", 4),
        ("is_encoder_decoder", True),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("auto_map", {"AutoModelForCausalLM": "evil.Model"}),
        ("pretraining_tp", 2),
        ("rope_parameters", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
    ],
)
def test_a_config_value_that_is_not_honoured_is_refused_by_name(key: str, value: Any, tmp_path: Path) -> None:
    problem = refusal(model=copied(tmp_path / "m", lambda config: config.update({key: value})))
    assert problem.reason is Reason.MODEL_UNSUPPORTED
    assert (key if key != "rope_parameters" else "rope_type") in str(problem)


def test_bidirectional_gemma_is_refused(tmp_path: Path) -> None:
    folder = copied(
        tmp_path / "m", lambda config: config.update(use_bidirectional_attention=True), family_model("gemma3")
    )
    assert "use_bidirectional_attention" in str(refusal(model=folder))


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    problem = refusal(model=copied(tmp_path / "m", lambda config: config.update(model_type="mamba")))
    assert problem.reason is Reason.MODEL_UNSUPPORTED
    assert "gemma3_text" in problem.detail.allowed


def test_a_tensor_without_use_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path / "m", lambda config: config.update(num_hidden_layers=2))
    problem = refusal(model=folder)
    assert problem.reason is Reason.MODEL_INVALID
    assert "model.layers.2" in str(problem)


def test_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path / "m", lambda config: config.update(num_hidden_layers=4))
    problem = refusal(model=folder)
    assert problem.reason is Reason.MODEL_INVALID
    assert "model.layers.3" in str(problem)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path / "m", lambda config: None)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert refusal(model=folder).reason is Reason.MODEL_INVALID


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    folder = copied(tmp_path / "m", lambda config: None)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickle" in str(refusal(model=folder))


def test_an_adapter_for_another_model_is_refused_by_module(tmp_path: Path) -> None:
    adapter = tiny_adapter(tiny_model(attention="mqa"), targets=("k_proj",))
    problem = refusal(model=tiny_model(attention="mha"), adapters=(("a", adapter),))
    assert problem.reason is Reason.ADAPTER_MISMATCH
    assert "k_proj" in str(problem)


def test_a_tied_head_that_differs_from_the_embedding_is_refused(tmp_path: Path) -> None:
    from dualtrace.checkpoint import open_checkpoint

    source = open_checkpoint(tiny_model(tied=True))
    tensors = {name: source.values(name, np.float32) for name in source.tensors}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    folder = copied(tmp_path / "m", lambda config: None, source.directory)
    write_weights(folder / "model.safetensors", [made_tensor(name, part) for name, part in tensors.items()])
    assert "tie_word_embeddings" in str(refusal(model=folder))


def test_a_hub_id_that_is_not_on_this_disk_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def no_network(*_: Any, **__: Any) -> None:
        pytest.fail("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    problem = refusal(model=Path("nobody/no-such-model"))
    assert problem.reason is Reason.NOT_FOUND
    assert "hf download nobody/no-such-model" in str(problem)


@pytest.mark.parametrize(
    "fields",
    [{"dtype": "int8"}, {"device": "tpu"}, {"device": "cuda:99"}, {"options": {"speed": "11"}}, {"threads": 0}],
)
def test_settings_that_mean_nothing_here_are_refused(fields: dict[str, Any]) -> None:
    refusal(model=tiny_model(), **fields)


def test_the_digest_of_the_weights_is_that_of_the_reference() -> None:
    ours = card_of(model=tiny_model())
    theirs = load_reference(EngineSettings(model=tiny_model())).card
    assert ours.provenance.weights_digest == theirs.provenance.weights_digest
    assert (ours.vocab_size, ours.max_positions, ours.layers) == (
        theirs.vocab_size,
        theirs.max_positions,
        theirs.layers,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_card_names_the_dtype_and_the_precision(dtype: str) -> None:
    provenance = card_of(model=tiny_model(), dtype=dtype).provenance
    assert (provenance.dtype, provenance.matmul_precision) == (dtype, "highest")


def test_only_families_that_are_proved_here_are_served() -> None:
    from backend_torch.families import FAMILIES as SERVED

    assert set(SERVED) == {model_type for model_type, _sizes in FAMILIES.values()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_claims_all_that_is_proved_of_every_family(family: str) -> None:
    capabilities = card_of(model=family_model(family)).capabilities
    assert all(getattr(capabilities, field.name) for field in fields(capabilities))


def test_windows_stand_in_the_card() -> None:
    assert card_of(model=family_model("qwen3")).windows == (12, None, 12)
    assert card_of(model=family_model("mistral")).windows == (12, 12, 12)
