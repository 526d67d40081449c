"""The reference engine wears views: what each adds, and what may never reach the rows of another."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualtrace.arrays import FloatArray
from dualtrace.checkpoint import open_checkpoint
from dualtrace.engine import NOTHING, EngineSettings
from dualtrace.masks import receipt
from dualtrace.models.weight_file import write_weights
from dualtrace.noise import draw
from dualtrace.problems import Problem, Reason
from dualtrace.reference.engine import ReferenceEngine, load
from dualtrace.views import BASE, Noise, View, finetuned, null, scaled
from tests.support.adapters import broken_adapter, changed_adapter, read_tensors, tiny_adapter
from tests.support.masked import IDS, MASKS, ask, ask_shared, plan_for, read_all, run, whole
from tests.support.tiny import made_tensor, tiny_model
from tests.support.tolerances import FLOAT32_HIGHEST

FAMILIES: dict[str, dict[str, Any]] = {"llama gqa": {"attention": "gqa"}, "gpt2": {"family": "gpt2"}}
NOISE = Noise(1, init_scale=0.2)
VIEWS = [BASE, finetuned("a"), scaled("a", 1.25), scaled("a", -0.5), null("a", NOISE), finetuned("all"), BASE]


@cache
def engine_of(name: str) -> ReferenceEngine:
    model = tiny_model(**FAMILIES[name])
    adapters = (("a", tiny_adapter(model)), ("all", tiny_adapter(model, targets="all-linear", rank=2, alpha=3)))
    return load(EngineSettings(model=model, adapters=adapters))


@pytest.fixture(params=FAMILIES)
def engine(request: pytest.FixtureRequest) -> ReferenceEngine:
    return engine_of(request.param)


def seen_as(engine: ReferenceEngine, view: View) -> FloatArray:
    return ask(engine, view=view).logprobs


def test_strength_zero_is_the_base_bit_for_bit(engine: ReferenceEngine) -> None:
    assert np.array_equal(seen_as(engine, scaled("a", 0.0)), seen_as(engine, BASE))


def test_strength_one_is_the_adapter_fully_on_bit_for_bit(engine: ReferenceEngine) -> None:
    assert np.array_equal(seen_as(engine, scaled("a", 1.0)), seen_as(engine, finetuned("a")))


def test_an_engine_with_adapters_has_the_base_of_one_without(engine: ReferenceEngine) -> None:
    family = "gpt2" if engine.card.provenance.family == "gpt2" else "llama gqa"
    bare = load(EngineSettings(model=tiny_model(**FAMILIES[family])))
    assert np.array_equal(seen_as(engine, BASE), seen_as(bare, BASE))


def merged(folder: Path, adapter: Path, target: Path, strength: float) -> ReferenceEngine:
    """The model whose weights are W + strength * scaling * B A, written down as a checkpoint of its own."""
    opened, tensors = open_checkpoint(folder), read_tensors(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = {name: opened.values(name, np.float64).copy() for name in opened.tensors}
    for name in (name for name in tensors if ".lora_A." in name):
        a, b = (tensors[part].astype(np.float64) for part in (name, name.replace("lora_A", "lora_B")))
        delta = strength * config["lora_alpha"] / config["r"] * (b @ a)
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        weights[f"{module}.weight"] += delta.T if config["fan_in_fan_out"] else delta
    target.mkdir(exist_ok=True)
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    write_weights(target / "model.safetensors", [made_tensor(name, values) for name, values in weights.items()])
    return load(EngineSettings(model=target))


MERGED_IN_FLOAT32 = FLOAT32_HIGHEST.abs_epsilon  # the file of the merged weights is float32


@pytest.mark.parametrize("strength", [1.0, 1.25, -0.5])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_delta_is_what_merging_it_into_the_weights_would_do(name: str, strength: float, tmp_path: Path) -> None:
    model = tiny_model(**FAMILIES[name])
    expected = ask(merged(model, tiny_adapter(model), tmp_path, strength)).logprobs
    assert seen_as(engine_of(name), scaled("a", strength)) == pytest.approx(expected, abs=MERGED_IN_FLOAT32)


def test_a_strength_above_one_goes_further_the_same_way(engine: ReferenceEngine) -> None:
    reads = (read_all(), *[read_all(against=0)] * 3)
    views = (BASE, scaled("a", 0.5), finetuned("a"), scaled("a", 1.25))
    answers = run(engine, [whole(view=view) for view in views], reads)
    distances = [float(np.mean(answers[index].kl_from_against)) for index in (1, 2, 3)]  # type: ignore[arg-type]
    assert distances == sorted(distances)
    assert distances[2] > 1.05 * distances[1]


def test_a_view_beside_others_in_a_batch_is_the_view_alone(engine: ReferenceEngine) -> None:
    answers = run(engine, [whole(view=view) for view in VIEWS], [read_all() for _ in VIEWS])
    for index, view in enumerate(VIEWS):
        assert np.array_equal(answers[index].logprobs, seen_as(engine, view)), view


def test_the_modules_that_got_a_delta_are_named(engine: ReferenceEngine) -> None:
    linears = ask(engine, view=finetuned("all")).delta_modules
    assert linears is not None
    assert len(linears) == len(set(linears)) == 3 * (4 if engine.card.provenance.family == "gpt2" else 7)
    assert set(ask(engine, view=finetuned("a")).delta_modules or ()) < set(linears)


@pytest.mark.parametrize("view", [BASE, scaled("a", 0.0)])
def test_a_plain_view_names_no_modules(view: View, engine: ReferenceEngine) -> None:
    assert ask(engine, view=view).delta_modules is None


def test_the_card_names_the_adapters_and_their_digests(engine: ReferenceEngine) -> None:
    assert [name for name, _ in engine.card.provenance.adapter_digests] == ["a", "all"]


def test_the_card_says_that_masks_views_and_contrasts_are_served(engine: ReferenceEngine) -> None:
    able = engine.card.capabilities
    assert (able.masks, able.views, able.contrasts) == (True, True, True)


# --- a broken adapter


@pytest.fixture
def broken(tmp_path: Path) -> ReferenceEngine:
    model = tiny_model(attention="gqa")
    folder = broken_adapter(tiny_adapter(model), tmp_path / "broken")
    return load(EngineSettings(model=model, adapters=(("a", folder), ("sound", tiny_adapter(model)))))


@pytest.mark.parametrize("view", [BASE, scaled("a", 0.0), finetuned("sound"), null("a", NOISE)])
def test_a_nan_in_an_adapter_leaves_the_rows_of_other_views_untouched(view: View, broken: ReferenceEngine) -> None:
    whole_of_it = {"sound": "a"}.get(view.adapter, view.adapter)
    same = View(view.face, whole_of_it, view.strength, view.noise) if view.adapter else view
    answers = run(broken, [whole(view=finetuned("a")), whole(view=view)], [read_all(), read_all()])
    assert np.array_equal(answers[1].logprobs, seen_as(engine_of("llama gqa"), same))


def test_a_nan_in_an_adapter_makes_the_rows_of_its_own_view_bad(broken: ReferenceEngine) -> None:
    assert ask(broken, view=finetuned("a")).bad_rows == tuple(range(IDS.size))


def test_a_divergence_from_a_broken_view_is_no_number(broken: ReferenceEngine) -> None:
    answers = run(broken, [whole(view=finetuned("a")), whole()], [NOTHING, read_all(against=0)])
    assert answers[1].bad_rows == tuple(range(IDS.size))
    assert np.isnan(answers[1].kl_from_against).all()  # type: ignore[arg-type]


# --- null noise


def test_null_is_the_adapter_whose_factors_are_the_noise(tmp_path: Path) -> None:
    model = tiny_model(attention="gqa")

    def replace_all(tensors: dict[str, Any]) -> None:
        for name in tensors:
            tensors[name] = draw(NOISE, name.removeprefix("base_model.model."), tensors[name].shape)

    drawn = changed_adapter(tiny_adapter(model), tmp_path / "drawn", tensors=replace_all)
    expected = ask(load(EngineSettings(model=model, adapters=(("a", drawn),))), view=finetuned("a")).logprobs
    assert np.array_equal(seen_as(engine_of("llama gqa"), null("a", NOISE)), expected)


@pytest.mark.parametrize(
    "other",
    [Noise(2, 0.2), Noise(1, 0.21), Noise(1, 0.2, 2.0), Noise(1, 0.2, 2.0, variance_faithful=True)],
)
def test_other_noise_is_another_model(other: Noise, engine: ReferenceEngine) -> None:
    assert np.abs(seen_as(engine, null("a", other)) - seen_as(engine, null("a", NOISE))).max() > 1e-6


def test_the_same_noise_is_the_same_model(engine: ReferenceEngine) -> None:
    assert np.array_equal(seen_as(engine, null("a", Noise(1, 0.2))), seen_as(engine, null("a", NOISE)))


# --- views with masks and prefixes


def test_a_view_under_a_mask_is_shared_as_it_is_alone(engine: ReferenceEngine) -> None:
    plan = plan_for(engine.card, MASKS["sliding"])
    answer, counts = ask_shared(engine, 10, plan, finetuned("a"))
    assert np.array_equal(answer.logprobs, ask(engine, plan, finetuned("a")).logprobs)
    receipt.check(counts, plan)


def test_a_prefix_of_another_view_is_refused(engine: ReferenceEngine) -> None:
    prefix, rest = whole(IDS[:8]), replace(whole(IDS[8:], view=finetuned("a"), start=8), parent=0)
    with pytest.raises(Problem) as caught:
        run(engine, [prefix, rest], [NOTHING, read_all()])
    assert caught.value.reason is Reason.CONFLICT


def test_an_unknown_adapter_is_named(engine: ReferenceEngine) -> None:
    with pytest.raises(Problem, match="'nobody'") as caught:
        seen_as(engine, finetuned("nobody"))
    assert caught.value.reason is Reason.NOT_FOUND


def test_a_checkpoint_saved_without_its_head_takes_the_adapter_of_the_model_with_it(tmp_path: Path) -> None:
    model = tiny_model(family="gpt2")
    opened = open_checkpoint(model)
    bare = [made_tensor(name.removeprefix("transformer."), opened.values(name, np.float64)) for name in opened.tensors]
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    write_weights(tmp_path / "model.safetensors", bare)
    engine = load(EngineSettings(model=tmp_path, adapters=(("a", tiny_adapter(model)),)))
    assert np.array_equal(seen_as(engine, finetuned("a")), seen_as(engine_of("gpt2"), finetuned("a")))
