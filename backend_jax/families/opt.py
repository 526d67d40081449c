"""OPT: learned positions that start at row 2, layer norms before each block, a relu feed-forward."""

from backend_jax.architecture import Architecture, Norm
from backend_jax.config import Keys, refuse_model
from backend_jax.families import Family, read_activation

FIRST_PLACE = 2  # rows below stood for padding


def read(keys: Keys) -> Architecture:
    hidden, heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    if hidden % heads:
        refuse_model(f"hidden_size {hidden} does not divide into {heads} heads")
    outer = keys.count("word_embed_proj_dim", hidden)
    keys.one_of("do_layer_norm_before", (True,), True)
    keys.one_of("_remove_final_layer_norm", (False,), False)
    keys.one_of("layer_norm_elementwise_affine", (True,), True)
    keys.ignore("init_std")
    positions = keys.count("max_position_embeddings", 2048)
    every = {"query", "key", "value", "output", "up", "down"} if keys.flag("enable_bias", True) else set()
    return Architecture(
        family="opt",
        vocab_size=keys.count("vocab_size"),
        max_positions=positions,
        layers=keys.count("num_hidden_layers"),
        query_heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        hidden_size=hidden,
        inner_size=keys.count("ffn_dim"),
        embedding_size=0 if outer == hidden else outer,
        norm=Norm.LAYER,
        epsilon=1e-5,
        activation=read_activation(keys, "activation_function", "relu"),
        tied=keys.flag("tie_word_embeddings", True),
        gated=False,
        score_scale=(hidden // heads) ** -0.5,
        position_rows=positions + FIRST_PLACE,
        position_offset=FIRST_PLACE,
        biased=frozenset(every),
    )


NAMES = {
    "embedding": "embed_tokens",
    "project_in": "project_in",
    "project_out": "project_out",
    "places": "embed_positions",
    "attention_norm": "layers.{}.self_attn_layer_norm",
    "query": "layers.{}.self_attn.q_proj",
    "key": "layers.{}.self_attn.k_proj",
    "value": "layers.{}.self_attn.v_proj",
    "output": "layers.{}.self_attn.out_proj",
    "feed_norm": "layers.{}.final_layer_norm",
    "up": "layers.{}.fc1",
    "down": "layers.{}.fc2",
    "norm": "final_layer_norm",
    "head": "lm_head",
}

FAMILY = Family(read, NAMES, prefix="model.decoder.")
