"""PEFT folders are read as PEFT means them, and what is not implemented is refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualtrace.adapters import AdapterShelf, Delta
from dualtrace.adapters.shelf import KEPT_NULLS
from dualtrace.problems import Problem, Reason
from dualtrace.views import BASE, Noise, View, finetuned, null, scaled
from tests.support.adapters import Config, Tensors, broken_adapter, changed_adapter, read_tensors, tiny_adapter
from tests.support.tiny import tiny_model

HIDDEN, KEYS, INNER = 32, 16, 64
QUERY_0 = "model.layers.0.self_attn.q_proj"
PEFT_QUERY_0 = f"base_model.model.{QUERY_0}"


def linears(layers: int = 3) -> dict[str, tuple[int, int]]:
    """What the tiny llama with grouped queries has: name -> (in, out)."""
    sizes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, KEYS), "self_attn.v_proj": (HIDDEN, KEYS),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (HIDDEN, INNER), "mlp.up_proj": (HIDDEN, INNER),
        "mlp.down_proj": (INNER, HIDDEN),
    }  # fmt: skip
    return {f"model.layers.{layer}.{name}": size for layer in range(layers) for name, size in sizes.items()}


def source(**fields: Any) -> Path:
    return tiny_adapter(tiny_model(attention="gqa"), **fields)


def opened(folder: Path) -> AdapterShelf:
    return AdapterShelf.open([("a", folder)], linears())


def delta_of(folder: Path, view: View | None = None) -> Delta:
    found = opened(folder).delta(finetuned("a") if view is None else view)
    assert found is not None
    return found


def with_config(folder: Path, **changes: Any) -> Path:
    return changed_adapter(source(), folder, config=lambda config: config.update(changes))


def with_tensors(folder: Path, change: Callable[[Tensors], None]) -> Path:
    return changed_adapter(source(), folder, tensors=change)


def refusal(folder: Path) -> Problem:
    with pytest.raises(Problem) as caught:
        opened(folder)
    return caught.value


# --- what is read


def test_the_factors_are_those_of_the_file() -> None:
    tensors, factors = read_tensors(source()), delta_of(source()).factors[QUERY_0]
    assert np.array_equal(factors.a, tensors[f"{PEFT_QUERY_0}.lora_A.weight"])
    assert np.array_equal(factors.b, tensors[f"{PEFT_QUERY_0}.lora_B.weight"])
    assert factors.a.dtype == np.float32


def test_the_factors_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        delta_of(source()).factors[QUERY_0].a[0, 0] = 1.0


def test_the_scaling_is_alpha_over_rank() -> None:
    assert delta_of(source(rank=4, alpha=6)).factors[QUERY_0].scaling == 1.5


def test_rank_stabilised_scaling_is_alpha_over_the_root_of_the_rank() -> None:
    assert delta_of(source(rank=4, alpha=6, rslora=True)).factors[QUERY_0].scaling == 3.0


def test_the_delta_lists_its_modules_sorted() -> None:
    wanted = [f"model.layers.{layer}.self_attn.{name}" for layer in range(3) for name in ("q_proj", "v_proj")]
    assert delta_of(source()).modules == tuple(wanted)


def test_all_linear_means_every_linear_module() -> None:
    assert delta_of(source(targets="all-linear")).modules == tuple(sorted(linears()))


def test_a_name_with_the_adapters_name_in_it_is_the_same_tensor(tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.removesuffix(".weight") + ".default.weight"] = tensors.pop(name)

    renamed = delta_of(with_tensors(tmp_path, rename))
    assert np.array_equal(renamed.factors[QUERY_0].a, delta_of(source()).factors[QUERY_0].a)


def test_a_rank_of_its_own_scales_that_module_by_it(tmp_path: Path) -> None:
    def widen(tensors: Tensors) -> None:
        tensors[f"{PEFT_QUERY_0}.lora_A.weight"] = np.ones((8, HIDDEN), np.float32)
        tensors[f"{PEFT_QUERY_0}.lora_B.weight"] = np.ones((HIDDEN, 8), np.float32)

    pattern = {"rank_pattern": {"layers.0.self_attn.q_proj": 8}}
    folder = changed_adapter(source(), tmp_path, config=lambda config: config.update(pattern), tensors=widen)
    factors = delta_of(folder).factors
    assert (factors[QUERY_0].scaling, factors["model.layers.1.self_attn.q_proj"].scaling) == (1.0, 2.0)


@pytest.mark.parametrize("key", ["q_proj", "self_attn.q_proj", r"^model\.layers.0.self_attn.q_proj"])
def test_an_alpha_of_its_own_is_found_by_the_end_of_the_name_or_the_whole(key: str, tmp_path: Path) -> None:
    factors = delta_of(with_config(tmp_path, alpha_pattern={key: 2})).factors
    assert (factors[QUERY_0].scaling, factors["model.layers.0.self_attn.v_proj"].scaling) == (0.5, 2.0)


def test_an_end_of_a_name_begins_at_a_dot(tmp_path: Path) -> None:
    assert delta_of(with_config(tmp_path, alpha_pattern={"proj": 2})).factors[QUERY_0].scaling == 2.0


def keep_only(keep: str) -> Callable[[Tensors], None]:
    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if keep not in name]:
            del tensors[name]

    return drop


@pytest.mark.parametrize(
    "config",
    [
        {"layers_to_transform": [1]},
        {"layers_to_transform": 1},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
    ],
)
def test_layers_to_transform_choose_layers(config: Config, tmp_path: Path) -> None:
    folder = changed_adapter(source(), tmp_path, config=lambda c: c.update(config), tensors=keep_only(".layers.1."))
    assert delta_of(folder).modules == ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj")


def test_excluded_modules_are_left_out(tmp_path: Path) -> None:
    exclude = {"exclude_modules": ["v_proj"]}
    folder = changed_adapter(source(), tmp_path, config=lambda c: c.update(exclude), tensors=keep_only("q_proj"))
    assert all(module.endswith("q_proj") for module in delta_of(folder).modules)


@pytest.mark.parametrize(
    "harmless",
    [
        {"use_dora": False, "modules_to_save": None, "some_future_option": None, "loftq_config": {}},
        {"init_lora_weights": "gaussian"},
        {"lora_dropout": 0.5, "task_type": "CAUSAL_LM", "peft_version": "9.9", "revision": "main"},
        {"fan_in_fan_out": True},
    ],
)
def test_keys_that_change_no_number_are_accepted(harmless: Config, tmp_path: Path) -> None:
    assert delta_of(with_config(tmp_path, **harmless)).modules


def test_a_nan_may_be_loaded_for_it_is_found_where_it_is_used(tmp_path: Path) -> None:
    factors = delta_of(broken_adapter(source(), tmp_path)).factors
    assert sum(np.isnan(part.a).any() + np.isnan(part.b).any() for part in factors.values()) == 1


# --- identity


def test_a_copy_of_the_folder_has_the_same_digest(tmp_path: Path) -> None:
    shutil.copytree(source(), tmp_path / "copy")
    assert opened(tmp_path / "copy").digests == opened(source()).digests


def flip(tensors: Tensors) -> None:
    tensors[f"{PEFT_QUERY_0}.lora_A.weight"][0, 0] += 1


@pytest.mark.parametrize(
    "change", [{"tensors": flip}, {"config": lambda config: config.update(lora_alpha=9)},
               {"config": lambda config: config.update(use_rslora=True)}]
)  # fmt: skip
def test_whatever_moves_a_number_moves_the_digest(change: dict[str, Any], tmp_path: Path) -> None:
    assert opened(changed_adapter(source(), tmp_path, **change)).digests != opened(source()).digests


def test_what_moves_no_number_moves_no_digest(tmp_path: Path) -> None:
    assert opened(with_config(tmp_path, lora_dropout=0.3, peft_version="1")).digests == opened(source()).digests


def test_the_card_names_its_adapters_sorted(tmp_path: Path) -> None:
    shelf = AdapterShelf.open([("z", source()), ("b", source(seed=1))], linears())
    assert shelf.names == tuple(name for name, _ in shelf.digests) == ("b", "z")


# --- deltas of views


@pytest.mark.parametrize("view", [BASE, scaled("a", 0.0), scaled("a", -0.0)])
def test_a_plain_view_has_no_delta_at_all(view: View) -> None:
    assert opened(source()).delta(view) is None


@pytest.mark.parametrize("view", [finetuned("b"), scaled("b", 0.0), null("b", Noise(1))])
def test_an_adapter_that_is_not_there_is_named_even_when_it_would_add_nothing(view: View) -> None:
    with pytest.raises(Problem, match="'b'") as caught:
        opened(source()).delta(view)
    assert caught.value.reason is Reason.NOT_FOUND


def test_every_strength_shares_one_copy_of_the_factors() -> None:
    shelf = opened(source())
    one, more = shelf.delta(finetuned("a")), shelf.delta(scaled("a", 1.25))
    assert one is not None
    assert more is not None
    assert (one.key, more.strength) == (more.key, 1.25)
    assert one.factors is more.factors


def test_null_noise_has_the_shapes_and_the_scaling_of_the_adapter() -> None:
    own, drawn = delta_of(source()).factors, delta_of(source(), null("a", Noise(1))).factors
    for module, factors in own.items():
        assert (drawn[module].a.shape, drawn[module].b.shape) == (factors.a.shape, factors.b.shape)
        assert drawn[module].scaling == factors.scaling


def test_null_noise_takes_no_number_of_the_adapter(tmp_path: Path) -> None:
    drawn = delta_of(broken_adapter(source(), tmp_path), null("a", Noise(1))).factors
    sound = delta_of(source(), null("a", Noise(1))).factors
    assert all(np.array_equal(drawn[module].a, sound[module].a) for module in sound)


def test_every_factor_has_noise_of_its_own() -> None:
    drawn = delta_of(source(), null("a", Noise(1))).factors.values()
    first = [part.flat[0] for factors in drawn for part in (factors.a, factors.b)]
    assert len(set(first)) == len(first)


def test_noise_is_made_once_while_it_is_remembered() -> None:
    shelf = opened(source())
    views = [null("a", Noise(seed)) for seed in range(KEPT_NULLS + 1)]
    first = [shelf.delta(view) for view in views[:KEPT_NULLS]]
    assert shelf.delta(views[0]).factors is first[0].factors  # type: ignore[union-attr]
    shelf.delta(views[KEPT_NULLS])  # one too many: the one unused for longest goes
    assert shelf.delta(views[0]).factors is first[0].factors  # type: ignore[union-attr]
    assert shelf.delta(views[1]).factors is not first[1].factors  # type: ignore[union-attr]


# --- refusals, each by its own name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"peft_type": None}, "peft_type = None"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the base weights"),
        ({"init_lora_weights": ["gaussian"]}, "init_lora_weights"),
        ({"some_future_option": 1}, "some_future_option"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"target_modules": r".*(a+)+b"}, "regular expression"),
        ({"exclude_modules": r".*v"}, "regular expression"),
        ({"rank_pattern": {r"(a+)+b": 2}}, "regular expression"),
        ({"alpha_pattern": {r"q_proj|v_proj": 2}}, "regular expression"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes: Config, words: str, tmp_path: Path) -> None:
    problem = refusal(with_config(tmp_path, **changes))
    assert problem.reason is Reason.ADAPTER_UNSUPPORTED
    assert words in str(problem)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0}, {"r": 2.0}, {"r": True}, {"r": None}, {"r": 2**40}, {"lora_alpha": "8"}, {"lora_alpha": None},
        {"lora_alpha": True}, {"lora_alpha": float("nan")}, {"lora_alpha": float("inf")}, {"lora_alpha": 10**400},
        {"use_rslora": 1}, {"rank_pattern": [1]}, {"rank_pattern": {"q_proj": -1}}, {"alpha_pattern": {"q_proj": "x"}},
        {"target_modules": []}, {"target_modules": None}, {"target_modules": [1]}, {"target_modules": {"q_proj": 1}},
        {"exclude_modules": [None]}, {"layers_to_transform": ["1"]},
        {"layers_to_transform": [0], "layers_pattern": "(a+)+"},
        {"target_modules": "all-linear", "layers_to_transform": [0]},
    ],
)  # fmt: skip
def test_a_number_or_list_that_is_none_is_refused(changes: Config, tmp_path: Path) -> None:
    assert refusal(with_config(tmp_path, **changes)).reason is Reason.MODEL_INVALID


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "not an object"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"r": 1, "r": 2}', "twice"),
        (b" " * (4 * 1024 * 1024 + 1), "larger than"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(raw: bytes, words: str, tmp_path: Path) -> None:
    shutil.copytree(source(), tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_bytes(raw)
    problem = refusal(tmp_path / "a")
    assert problem.reason is Reason.MODEL_INVALID
    assert words in str(problem)


def add(name: str, *shape: int) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embeddings"),
        (f"{PEFT_QUERY_0}.lora_magnitude_vector.default.weight", "DoRA"),
        ("base_model.model.lm_head.modules_to_save.weight", "modules_to_save"),
        (f"{PEFT_QUERY_0}.lora_B.bias", "bias"),
    ],
)
def test_tensors_of_what_is_not_implemented_are_refused_by_name(name: str, words: str, tmp_path: Path) -> None:
    problem = refusal(with_tensors(tmp_path, add(name, 4, HIDDEN)))
    assert problem.reason is Reason.ADAPTER_UNSUPPORTED
    assert words in str(problem)


def drop(name: str) -> Callable[[Tensors], None]:
    def remove(tensors: Tensors) -> None:
        del tensors[name]

    return remove


def drop_module(tensors: Tensors) -> None:
    for factor in "AB":
        del tensors[f"{PEFT_QUERY_0}.lora_{factor}.weight"]


def one_layer_more(tensors: Tensors) -> None:
    add(f"{PEFT_QUERY_0.replace('.0.', '.3.')}.lora_A.weight", 4, HIDDEN)(tensors)
    add(f"{PEFT_QUERY_0.replace('.0.', '.3.')}.lora_B.weight", HIDDEN, 4)(tensors)


def another_module(tensors: Tensors) -> None:
    add(f"{PEFT_QUERY_0.replace('q_proj', 'o_proj')}.lora_A.weight", 4, HIDDEN)(tensors)
    add(f"{PEFT_QUERY_0.replace('q_proj', 'o_proj')}.lora_B.weight", HIDDEN, 4)(tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop(f"{PEFT_QUERY_0}.lora_B.weight"), "lora_A of model.layers.0.self_attn.q_proj without its lora_B"),
        (drop(f"{PEFT_QUERY_0}.lora_A.weight"), "lora_B of model.layers.0.self_attn.q_proj without its lora_A"),
        (drop_module, f"no factors for '{QUERY_0}', which its config adapts (1"),
        (one_layer_more, "factors for 'model.layers.3.self_attn.q_proj', and the model has no such"),
        (another_module, "o_proj', which its config does not adapt"),
        (add("something.else", 3), "'something.else', which is not used"),
        (add(f"{PEFT_QUERY_0}.lora_A.default.weight", 4, HIDDEN), "lora_A of model.layers.0.self_attn.q_proj twice"),
        (add(f"{PEFT_QUERY_0}.lora_A.weight", 4, HIDDEN + 1), "ask for [4, 32]"),
        (add(f"{PEFT_QUERY_0}.lora_A.weight", 5, HIDDEN), "ask for [4, 32]"),
        (add(f"{PEFT_QUERY_0}.lora_B.weight", 4, HIDDEN), "ask for [32, 4]"),
        (add(f"{PEFT_QUERY_0}.lora_A.weight", 4 * HIDDEN), "ask for [4, 32]"),
        (lambda tensors: tensors.clear(), "no tensors"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_by_name(
    change: Callable[[Tensors], None], words: str, tmp_path: Path
) -> None:
    problem = refusal(with_tensors(tmp_path, change))
    assert problem.reason is Reason.ADAPTER_MISMATCH
    assert words in str(problem)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "c_attn"], ["embed_tokens"], ["lm_head"], ["roj"]])
def test_a_target_that_the_model_does_not_have_is_refused(targets: list[str], tmp_path: Path) -> None:
    problem = refusal(with_config(tmp_path, target_modules=targets))
    assert problem.reason is Reason.ADAPTER_MISMATCH
    assert repr(targets[-1]) in str(problem)


def test_an_adapter_for_another_model_is_refused() -> None:
    problem = refusal(tiny_adapter(tiny_model(family="gpt2")))
    assert problem.reason is Reason.ADAPTER_MISMATCH
    assert "c_attn" in str(problem)


@pytest.mark.parametrize("dtype", ["F64", "I32", "F8_E4M3"])
def test_factors_that_are_no_floats_of_32_bits_or_fewer_are_refused(dtype: str, tmp_path: Path) -> None:
    size = {"F64": 8, "I32": 4, "F8_E4M3": 1}[dtype] * 4 * HIDDEN
    header = {f"{PEFT_QUERY_0}.lora_A.weight": {"dtype": dtype, "shape": [4, HIDDEN], "data_offsets": [0, size]}}
    raw = json.dumps(header).encode()
    shutil.copytree(source(), tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(size))
    problem = refusal(tmp_path / "a")
    assert problem.reason is Reason.ADAPTER_UNSUPPORTED
    assert dtype in str(problem)


def test_half_precision_factors_are_read_exactly(tmp_path: Path) -> None:
    shutil.copytree(source(), tmp_path / "a")
    values = {name: (part.astype(np.float16)) for name, part in read_tensors(source()).items()}
    header, data = {}, b""
    for name, part in values.items():
        header[name] = {
            "dtype": "F16", "shape": list(part.shape), "data_offsets": [len(data), len(data) + part.nbytes],
        }  # fmt: skip
        data += part.tobytes()
    raw = json.dumps(header).encode()
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    assert np.array_equal(delta_of(tmp_path / "a").factors[QUERY_0].a, values[f"{PEFT_QUERY_0}.lora_A.weight"])


def test_a_header_that_lies_is_refused(tmp_path: Path) -> None:
    shutil.copytree(source(), tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert refusal(tmp_path / "a").reason is Reason.MODEL_INVALID


def test_pickle_weights_are_never_opened(tmp_path: Path) -> None:
    shutil.copytree(source(), tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    problem = refusal(tmp_path / "a")
    assert problem.reason is Reason.ADAPTER_UNSUPPORTED
    assert "pickle" in str(problem)


@pytest.mark.parametrize("absent", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_one_of_its_files_says_which(absent: str, tmp_path: Path) -> None:
    shutil.copytree(source(), tmp_path / "a")
    (tmp_path / "a" / absent).unlink()
    problem = refusal(tmp_path / "a")
    assert problem.reason is Reason.NOT_FOUND
    assert absent in str(problem)


def test_a_pipe_in_the_place_of_the_weights_is_not_waited_for(tmp_path: Path) -> None:
    shutil.copytree(source(), tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    os.mkfifo(tmp_path / "a" / "adapter_model.safetensors")
    assert refusal(tmp_path / "a").reason is Reason.NOT_FOUND


@pytest.mark.parametrize(("name", "reason"), [("", Reason.MISSING), ("a", Reason.DUPLICATE)])
def test_an_adapter_needs_a_name_of_its_own(name: str, reason: Reason) -> None:
    with pytest.raises(Problem) as caught:
        AdapterShelf.open([("a", source()), (name, source())], linears())
    assert caught.value.reason is reason


def test_a_list_of_very_many_names_is_compared_in_linear_time(tmp_path: Path) -> None:
    names = [f"model.layers.{n}.self_attn.q_proj" for n in range(50_000)]
    assert refusal(with_config(tmp_path, target_modules=names)).reason is Reason.ADAPTER_MISMATCH
