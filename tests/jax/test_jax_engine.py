"""The JAX engine: sharing, steps, padding and neighbours change nothing; compilations are few; the rest is exact."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from backend_jax import load
from backend_jax.engine import JaxEngine
from dualtrace.arrays import IntArray
from dualtrace.checkpoint import open_checkpoint
from dualtrace.engine import NOTHING, Batch, EngineSettings, Read, Readout, Segment, Shape, Step, int_array
from dualtrace.models.weight_file import write_weights
from dualtrace.reference import load as load_reference
from dualtrace.views import BASE, View, finetuned, scaled
from tests.support.adapters import broken_adapter, tiny_adapter
from tests.support.tiny import made_tensor, tiny_model, tiny_reference
from tests.support.tolerances import FLOAT32_HIGHEST, FLOAT64, Tolerance

MODELS: dict[str, dict[str, Any]] = {
    "llama mha": {},
    "llama mqa": {"attention": "mqa"},
    "llama gqa": {"attention": "gqa", "bias": True, "tied": True},
    "gpt2": {"family": "gpt2"},
}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_parameters": (("rope_type", "linear"), ("factor", 4.0))},
    "llama3": {
        "rope_parameters": (
            ("rope_type", "llama3"),
            ("factor", 8.0),
            ("low_freq_factor", 1.0),
            ("high_freq_factor", 4.0),
            ("original_max_position_embeddings", 64),
        )
    },
}
STEP = 32


@cache
def tiny(name: str = "llama gqa", dtype: str = "", step_tokens: int = STEP) -> JaxEngine:
    return load(EngineSettings(model=tiny_model(**(MODELS | ROPES)[name]), dtype=dtype, step_tokens=step_tokens))


def random_ids(count: int, seed: int) -> IntArray:
    return np.random.default_rng(seed).integers(0, tiny().card.vocab_size, count, dtype=np.int32)


def text(count: int, seed: int = 0, **fields: Any) -> Segment:
    return Segment(random_ids(count, seed), int_array(range(count)), **fields)


def split(whole: Segment, at: int, parent: int) -> tuple[Segment, Segment]:
    head = dataclasses.replace(whole, ids=whole.ids[:at], positions=whole.positions[:at])
    return head, dataclasses.replace(whole, ids=whole.ids[at:], positions=whole.positions[at:], parent=parent)


def all_rows(segment: Segment, start: int = 0, **fields: Any) -> Read:
    rows = int_array(range(start, start + segment.ids.size))
    return Read(rows, targets=np.roll(segment.ids, -1), **fields)


def run(engine: Any, segments: Sequence[Segment], reads: Sequence[Read], **fields: Any) -> dict[int, Readout]:
    """Per segment its numbers, steps joined."""
    return gather(engine.forward(Batch(tuple(segments), **fields), tuple(reads), lambda _: True))


def gather(steps: Iterator[Step]) -> dict[int, Readout]:
    found: dict[int, list[Readout]] = {}
    for step in steps:
        for readout in step:
            found.setdefault(readout.segment, []).append(readout)
    return {index: join(parts) for index, parts in found.items()}


def join(parts: list[Readout]) -> Readout:
    names = ("rows", "logprobs", "ranks", "ties", "top_ids", "top_logprobs", "kl_from_against", "kl_to_against")
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in names
        if getattr(parts[0], name) is not None
    }
    bad = tuple(row for part in parts for row in part.bad_rows)
    computed = sum(part.computed_tokens for part in parts)
    return dataclasses.replace(parts[0], stop=parts[-1].stop, bad_rows=bad, computed_tokens=computed, **joined)


def alone(engine: Any, segment: Segment) -> Any:
    return run(engine, [segment], [all_rows(segment)])[0].logprobs


def near(found: Any, wanted: Any, tolerance: Tolerance = FLOAT32_HIGHEST) -> bool:
    assert found.shape == wanted.shape
    return all(tolerance.allows(left, right) for left, right in zip(found.tolist(), wanted.tolist(), strict=True))


# ---- against the reference


@pytest.mark.parametrize("name", [*MODELS, *ROPES])
def test_logprobs_and_ranks_are_those_of_the_reference(name: str) -> None:
    segment = text(STEP + 8)
    read = all_rows(segment, top_k=4)
    found = run(tiny(name), [segment], [read])[0]
    wanted = run(tiny_reference(**(MODELS | ROPES)[name]), [segment], [read])[0]
    assert near(found.logprobs, wanted.logprobs)
    assert np.array_equal(found.top_ids, wanted.top_ids)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama gqa", "gpt2"])
def test_in_float64_it_is_the_reference_to_many_places(name: str) -> None:
    segment = text(STEP + 8)
    found = alone(tiny(name, "float64"), segment)
    assert near(found, alone(tiny_reference(**MODELS[name]), segment), FLOAT64)


def test_a_view_in_float64_is_the_reference_to_many_places() -> None:
    model = tiny_model()
    settings = EngineSettings(model=model, adapters=(("mine", tiny_adapter(model)),))
    segment = dataclasses.replace(text(STEP + 8), view=finetuned("mine"))
    found = alone(load(dataclasses.replace(settings, dtype="float64")), segment)
    assert near(found, alone(load_reference(settings), segment), FLOAT64)


def test_a_planted_difference_in_one_weight_is_seen(tmp_path: Path) -> None:
    opened = open_checkpoint(tiny_model(**MODELS["llama gqa"]))
    shutil.copytree(opened.directory, tmp_path / "model")
    tensors = {name: opened.values(name, np.float32).copy() for name in opened.tensors}
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] += 1.0
    write_weights(tmp_path / "model" / "model.safetensors", [made_tensor(*pair) for pair in tensors.items()])
    changed = load(EngineSettings(model=tmp_path / "model", step_tokens=STEP))
    assert not near(alone(changed, text(STEP)), alone(tiny(), text(STEP)))


# ---- sharing, steps, padding


def test_children_of_a_prefix_answer_as_plain_rows() -> None:
    wholes = [dataclasses.replace(text(50 + n, seed), ids=np.r_[random_ids(40, 9), random_ids(10 + n, seed)])
              for seed, n in enumerate((0, 3, 7, 1, 9))]  # fmt: skip
    prefix, _ = split(wholes[0], 40, 0)
    children = [split(whole, 40, 0)[1] for whole in wholes]
    reads = [NOTHING, *(Read(int_array(range(39, whole.ids.size)), np.roll(whole.ids, -1)[39:]) for whole in wholes)]
    found = run(tiny(), [prefix, *children], reads)
    for index, whole in enumerate(wholes, start=1):
        assert near(found[index].logprobs, alone(tiny(), whole)[39:])


def test_a_prefix_is_computed_once() -> None:
    prefix, child = split(text(45), 40, 0)
    found = run(tiny(), [prefix, child, child], [NOTHING, all_rows(child, 40), all_rows(child, 40)])
    assert [found[i].computed_tokens for i in range(3)] == [40, 5, 5]


def test_a_tree_of_three_levels_answers_as_plain_rows() -> None:
    whole = text(70)
    root, rest = split(whole, 20, 0)
    middle, leaf = split(rest, 30, 1)
    found = run(tiny(), [root, middle, leaf], [NOTHING, NOTHING, all_rows(whole)])
    assert near(found[2].logprobs, alone(tiny(), whole))


def test_steps_answer_as_one_step() -> None:
    segment = text(3 * STEP + 5)
    assert near(alone(tiny(), segment), alone(tiny(step_tokens=256), segment))


def test_neighbours_and_padding_change_nothing_beyond_noise() -> None:
    segments = [text(count, seed) for seed, count in enumerate((1, 16, 17, 30, 5, 90, 70))]
    found = run(tiny(), segments, [all_rows(segment) for segment in segments])
    for index, segment in enumerate(segments):
        assert near(found[index].logprobs, alone(tiny(), segment))


def test_a_broken_token_does_not_reach_its_neighbours(tmp_path: Path) -> None:
    opened = open_checkpoint(tiny_model(**MODELS["llama mha"]))
    shutil.copytree(opened.directory, tmp_path / "model")
    tensors = {name: opened.values(name, np.float32).copy() for name in opened.tensors}
    tensors["model.embed_tokens.weight"][7] = np.nan
    write_weights(tmp_path / "model" / "model.safetensors", [made_tensor(*pair) for pair in tensors.items()])
    engine = load(EngineSettings(model=tmp_path / "model"))
    sound, poisoned = (dataclasses.replace(text(8), ids=int_array([1, 2, 3, 4, last, 6, 8, 9])) for last in (5, 7))
    found = run(engine, [sound, poisoned, sound], [all_rows(sound)] * 3)
    assert [found[i].bad_rows for i in range(3)] == [(), (4, 5, 6, 7), ()]


def test_two_forwards_can_be_interleaved() -> None:
    segments = [text(3 * STEP, 1), text(3 * STEP, 2)]
    going = [tiny().forward(Batch((segment,)), (all_rows(segment),), lambda _: True) for segment in segments]
    steps: list[list[Step]] = [[], []]
    for _ in range(3):
        for index, forward in enumerate(going):
            steps[index].append(next(forward))
    for index, segment in enumerate(segments):
        assert near(gather(iter(steps[index]))[0].logprobs, alone(tiny(), segment))


def test_a_segment_nobody_wants_any_more_is_not_stepped_further() -> None:
    segments = [text(3 * STEP, 1), text(3 * STEP, 2)]
    wanted = {0, 1}
    forward = tiny().forward(Batch(tuple(segments)), tuple(map(all_rows, segments)), wanted.__contains__)
    next(forward)
    wanted.remove(0)
    assert {readout.segment for step in forward for readout in step} == {1}


# ---- contrasts


def test_a_segment_measured_against_itself_diverges_by_exactly_nothing() -> None:
    segment = text(24)
    found = run(tiny(), [segment, segment], [NOTHING, all_rows(segment, against=0)])[1]
    assert found.kl_from_against is not None
    assert found.kl_to_against is not None
    assert not found.kl_from_against.any()
    assert not found.kl_to_against.any()


def test_a_short_segment_waits_for_the_long_one_it_is_measured_against() -> None:
    long = text(3 * STEP)
    short = dataclasses.replace(long, ids=long.ids[:20], positions=long.positions[:20])
    found = run(tiny(), [long, short], [NOTHING, all_rows(short, against=0)])[1]
    assert found.kl_from_against is not None
    assert found.kl_from_against.max() <= FLOAT32_HIGHEST.abs_epsilon


# ---- views


@cache
def viewed() -> JaxEngine:
    folder = tiny_model(**MODELS["llama gqa"])
    usual = tiny_adapter(folder)
    small = tiny_adapter(folder, targets="all-linear", rank=2, alpha=3)
    broken = broken_adapter(usual, usual.parent / "broken-for-jax")
    return load(EngineSettings(model=folder, adapters=(("broken", broken), ("small", small), ("usual", usual))))


def under(view: View) -> Segment:
    return text(20, view=view)


def test_views_beside_each_other_answer_as_alone_and_the_broken_one_reaches_nobody() -> None:
    views = [BASE, finetuned("usual"), scaled("small", 1.25), finetuned("broken"), scaled("usual", 0.5)]
    found = run(viewed(), [under(view) for view in views], [all_rows(under(view)) for view in views])
    assert found[3].bad_rows
    for index in (0, 1, 2, 4):
        assert near(found[index].logprobs, alone(viewed(), under(views[index])))


def test_an_adapter_at_strength_nothing_is_the_base_to_the_bit() -> None:
    assert np.array_equal(alone(viewed(), under(scaled("broken", 0.0))), alone(viewed(), under(BASE)))


def test_another_strength_is_no_other_compilation() -> None:
    alone(viewed(), under(scaled("usual", 0.75)))
    before = viewed().compilations
    alone(viewed(), under(scaled("usual", 0.875)))
    assert viewed().compilations == before


# ---- the deterministic mode


@pytest.mark.parametrize("place", [0, 2])
def test_a_deterministic_answer_is_bit_equal_whatever_stands_beside_it(place: int) -> None:
    segment = text(2 * STEP + 6, 4)
    neighbours = [text(50, 5), text(7, 6)]
    row = [*neighbours[:place], segment, *neighbours[place:]]
    found = run(tiny(), row, [all_rows(one) for one in row], deterministic=True)
    by_itself = run(tiny(), [segment], [all_rows(segment)], deterministic=True)
    assert np.array_equal(found[place].logprobs, by_itself[0].logprobs)  # type: ignore[arg-type]


def test_a_deterministic_answer_does_not_depend_on_how_many_rows_are_read() -> None:
    segment = text(20)
    whole = run(tiny(), [segment], [all_rows(segment)], deterministic=True)[0].logprobs
    single = Read(int_array([11]), targets=segment.ids[12:13])
    assert run(tiny(), [segment], [single], deterministic=True)[0].logprobs == whole[11:12]  # type: ignore[index]


# ---- compiling


def test_compilations_are_bounded_by_the_buckets() -> None:
    engine = load(EngineSettings(model=tiny_model(**MODELS["llama mqa"]), step_tokens=STEP))
    for count in range(1, 17):
        alone(engine, text(count))
    assert engine.compilations == {"forward": 1, "read": 2}


def test_what_was_prepared_is_not_compiled_again() -> None:
    engine = load(EngineSettings(model=tiny_model(**MODELS["llama mqa"]), step_tokens=STEP))
    engine.prepare(Shape(2, 16))
    before = engine.compilations
    run(engine, [text(16, 1), text(16, 2)], [all_rows(text(16))] * 2)
    assert engine.compilations == before


def test_the_processes_own_jax_settings_are_left_alone() -> None:
    alone(tiny(), text(8))
    assert jax.numpy.arange(3).dtype == np.int32  # no 64-bit types outside
    assert (jax.numpy.ones(3, np.int32) * jax.numpy.ones(3, np.float32)).dtype == np.float32  # promotion as ever


# ---- what it stands apart from


def test_the_package_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, backend_jax.engine; print(*{'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
