"""GPT-NeoX and Pythia: attention and feed-forward side by side, a part of each head turned, q, k and v head by head."""

from backend_jax.architecture import Architecture, Joint, Norm
from backend_jax.config import Keys, refuse_model
from backend_jax.families import Family, read_activation
from backend_jax.rope import make_rotary, merge


def read(keys: Keys) -> Architecture:
    hidden, heads, layers = (
        keys.count("hidden_size"),
        keys.count("num_attention_heads"),
        keys.count("num_hidden_layers"),
    )
    if hidden % heads:
        refuse_model(f"hidden_size {hidden} does not divide into {heads} heads")
    older = dict(keys.mapping("rope_scaling") or {})
    if keys.has("rotary_emb_base"):
        older["rope_theta"] = keys.number("rotary_emb_base")
    if keys.has("rotary_pct"):
        older["partial_rotary_factor"] = keys.number("rotary_pct")
    rope = {"partial_rotary_factor": 0.25} | merge(keys.mapping("rope_parameters"), older)
    attention = {"joint", "output"} if keys.flag("attention_bias", True) else set()
    return Architecture(
        family="gpt_neox",
        vocab_size=keys.count("vocab_size"),
        max_positions=keys.count("max_position_embeddings", 2048),
        layers=layers,
        query_heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        hidden_size=hidden,
        inner_size=keys.count("intermediate_size"),
        norm=Norm.LAYER,
        epsilon=keys.number("layer_norm_eps", 1e-5),
        activation=read_activation(keys, "hidden_act", "gelu"),
        tied=keys.flag("tie_word_embeddings", False),
        gated=False,
        joint=Joint.PER_HEAD,
        parallel=keys.flag("use_parallel_residual", True),
        score_scale=(hidden // heads) ** -0.5,
        rotary=(make_rotary(rope, hidden // heads),),
        rotary_of=(0,) * layers,
        biased=frozenset(attention | {"up", "down"}),
    )


NAMES = {
    "embedding": "embed_in",
    "attention_norm": "layers.{}.input_layernorm",
    "joint": "layers.{}.attention.query_key_value",
    "output": "layers.{}.attention.dense",
    "feed_norm": "layers.{}.post_attention_layernorm",
    "up": "layers.{}.mlp.dense_h_to_4h",
    "down": "layers.{}.mlp.dense_4h_to_h",
    "norm": "final_layer_norm",
    "head": "embed_out",
}

BUFFERS = r"(.*\.)?(rotary_emb\.inv_freq|attention\.(bias|masked_bias))"

FAMILY = Family(read, NAMES, prefix="gpt_neox.", buffers=BUFFERS)
