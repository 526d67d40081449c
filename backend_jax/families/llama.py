"""Llama 2 and 3.x: RMS norms, rotary positions with scaling, grouped queries, a gated feed-forward."""

from typing import Any

from backend_jax.architecture import Architecture, Norm
from backend_jax.config import Keys
from backend_jax.families import Family, read_activation, read_heads
from backend_jax.rope import read_rotary


def read_core(keys: Keys, family: str, **differences: Any) -> Architecture:
    """What Llama and the families that grew out of it have in common."""
    hidden, layers = keys.count("hidden_size"), keys.count("num_hidden_layers")
    heads, kv_heads, head_dim = read_heads(keys, hidden)
    same: dict[str, Any] = {
        "family": family,
        "vocab_size": keys.count("vocab_size"),
        "max_positions": keys.count("max_position_embeddings", 2048),
        "layers": layers,
        "query_heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": hidden,
        "inner_size": keys.count("intermediate_size"),
        "norm": Norm.RMS,
        "epsilon": keys.number("rms_norm_eps", 1e-6),
        "score_scale": head_dim**-0.5,
    }
    if "rotary" not in differences:
        same |= {"rotary": (read_rotary(keys, head_dim),), "rotary_of": (0,) * layers}
    if "activation" not in differences:
        same["activation"] = read_activation(keys, "hidden_act", "silu")
    if "tied" not in differences:
        same["tied"] = keys.flag("tie_word_embeddings", False)
    return Architecture(**(same | differences))


def read(keys: Keys) -> Architecture:
    attention = {"query", "key", "value", "output"} if keys.flag("attention_bias", False) else set()
    feed = {"gate", "up", "down"} if keys.flag("mlp_bias", False) else set()
    return read_core(keys, "llama", biased=frozenset(attention | feed))


NAMES = {
    "embedding": "embed_tokens",
    "attention_norm": "layers.{}.input_layernorm",
    "query": "layers.{}.self_attn.q_proj",
    "key": "layers.{}.self_attn.k_proj",
    "value": "layers.{}.self_attn.v_proj",
    "output": "layers.{}.self_attn.o_proj",
    "feed_norm": "layers.{}.post_attention_layernorm",
    "gate": "layers.{}.mlp.gate_proj",
    "up": "layers.{}.mlp.up_proj",
    "down": "layers.{}.mlp.down_proj",
    "norm": "norm",
    "head": "lm_head",
}

FAMILY = Family(read, NAMES, prefix="model.")
