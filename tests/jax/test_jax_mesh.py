"""One model over 2 and 4 devices answers as on one. The devices are virtual, so each count has a process of its own."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from backend_jax import load
from dualtrace.engine import Batch, EngineSettings
from dualtrace.masks.spec import MaskSpec
from dualtrace.problems import Problem, Reason
from dualtrace.views import finetuned
from tests.support.adapters import tiny_adapter
from tests.support.masked import MASKS, TOKENS, ask, edge, plan_for, read_all, run, whole
from tests.support.tiny import tiny_model
from tests.support.tolerances import FLOAT32_HIGHEST

VOCABULARY = 432
ROOT = Path(__file__).parents[2]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention": "gqa", "bias": True, "vocab_size": VOCABULARY},
    "gpt2": {"family": "gpt2"},  # neither 2 nor 4 divide its vocabulary
}
STEP = {"llama": 16, "gpt2": 256}  # of the engine over a mesh: its kept keys are tried, or calls in one piece
NUMBERS = ("alone", "plain", "masked", "viewed", "forked", "kl_from_against", "kl_to_against")


def check_mesh(size: int) -> None:
    """What the process of one device count prints: per model, both engines' answers."""
    found = {name: compare(tiny_model(**fields), size, STEP[name]) for name, fields in MODELS.items()}
    found["llama"]["odd"] = refusal(tiny_model(heads=3, hidden_size=24), str(size))
    print(json.dumps(found))


def compare(folder: Path, size: int, step: int) -> dict[str, Any]:
    adapters = (("usual", tiny_adapter(folder)),)
    single = load(EngineSettings(model=folder, adapters=adapters))
    spread = load(EngineSettings(model=folder, adapters=adapters, step_tokens=step, options={"mesh": str(size)}))
    leaves = layer_weights(spread)
    return {
        "devices": [engine.card.provenance.device for engine in (single, spread)],
        "holders": {name: pieces(leaf) for name, leaf in leaves.items()},
        "answers": [answers(engine) for engine in (single, spread)],
    }


def layer_weights(engine: Any) -> dict[str, Any]:
    weights = engine._runner._weights
    return {"embedding": weights["embedding"]} | {role: parts["weight"] for role, parts in weights["layers"].items()}


def pieces(leaf: Any) -> int:
    """Into how many different pieces an array is cut; copies count once."""
    return len({str(shard.index) for shard in leaf.addressable_shards})


def answers(engine: Any) -> dict[str, Any]:
    """One text alone, and the same text plain, masked and viewed in one batch: few functions to compile."""
    plan = plan_for(engine.card, MASKS["zeroed after the softmax"])
    segments = (whole(), whole(mask=plan), whole(view=finetuned("usual")))
    reads = (read_all(), read_all(against=0), read_all())
    plain, masked, viewed = (answer for _, answer in sorted(run(engine, segments, reads).items()))
    steps = engine.forward(Batch(segments), reads, lambda _: True)
    ranks: dict[int, list[int]] = {index: [] for index in range(len(segments))}
    for readout in itertools.chain(*steps):
        ranks[readout.segment] += readout.ranks.tolist()
    forked = run(engine, *late_cuts(engine))
    assert masked.counts is not None
    assert masked.kl_from_against is not None
    assert masked.kl_to_against is not None
    return {
        "alone": ask(engine).logprobs.tolist(),
        "plain": plain.logprobs.tolist(),
        "masked": masked.logprobs.tolist(),
        "viewed": viewed.logprobs.tolist(),
        "forked": [number for _, answer in sorted(forked.items()) for number in answer.logprobs.tolist()],
        "kl_from_against": masked.kl_from_against.tolist(),
        "kl_to_against": masked.kl_to_against.tolist(),
        "ranks": [ranks[index] for index in sorted(ranks)],
        "counts": {name: column.tolist() for name, column in asdict(masked.counts).items()},
    }


def late_cuts(engine: Any) -> tuple[list[Any], list[Any]]:
    """Cut in the last layer only: the layers below are run for one of them."""
    spans = ((0, 3), (3, 5), (2, 9), (1, 2), (4, 10))
    specs = [MaskSpec(edges=(edge((12, TOKENS), span, layers=(engine.card.layers - 1,)),)) for span in spans]
    segments = [whole(mask=plan_for(engine.card, spec)) for spec in specs]
    return segments, [read_all() for _ in segments]


