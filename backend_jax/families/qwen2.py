"""Qwen 2 and 2.5: Llama with biases on q, k and v, and sliding windows from some layer on where they are used."""

from backend_jax.architecture import Architecture
from backend_jax.config import Keys
from backend_jax.families import Family, llama, read_windows


def read_qwen_windows(keys: Keys) -> tuple[int | None, ...]:
    layers, first = keys.count("num_hidden_layers"), keys.index("max_window_layers", 28)
    windows = read_windows(keys, layers, lambda layer: layer >= first)
    return windows if keys.flag("use_sliding_window", False) else ()


def read(keys: Keys) -> Architecture:
    biased = frozenset({"query", "key", "value"})
    return llama.read_core(keys, "qwen2", windows=read_qwen_windows(keys), biased=biased)


FAMILY = Family(read, llama.NAMES, prefix="model.")
