"""Gemma 2: Gemma with norms after each block too, soft-capped scores and logits, windows in every other layer."""

from backend_jax.architecture import Architecture
from backend_jax.config import Keys
from backend_jax.families import Family, llama, read_windows
from backend_jax.families.gemma import read_gemma


def read(keys: Keys) -> Architecture:
    layers = keys.count("num_hidden_layers")
    return read_gemma(
        keys,
        "gemma2",
        activation_key="hidden_activation",
        post_norms=True,
        score_scale=keys.number("query_pre_attn_scalar", 256) ** -0.5,
        score_softcap=keys.number_or_none("attn_logit_softcapping"),
        logit_softcap=keys.number_or_none("final_logit_softcapping"),
        windows=read_windows(keys, layers, lambda layer: layer % 2 == 0),
    )


NAMES = llama.NAMES | {
    "attention_post_norm": "layers.{}.post_attention_layernorm",
    "feed_norm": "layers.{}.pre_feedforward_layernorm",
    "feed_post_norm": "layers.{}.post_feedforward_layernorm",
}

FAMILY = Family(read, NAMES, prefix="model.")
