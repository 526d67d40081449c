"""Tiny random checkpoints: the same arguments give the same bytes on every machine.

It knows what a model directory of each family looks like. It must not know engines. They are for tests and first
tries: three layers, some thirty columns, logits that are far from flat.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from dualtrace.models.tokenizers import (
    BOS,
    EOS,
    SENTENCE_END,
    SENTENCE_START,
    UNKNOWN,
    byte_level_tokenizer,
    sentencepiece_style_tokenizer,
)
from dualtrace.models.weight_file import FloatTensor, write_weights
from dualtrace.problems import FailedPrecondition, InvalidArgument, Reason

FAMILIES = ("llama", "gpt2")
ATTENTIONS = ("mha", "mqa", "gqa")
TOKENIZERS = ("byte_level", "sentencepiece")
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
PADDING_ROWS = 8  # real models have logits that no token stands for; so have these

Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TinyModel:
    """What a tiny checkpoint is made from."""

    family: Literal["llama", "gpt2"] = "llama"
    attention: Literal["mha", "mqa", "gqa"] = "mha"
    tokenizer: Literal["byte_level", "sentencepiece"] = "byte_level"
    seed: int = 0
    vocab_size: int | None = None  # the logit width; None = the tokenizer's size and a few padding rows
    layers: int = 3
    hidden_size: int = 32
    heads: int = 4
    head_dim: int | None = None  # llama only; None = hidden_size / heads
    max_positions: int = 512
    tied: bool | None = None  # None = the family's habit: llama untied, gpt2 tied
    bias: bool = False  # llama only: biases in attention and feed-forward
    add_bos: bool | None = None  # None = the family's habit: llama adds it, gpt2 does not
    rope_parameters: tuple[tuple[str, str | int | float], ...] = ()  # llama only, over the default ones

    @property
    def kv_heads(self) -> int:
        return {"mha": self.heads, "mqa": 1, "gqa": self.heads // 2}[self.attention]

    @property
    def ties(self) -> bool:
        return self.family == "gpt2" if self.tied is None else self.tied


def write_tiny_model(directory: Path, model: TinyModel | None = None, *, force: bool = False, **fields: Any) -> Path:
    """Write a tiny random checkpoint with its tokenizer; `fields` are those of `TinyModel`.

    The directory appears complete or not at all. One that is not empty is refused unless `force`, which replaces it.
    """
    model = model if model is not None and not fields else _from_fields(model, fields)
    _check(model)
    directory = directory.resolve()
    _check_place(directory, force)
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        _write_files(building, model)
        building.chmod(0o755)  # mkdtemp made it private
        if directory.exists():
            shutil.rmtree(directory)
        os.rename(building, directory)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return directory


def _check_place(directory: Path, force: bool) -> None:
    if not directory.exists():
        return
    present = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else [directory.name]
    if present and not force:
        raise FailedPrecondition(
            Reason.ALREADY_EXISTS, f"{directory} is not empty; choose another folder, or force to replace it."
        )
    if foreign := [name for name in present if name not in FILES]:  # a slip must not cost anybody a folder
        raise FailedPrecondition(
            Reason.ALREADY_EXISTS,
            f"{directory} holds {foreign[0]}, which no tiny model has, so it is not replaced even by force; "
            "choose another folder.",
        )


def _from_fields(model: TinyModel | None, fields: dict[str, Any]) -> TinyModel:
    if model is not None:
        raise InvalidArgument(Reason.CONFLICT, "give a TinyModel or its fields, not both.")
    known = TinyModel.__dataclass_fields__
    if unknown := sorted(set(fields) - set(known)):
        raise InvalidArgument(
            Reason.UNKNOWN_FIELD, f"a tiny model has no {unknown[0]}.", field=unknown[0], allowed=", ".join(known)
        )
    return TinyModel(**fields)


def _check(model: TinyModel) -> None:
    for field, value, allowed in (
        ("family", model.family, FAMILIES),
        ("attention", model.attention, ATTENTIONS if model.family != "gpt2" else ("mha",)),
        ("tokenizer", model.tokenizer, TOKENIZERS),
    ):
        if value not in allowed:
            scope = f" of the family {model.family}" if field == "attention" else ""
            raise InvalidArgument(
                Reason.OUT_OF_RANGE,
                f"{field} {value!r} asked{scope}; it can be {', '.join(allowed)}.",
                field=field,
                allowed=", ".join(allowed),
            )
    if min(model.layers, model.hidden_size, model.heads, model.max_positions) < 1 or model.seed < 0:
        raise InvalidArgument(Reason.OUT_OF_RANGE, "sizes must be 1 or more, the seed 0 or more.")
    if model.hidden_size % model.heads or (model.attention == "gqa" and model.heads % 2):
        raise InvalidArgument(
            Reason.OUT_OF_RANGE,
            f"{model.heads} heads do not divide {model.hidden_size} columns, or are odd with gqa.",
            field="heads",
        )
    if model.family == "llama" and (model.head_dim or model.hidden_size // model.heads) % 2:
        raise InvalidArgument(Reason.OUT_OF_RANGE, "rotary positions need an even head width.", field="head_dim")
    if model.family == "gpt2" and (model.bias or model.head_dim or model.rope_parameters):
        raise InvalidArgument(Reason.CONFLICT, "bias, head_dim and rope_parameters are for the family llama only.")


def _write_files(directory: Path, model: TinyModel) -> None:
    tokenizer, names = _tokenizer(model)
    smallest = tokenizer.get_vocab_size()
    width = smallest + PADDING_ROWS if model.vocab_size is None else model.vocab_size
    if width < smallest:
        raise InvalidArgument(
            Reason.OUT_OF_RANGE,
            f"vocab_size {width} asked; the {model.tokenizer} tokenizer has {smallest} tokens.",
            field="vocab_size",
            allowed=f"{smallest} or more",
        )
    ids = {f"{role}_token_id": tokenizer.token_to_id(token) for role, token in names.items() if role != "unk"}
    if model.family == "llama":
        config, tensors = _llama_config(model, width), _llama_tensors(model, width)
    else:
        config, tensors = _gpt2_config(model, width), _gpt2_tensors(model, width)
    _write_json(directory / "config.json", {**config, **ids})
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.max_positions,
            **{f"{role}_token": token for role, token in names.items()},
        },
    )
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    write_weights(directory / "model.safetensors", tensors)


def _tokenizer(model: TinyModel) -> tuple[Tokenizer, dict[str, str]]:
    add_bos = model.family == "llama" if model.add_bos is None else model.add_bos
    if model.tokenizer == "byte_level":
        return byte_level_tokenizer(add_bos=add_bos), {"bos": BOS, "eos": EOS}
    names = {"bos": SENTENCE_START, "eos": SENTENCE_END, "unk": UNKNOWN}
    return sentencepiece_style_tokenizer(add_bos=add_bos), names


def _llama_config(model: TinyModel, width: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": width,
        "hidden_size": model.hidden_size,
        "intermediate_size": 2 * model.hidden_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim or model.hidden_size // model.heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **dict(model.rope_parameters)},
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
        "tie_word_embeddings": model.ties,
        "dtype": "float32",
    }


def _gpt2_config(model: TinyModel, width: int) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": width,
        "n_positions": model.max_positions,
        "n_embd": model.hidden_size,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "tie_word_embeddings": model.ties,
        "dtype": "float32",
    }


def _llama_tensors(model: TinyModel, width: int) -> list[FloatTensor]:
    hidden, inner, draw = model.hidden_size, 2 * model.hidden_size, _Draw(model.seed)
    head_dim = model.head_dim or hidden // model.heads
    queries, keys = model.heads * head_dim, model.kv_heads * head_dim
    tensors = [draw.embedding("model.embed_tokens.weight", (width, hidden), model.ties)]
    for layer in range(model.layers):
        name = f"model.layers.{layer}"
        tensors.append(draw.gain(f"{name}.input_layernorm.weight", hidden))
        tensors.append(draw.gain(f"{name}.post_attention_layernorm.weight", hidden))
        for part, outputs, inputs in (
            ("self_attn.q_proj", queries, hidden), ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden), ("self_attn.o_proj", hidden, queries),
            ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden), ("mlp.down_proj", hidden, inner),
        ):  # fmt: skip
            tensors.append(draw.matrix(f"{name}.{part}.weight", (outputs, inputs), inputs))
            if model.bias:
                tensors.append(draw.shift(f"{name}.{part}.bias", outputs))
    tensors.append(draw.gain("model.norm.weight", hidden))
    if not model.ties:
        tensors.append(draw.head("lm_head.weight", (width, hidden)))
    return tensors


def _gpt2_tensors(model: TinyModel, width: int) -> list[FloatTensor]:
    hidden, draw = model.hidden_size, _Draw(model.seed)
    tensors = [draw.embedding("transformer.wte.weight", (width, hidden), model.ties)]
    tensors.append(draw.embedding("transformer.wpe.weight", (model.max_positions, hidden), model.ties))
    names = [f"transformer.h.{layer}" for layer in range(model.layers)]
    for name in names:
        for part, inputs, outputs in (
            ("attn.c_attn", hidden, 3 * hidden), ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", hidden, 4 * hidden), ("mlp.c_proj", 4 * hidden, hidden),
        ):  # fmt: skip
            tensors.append(draw.matrix(f"{name}.{part}.weight", (inputs, outputs), inputs))  # Conv1D: [in, out]
            tensors.append(draw.shift(f"{name}.{part}.bias", outputs))
    for norm in [f"{name}.{part}" for name in names for part in ("ln_1", "ln_2")] + ["transformer.ln_f"]:
        tensors.append(draw.gain(f"{norm}.weight", hidden))
        tensors.append(draw.shift(f"{norm}.bias", hidden))
    if not model.ties:
        tensors.append(draw.head("lm_head.weight", (width, hidden)))
    return tensors


class _Draw:
    """Random tensors, each from a stream of its own name, so that one tensor more moves no other.

    The scales give logits a standard deviation of about two: layers write as much as the embedding holds, attention
    scores are a little peaked, and the head reads normed states of length sqrt(hidden).
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def embedding(self, name: str, shape: tuple[int, ...], tied: bool) -> FloatTensor:
        # a tied embedding is the head too; larger, and every row would predict its own token
        return self._normal(name, shape, 2.0 / math.sqrt(shape[1]) if tied else 1.0)

    def head(self, name: str, shape: tuple[int, ...]) -> FloatTensor:
        return self._normal(name, shape, 2.0 / math.sqrt(shape[1]))

    def matrix(self, name: str, shape: tuple[int, ...], inputs: int) -> FloatTensor:
        return self._normal(name, shape, 1.5 / math.sqrt(inputs))

    def shift(self, name: str, size: int) -> FloatTensor:
        return self._normal(name, (size,), 0.1)

    def gain(self, name: str, size: int) -> FloatTensor:
        return self._normal(name, (size,), 0.1, mean=1.0)

    def _normal(self, name: str, shape: tuple[int, ...], deviation: float, mean: float = 0.0) -> FloatTensor:
        def pieces() -> list[Values]:
            normal = standard_normal(f"{self._seed}:{name}", math.prod(shape)).reshape(shape)
            return [(mean + deviation * normal).astype(np.float32)]

        return FloatTensor(name, shape, pieces)


def standard_normal(key: str, count: int) -> npt.NDArray[np.float64]:
    """Nearly normal numbers: sums of twelve uniform ones (variance 1). Integers until the end and no logarithm, so
    that neither a numpy version nor a machine's maths library can change a bit of them. [count] float64"""
    stream = hashlib.shake_128(key.encode()).digest(12 * 2 * count)
    sums = np.frombuffer(stream, dtype="<u2").reshape(count, 12).sum(axis=1, dtype=np.int64)
    normal: npt.NDArray[np.float64] = (sums - 6 * 65535) / 65536.0
    return normal


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
