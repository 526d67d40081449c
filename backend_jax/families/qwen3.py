"""Qwen 3: Llama with queries and keys normed per head."""

from backend_jax.architecture import Architecture
from backend_jax.config import Keys
from backend_jax.families import Family, llama
from backend_jax.families.qwen2 import read_qwen_windows


def read(keys: Keys) -> Architecture:
    biased = {"query", "key", "value", "output"} if keys.flag("attention_bias", False) else set()
    windows = read_qwen_windows(keys)
    return llama.read_core(keys, "qwen3", windows=windows, head_norm=True, biased=frozenset(biased))


NAMES = llama.NAMES | {
    "query_norm": "layers.{}.self_attn.q_norm",
    "key_norm": "layers.{}.self_attn.k_norm",
}

FAMILY = Family(read, NAMES, prefix="model.")
