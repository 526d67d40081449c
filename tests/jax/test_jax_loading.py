"""What the JAX engine loads, exactly as it stands; and what it refuses, by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from backend_jax import load
from dualtrace.checkpoint import open_checkpoint
from dualtrace.engine import Batch, EngineSettings, Read, Segment, int_array
from dualtrace.models.weight_file import write_weights
from dualtrace.problems import Problem, Reason
from tests.support.tiny import made_tensor, tiny_model, tiny_reference
from tests.support.tolerances import BFLOAT16

Tensors = dict[str, np.ndarray[Any, np.dtype[np.float32]]]
ROOT = Path(__file__).parents[2]
TIED: dict[str, Any] = {"attention": "gqa", "bias": True, "tied": True}
IDS = int_array(np.random.default_rng(5).integers(0, 200, 16).tolist())


def answered(engine: Any) -> Any:
    """[16] logprobs of one text."""
    rows = int_array(range(IDS.size))
    (readout,) = next(engine.forward(Batch((Segment(IDS, rows),)), (Read(rows, np.roll(IDS, -1)),), lambda _: True))
    return readout.logprobs


def loaded(folder: Path, **fields: Any) -> Any:
    return answered(load(EngineSettings(model=folder, **fields)))


def refused(folder: Path) -> Problem:
    with pytest.raises(Problem) as caught:
        load(EngineSettings(model=folder))
    return caught.value


def with_config(folder: Path, model: Path, **changed: Any) -> Path:
    """A copy of a model with some keys of its config changed."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    return folder


def with_tensors(folder: Path, change: Callable[[Tensors], object], **fields: Any) -> Path:
    """A copy of a tiny model with its tensors changed."""
    opened = open_checkpoint(tiny_model(**fields))
    shutil.copytree(opened.directory, folder)
    tensors = {name: opened.values(name, np.float32).copy() for name in opened.tensors}
    change(tensors)
    write_weights(folder / "model.safetensors", [made_tensor(*pair) for pair in tensors.items()])
    return folder


# ---- weights


@pytest.mark.parametrize(("dtype", "kind"), [("BF16", ml_dtypes.bfloat16), ("F16", np.float16)])
def test_narrow_checkpoints_are_upcast_exactly(dtype: str, kind: Any, tmp_path: Path) -> None:
    opened = open_checkpoint(tiny_model())
    narrow = {name: opened.values(name, np.float32).astype(kind) for name in opened.tensors}
    folders = [tmp_path / "narrow", tmp_path / "wide"]
    for folder in folders:
        shutil.copytree(opened.directory, folder)
    write_narrow(folders[0] / "model.safetensors", narrow, dtype)
    wide = [made_tensor(name, values.astype(np.float32)) for name, values in narrow.items()]
    write_weights(folders[1] / "model.safetensors", wide)
    left, right = map(loaded, folders)
    assert np.array_equal(left, right)


def write_narrow(file: Path, tensors: dict[str, Any], dtype: str) -> None:
    at, header = 0, {}
    for name, values in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [at, at + values.nbytes]}
        at += values.nbytes
    text_of_header = json.dumps(header).encode()
    body = b"".join(values.tobytes() for values in tensors.values())
    file.write_bytes(len(text_of_header).to_bytes(8, "little") + text_of_header + body)


