"""Gemma: Llama with norms by 1 + w, a gelu gate, a scaled embedding that is also the head."""

from typing import Any

from backend_jax.architecture import Architecture, Norm
from backend_jax.config import Keys
from backend_jax.families import Family, llama, read_activation


def read_gemma(keys: Keys, family: str, *, activation_key: str, **differences: Any) -> Architecture:
    """What the three generations have in common."""
    biased = {"query", "key", "value", "output"} if keys.flag("attention_bias", False) else set()
    keys.one_of("use_bidirectional_attention", (None, False), None)
    return llama.read_core(
        keys,
        family,
        norm=Norm.RMS_PLUS_ONE,
        activation=read_activation(keys, activation_key, "gelu_pytorch_tanh"),
        tied=keys.flag("tie_word_embeddings", True),
        embedding_scale=keys.count("hidden_size") ** 0.5,
        biased=frozenset(biased),
        **differences,
    )


def read(keys: Keys) -> Architecture:
    keys.one_of("hidden_activation", (None, "gelu_pytorch_tanh"), None)
    return read_gemma(keys, "gemma", activation_key="hidden_act")


FAMILY = Family(read, llama.NAMES, prefix="model.")
