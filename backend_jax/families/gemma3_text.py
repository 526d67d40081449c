"""Gemma 3, text: Gemma 2 with normed queries and keys, five local layers to one global one, each kind its own rope."""

from typing import Any

from backend_jax.architecture import Architecture
from backend_jax.config import Keys
from backend_jax.families import Family, gemma2, read_heads, read_windows
from backend_jax.families.gemma import read_gemma
from backend_jax.rope import make_rotary, merge


def read(keys: Keys) -> Architecture:
    layers = keys.count("num_hidden_layers")
    pattern = keys.count("sliding_window_pattern", keys.count("_sliding_window_pattern", 6))
    kinds = keys.names("layer_types", ("full_attention", "sliding_attention"), layers)
    local = [(i + 1) % pattern != 0 if kinds is None else kinds[i] == "sliding_attention" for i in range(layers)]
    far, near = read_both_ropes(keys)
    _, _, head_dim = read_heads(keys, keys.count("hidden_size"))
    return read_gemma(
        keys,
        "gemma3_text",
        activation_key="hidden_activation",
        post_norms=True,
        head_norm=True,
        score_scale=keys.number("query_pre_attn_scalar", 256) ** -0.5,
        score_softcap=keys.number_or_none("attn_logit_softcapping"),
        logit_softcap=keys.number_or_none("final_logit_softcapping"),
        windows=read_windows(keys, layers, lambda layer: local[layer]),
        rotary=(make_rotary(far, head_dim), make_rotary(near, head_dim)),
        rotary_of=tuple(int(is_local) for is_local in local),
    )


def read_both_ropes(keys: Keys) -> tuple[dict[str, Any], dict[str, Any]]:
    """The global and the local layers' parameters; older files scale the global ones only."""
    both = keys.mapping("rope_parameters") or {}
    older = dict(keys.mapping("rope_scaling") or {})
    if keys.has("rope_theta"):
        older["rope_theta"] = keys.number("rope_theta")
    far = merge(both.get("full_attention"), older)
    local = {"rope_theta": keys.number("rope_local_base_freq")} if keys.has("rope_local_base_freq") else {}
    near = merge(both.get("sliding_attention"), local)
    return {"rope_theta": 1_000_000.0} | far, {"rope_theta": 10_000.0} | near


NAMES = gemma2.NAMES | {
    "query_norm": "layers.{}.self_attn.q_norm",
    "key_norm": "layers.{}.self_attn.k_norm",
}

FAMILY = Family(read, NAMES, prefix="model.")