def test_sharded_checkpoints_are_the_same_model(tmp_path: Path) -> None:
    opened = open_checkpoint(tiny_model())
    shutil.copytree(opened.directory, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    names = list(opened.tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, members in shards.items():
        tensors = [made_tensor(name, opened.values(name, np.float32)) for name in members]
        write_weights(tmp_path / "model" / shard, tensors)
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert np.array_equal(loaded(tmp_path / "model"), loaded(tiny_model()))


def test_bfloat16_is_near_the_reference() -> None:
    difference = np.abs(loaded(tiny_model(), dtype="bfloat16") - answered(tiny_reference()))
    assert 0 < difference.max() <= BFLOAT16.abs_epsilon


def test_a_missing_weight_is_refused_by_name(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    problem = refused(with_tensors(tmp_path / "model", lambda tensors: tensors.pop(name)))
    assert (problem.reason, repr(name) in str(problem)) == (Reason.MODEL_INVALID, True)


def test_a_weight_that_is_not_used_is_refused_by_name(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.side_proj.weight"
    problem = refused(with_tensors(tmp_path / "model", lambda tensors: tensors.update({name: np.ones((2, 2), "f4")})))
    assert (problem.reason, repr(name) in str(problem)) == (Reason.MODEL_INVALID, True)


def test_a_weight_of_another_shape_is_refused_with_both(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"

    def cut(tensors: Tensors) -> None:
        tensors[name] = tensors[name][:-1]

    problem = refused(with_tensors(tmp_path / "model", cut))
    assert problem.reason is Reason.MODEL_INVALID
    assert name in str(problem)
    assert "(31, 32)" in str(problem)
    assert "(32, 32)" in str(problem)


def test_a_stored_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    def untie(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    problem = refused(with_tensors(tmp_path / "model", untie, **TIED))
    assert (problem.reason, "lm_head.weight" in str(problem)) == (Reason.MODEL_INVALID, True)


def test_a_stored_copy_of_a_tied_head_is_accepted(tmp_path: Path) -> None:
    def copy(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    folder = with_tensors(tmp_path / "model", copy, **TIED)
    assert np.array_equal(loaded(folder), loaded(tiny_model(**TIED)))


# ---- configs


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("hidden_act", "swish_of_ours", Reason.MODEL_UNSUPPORTED),
        ("rope_parameters", {"rope_type": "spiral", "rope_theta": 1e4}, Reason.MODEL_UNSUPPORTED),
        ("pretraining_tp", 2, Reason.MODEL_UNSUPPORTED),
        ("quantization_config", {"bits": 4}, Reason.MODEL_UNSUPPORTED),
        ("num_hidden_layers", "three", Reason.MODEL_INVALID),
        ("rms_norm_eps", 0.0, Reason.MODEL_INVALID),
        ("model_type", "perceptron", Reason.MODEL_UNSUPPORTED),
    ],
)
def test_a_config_it_cannot_follow_is_refused(key: str, value: Any, reason: Reason, tmp_path: Path) -> None:
    problem = refused(with_config(tmp_path / "model", tiny_model(), **{key: value}))
    assert problem.reason is reason


def test_a_pickle_checkpoint_is_refused(tmp_path: Path) -> None:
    shutil.copytree(tiny_model(), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    assert "pytorch_model.bin" in str(refused(tmp_path / "model"))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    shutil.copytree(tiny_model(), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert refused(tmp_path / "model").reason is Reason.MODEL_INVALID


# ---- settings


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"dtype": "float16"}, Reason.MODEL_UNSUPPORTED),
        ({"device": "abacus"}, Reason.OUT_OF_RANGE),
        ({"threads": 0}, Reason.OUT_OF_RANGE),
        ({"threads": 64}, Reason.CONFLICT),  # the client already runs with one
        ({"step_tokens": 0}, Reason.OUT_OF_RANGE),
        ({"options": {"speed": "high"}}, Reason.UNKNOWN_FIELD),
    ],
)
def test_settings_it_cannot_honour_are_refused(changed: dict[str, Any], reason: Reason) -> None:
    with pytest.raises(Problem) as caught:
        load(EngineSettings(model=tiny_model(), **changed))
    assert caught.value.reason is reason


# ---- what is kept for the next process

COMPILE = """
import sys
from pathlib import Path
from backend_jax import load
from dualtrace.engine import EngineSettings, Shape

engine = load(EngineSettings(model=Path(sys.argv[1])))
engine.prepare(Shape(1, 16))
print(sum(engine.compilations.values()))
"""


def test_compiled_functions_are_kept_for_the_next_process(tmp_path: Path) -> None:
    """However little time they took to compile."""
    environment = os.environ | {"DUALTRACE_CACHE": str(tmp_path)}
    kept: list[set[str]] = []
    for _ in range(2):
        command = [sys.executable, "-c", COMPILE, str(tiny_model())]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
        kept.append({file.name for file in (tmp_path / "jax").iterdir() if not file.name.endswith("-atime")})
    assert len(kept[0]) >= 2
    assert kept[1] == kept[0]
