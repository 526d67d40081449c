"""Turning a Llama-family GGUF file into a model directory: config, float32 safetensors, tokenizer.

It knows both formats. It must not know where the file came from; whoever calls has checked that it is the right one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dualtrace.models.weight_file import FloatTensor, write_weights
from dualtrace.problems import InvalidArgument, Reason, Unsupported

ROWS_AT_A_TIME = 4096  # of a matrix that is dequantised: keeps the peak far below one large embedding
CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of tokens that are never made of text

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip

Values = npt.NDArray[np.float32]
Metadata = dict[str, Any]


def convert_gguf(file: Path, directory: Path, progress: Callable[[float], None]) -> None:
    """Write config.json, model.safetensors (float32), tokenizer.json and tokenizer_config.json into `directory`."""
    reader = GGUFReader(str(file))
    metadata: Metadata = {name: field.contents() for name, field in reader.fields.items()}
    _check_architecture(metadata)
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    tensors = sorted((_float_tensor(tensor, metadata) for tensor in reader.tensors), key=lambda tensor: tensor.name)
    _write_json(directory / "config.json", llama_config(metadata, tied=tied))
    tokenizer = bpe_tokenizer(metadata)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    _write_json(directory / "tokenizer_config.json", tokenizer_config(metadata))
    write_weights(directory / "model.safetensors", tensors, lambda done, total: progress(done / total))


def llama_config(metadata: Metadata, *, tied: bool) -> dict[str, Any]:
    """The Hugging Face config. Rope theta stands twice: newer readers look in rope_parameters, older ones beside it."""
    heads, hidden = _need(metadata, "llama.attention.head_count"), _need(metadata, "llama.embedding_length")
    theta = _shortest(_need(metadata, "llama.rope.freq_base"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(_need(metadata, "tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": _need(metadata, "llama.feed_forward_length"),
        "num_hidden_layers": _need(metadata, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": metadata.get("llama.rope.dimension_count", hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": _need(metadata, "llama.context_length"),
        "rms_norm_eps": _shortest(_need(metadata, "llama.attention.layer_norm_rms_epsilon")),
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rope_theta": theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }


def bpe_tokenizer(metadata: Metadata) -> Tokenizer:
    """The byte-level BPE that the file's tokens and merges describe. Nothing is added before or after a text."""
    tokens: list[str] = _need(metadata, "tokenizer.ggml.tokens")
    kinds: list[int] = _need(metadata, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in _need(metadata, "tokenizer.ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    return tokenizer


def tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    tokens = _need(metadata, "tokenizer.ggml.tokens")
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: metadata.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": _need(metadata, "llama.context_length"),
        **{role: tokens[number] for role, number in ids.items() if number is not None},
    }
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config


def _check_architecture(metadata: Metadata) -> None:
    """Only what this module converts faithfully; anything else is named."""
    for key, allowed in (
        ("general.architecture", ("llama",)),
        ("tokenizer.ggml.model", ("gpt2",)),
        ("tokenizer.ggml.pre", ("smollm",)),
        ("tokenizer.ggml.add_bos_token", (False, None)),
        ("llama.rope.scaling.type", (None, "none")),
        ("llama.expert_count", (None, 0)),
    ):
        if metadata.get(key) not in allowed:
            raise Unsupported(
                Reason.MODEL_UNSUPPORTED,
                f"the GGUF file has {key} = {metadata.get(key)!r}; only {allowed[0]!r} is converted.",
                allowed=str(allowed[0]),
            )


def _float_tensor(tensor: Any, metadata: Metadata) -> FloatTensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    layer_part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
    heads_key = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}.get(layer_part)
    heads = None if heads_key is None else _need(metadata, heads_key)

    def pieces() -> Iterator[Values]:
        if heads is not None:
            yield undo_interleave(dequantize(tensor.data, tensor.tensor_type), heads)
            return
        for start in range(0, len(tensor.data), ROWS_AT_A_TIME):
            yield dequantize(tensor.data[start : start + ROWS_AT_A_TIME], tensor.tensor_type)

    return FloatTensor(hugging_face_name(tensor.name), shape, pieces)


def undo_interleave(rows: Values, heads: int) -> Values:
    """GGUF keeps the two halves of a rotary pair side by side; Hugging Face keeps them half a head apart. [out, in]"""
    paired = rows.reshape(heads, rows.shape[0] // heads // 2, 2, rows.shape[1])
    return paired.swapaxes(1, 2).reshape(rows.shape)


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in OUTER:
        return f"{OUTER[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in INNER:
        return f"model.layers.{parts[1]}.{INNER[parts[2]]}.{parts[3]}"
    raise Unsupported(Reason.MODEL_UNSUPPORTED, f"the GGUF file has a tensor {name!r}, which no Llama model has.")


def _need(metadata: Metadata, key: str) -> Any:
    if key not in metadata:
        raise InvalidArgument(Reason.MODEL_INVALID, f"the GGUF file has no {key}.")
    return metadata[key]


def _shortest(value: float) -> float:
    """The file holds a float32; 1e-05 was meant by 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
