"""Phi 3 with the default rope: Llama with q, k, v in one projection and gate, up in another."""

from backend_jax.architecture import Architecture, Joint
from backend_jax.config import Keys
from backend_jax.families import Family, llama, read_windows


def read(keys: Keys) -> Architecture:
    keys.ignore("original_max_position_embeddings")  # only long rope, which is refused, looks at it
    windows = read_windows(keys, keys.count("num_hidden_layers"), lambda layer: True)
    return llama.read_core(keys, "phi3", windows=windows, joint=Joint.THIRDS, joint_gate=True)


NAMES = llama.NAMES | {
    "joint": "layers.{}.self_attn.qkv_proj",
    "gate_up": "layers.{}.mlp.gate_up_proj",
}

FAMILY = Family(read, NAMES, prefix="model.")