def refusal(folder: Path, mesh: str, **fields: Any) -> list[str]:
    """(reason, field, allowed) of the Problem that loading with this mesh raises."""
    with pytest.raises(Problem) as caught:
        load(EngineSettings(model=folder, options={"mesh": mesh}, **fields))
    detail = caught.value.detail
    return [detail.reason.value, detail.field, detail.allowed]


def checked(size: int) -> dict[str, Any]:
    done = ran(size)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@cache
def ran(size: int) -> subprocess.CompletedProcess[str]:
    """One process for each count, even where it fails."""
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={size}", "JAX_PLATFORMS": "cpu"}
    code = f"from tests.jax.test_jax_mesh import check_mesh; check_mesh({size})"
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


each_mesh = pytest.mark.parametrize(("size", "model"), [(size, model) for size in (2, 4) for model in MODELS])


@each_mesh
def test_the_numbers_are_those_of_one_device(size: int, model: str) -> None:
    single, spread = checked(size)[model]["answers"]
    for name in NUMBERS:
        pairs = zip(single[name], spread[name], strict=True)
        assert all(FLOAT32_HIGHEST.allows(left, right) for left, right in pairs), name


@each_mesh
def test_the_ranks_are_those_of_one_device(size: int, model: str) -> None:
    single, spread = checked(size)[model]["answers"]
    assert single["ranks"] == spread["ranks"]


@each_mesh
def test_the_receipt_counts_exactly_what_one_device_counts(size: int, model: str) -> None:
    single, spread = checked(size)[model]["answers"]
    assert single["counts"] == spread["counts"]


@each_mesh
def test_the_masked_the_viewed_and_the_plain_answer_differ(size: int, model: str) -> None:
    spread = checked(size)[model]["answers"][1]
    assert len({str(spread[name]) for name in ("plain", "masked", "viewed")}) == 3


@each_mesh
def test_every_large_weight_is_cut_into_a_piece_for_each_device(size: int, model: str) -> None:
    holders: dict[str, int] = checked(size)[model]["holders"]
    uncut = {role for role, count in holders.items() if role.endswith("norm")}
    if model == "gpt2":
        uncut |= {"embedding"}
    elif size == 4:
        uncut |= {"key", "value"}  # its two key-value heads cannot be cut in four
    assert holders == {role: 1 if role in uncut else size for role in holders}


@each_mesh
def test_the_card_names_the_mesh(size: int, model: str) -> None:
    assert checked(size)[model]["devices"] == ["cpu", f"cpu x{size} (mesh model={size})"]


@pytest.mark.parametrize("size", [2, 4])
def test_a_mesh_that_cannot_divide_the_heads_is_refused(size: int) -> None:
    fits = {2: "1", 4: "1, 3"}[size]
    assert checked(size)["llama"]["odd"] == [Reason.MODEL_UNSUPPORTED, "mesh", fits]


@pytest.mark.parametrize(
    ("mesh", "reason"),
    [
        ("65", Reason.OUT_OF_RANGE),
        ("9" * 5000, Reason.OUT_OF_RANGE),
        ("0", Reason.OUT_OF_RANGE),
        ("-1", Reason.MALFORMED),
        ("two", Reason.MALFORMED),
        ("", Reason.MALFORMED),
    ],
)
def test_a_mesh_of_devices_that_there_are_not_is_refused(mesh: str, reason: Reason) -> None:
    assert refusal(tiny_model(), mesh) == [reason, "mesh", "1-1"]


def test_a_mesh_beside_a_numbered_device_is_refused() -> None:
    assert refusal(tiny_model(), "1", device="cpu:0")[0] == Reason.CONFLICT


def test_other_options_are_still_refused_by_name() -> None:
    with pytest.raises(Problem) as caught:
        load(EngineSettings(model=tiny_model(), options={"mesh": "1", "speed": "high"}))
    assert caught.value.detail.field == "speed"
