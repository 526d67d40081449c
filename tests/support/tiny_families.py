"""Tiny checkpoints of the families that only transformers knows, written from its own configs. For tests marked torch.

It knows which options make each family show its peculiarities in a few layers: windows shorter than the texts, soft
caps, shared keys, biases. It must not know engines.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

WINDOW = 12
VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
SHARED_KEYS = {"num_key_value_heads": 2, "head_dim": 8}
MIXED_LAYERS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZES | SHARED_KEYS),
    "gpt2": ("gpt2", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}),
    "qwen3": ("qwen3", SIZES | SHARED_KEYS | MIXED_LAYERS | {"use_sliding_window": True, "max_window_layers": 0}),
    "gemma3": ("gemma3_text", SIZES | SHARED_KEYS | MIXED_LAYERS | {"query_pre_attn_scalar": 12}),
    "mistral": ("mistral", SIZES | SHARED_KEYS | {"sliding_window": WINDOW}),
    "qwen2": (
        "qwen2",
        SIZES | MIXED_LAYERS | {"num_key_value_heads": 1, "use_sliding_window": True, "max_window_layers": 0},
    ),
    "gemma": ("gemma", SIZES | SHARED_KEYS),
    "gemma2": (
        "gemma2",
        SIZES
        | SHARED_KEYS
        | MIXED_LAYERS
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 12},
    ),
    "gpt_neox": ("gpt_neox", SIZES | {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}}),
    "phi3": ("phi3", SIZES | {"num_key_value_heads": 2, "sliding_window": WINDOW}),
    "opt": (
        "opt",
        {name: size for name, size in SIZES.items() if name != "intermediate_size"}
        | {"ffn_dim": 48, "word_embed_proj_dim": 16},
    ),
}


@cache
def family_model(name: str, seed: int = 0) -> Path:
    """The directory of a tiny checkpoint of a family, written on first use."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, options = FAMILIES[name]
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(kind, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # far from flat, unlike a fresh initialisation
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    folder = _session_folder() / f"{name}-{seed}"
    model.save_pretrained(folder)
    return folder


@cache
def _session_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="dualtrace-families-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
