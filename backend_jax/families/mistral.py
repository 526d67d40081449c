"""Mistral: Llama with a sliding window in every layer."""

from backend_jax.architecture import Architecture
from backend_jax.config import Keys
from backend_jax.families import Family, llama, read_windows


def read(keys: Keys) -> Architecture:
    layers = keys.count("num_hidden_layers")
    return llama.read_core(keys, "mistral", windows=read_windows(keys, layers, lambda layer: True))


FAMILY = Family(read, llama.NAMES, prefix="model.")
