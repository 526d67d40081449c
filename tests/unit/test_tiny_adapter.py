"""Tiny adapters are the same bytes everywhere, fit their model, and move its logits so that one can see it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualtrace.engine import EngineSettings
from dualtrace.models.tiny_adapter import LINEARS, write_tiny_adapter
from dualtrace.problems import Problem, Reason
from dualtrace.reference.engine import load
from dualtrace.views import finetuned
from tests.support.adapters import tiny_adapter
from tests.support.masked import ask
from tests.support.tiny import tiny_model

MODELS: list[dict[str, Any]] = [{"attention": "gqa"}, {"attention": "mqa"}, {"family": "gpt2"}]
VISIBLE_NATS = 0.1


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("fields", MODELS)
def test_the_logits_move_visibly_and_stay_sane(fields: dict[str, Any], targets: Any) -> None:
    model = tiny_model(**fields)
    engine = load(EngineSettings(model=model, adapters=(("a", tiny_adapter(model, targets=targets)),)))
    base, tuned = ask(engine).logprobs, ask(engine, view=finetuned("a")).logprobs
    assert np.median(np.abs(base - tuned)) > VISIBLE_NATS
    assert tuned.mean() > 2 * base.mean()  # it is noise, but the model is not blown up


@pytest.mark.parametrize(("rank", "alpha", "rslora"), [(1, 1, False), (8, 64, False), (8, 2, True)])
def test_rank_and_alpha_do_not_change_how_much_it_moves(rank: int, alpha: int, rslora: bool) -> None:
    model = tiny_model()
    folder = tiny_adapter(model, rank=rank, alpha=alpha, rslora=rslora)
    engine = load(EngineSettings(model=model, adapters=(("a", folder),)))
    moved = np.median(np.abs(ask(engine).logprobs - ask(engine, view=finetuned("a")).logprobs))
    assert VISIBLE_NATS < moved < 20 * VISIBLE_NATS


def test_the_bytes_are_the_same_on_every_machine() -> None:
    raw = (tiny_adapter(tiny_model()) / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == "ee257486f826afa8a522f42933388a09760683d40c4e1b6c50cc117d2d853be3"


def test_another_seed_gives_other_factors(tmp_path: Path) -> None:
    files = [write_tiny_adapter(tmp_path / str(seed), tiny_model(), seed=seed) for seed in range(2)]
    assert len({(file / "adapter_model.safetensors").read_bytes() for file in files}) == 2


def test_the_config_names_no_place_of_this_machine() -> None:
    config = json.loads((tiny_adapter(tiny_model()) / "adapter_config.json").read_text())
    assert "/" not in config["base_model_name_or_path"]


@pytest.mark.parametrize("family", LINEARS)
def test_gpt2_keeps_its_weights_the_other_way_round(family: str) -> None:
    config = json.loads((tiny_adapter(tiny_model(family=family)) / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (family == "gpt2")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"targets": ("c_attn",)}, Reason.OUT_OF_RANGE),
        ({"targets": ()}, Reason.OUT_OF_RANGE),
        ({"targets": "q_proj"}, Reason.OUT_OF_RANGE),
        ({"rank": 0}, Reason.OUT_OF_RANGE),
        ({"seed": -1}, Reason.OUT_OF_RANGE),
    ],
)
def test_an_adapter_that_cannot_be_is_refused(fields: dict[str, Any], reason: Reason, tmp_path: Path) -> None:
    with pytest.raises(Problem) as caught:
        write_tiny_adapter(tmp_path / "a", tiny_model(), **fields)
    assert caught.value.reason is reason


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(Problem) as caught:
        write_tiny_adapter(tmp_path, tiny_model())
    assert caught.value.reason is Reason.ALREADY_EXISTS
