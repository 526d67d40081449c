"""GPT-2: learned positions, layer norms, a plain feed-forward, one projection for q, k and v stored [in, out]."""

from backend_jax.architecture import Activation, Architecture, Joint, Norm
from backend_jax.config import Keys, refuse_model
from backend_jax.families import Family


def read(keys: Keys) -> Architecture:
    hidden, heads = keys.count("n_embd"), keys.count("n_head")
    if hidden % heads:
        refuse_model(f"n_embd {hidden} does not divide into {heads} heads")
    keys.one_of("activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new")
    keys.one_of("scale_attn_by_inverse_layer_idx", (False,), False)
    keys.one_of("reorder_and_upcast_attn", (False,), False)
    positions = keys.count("n_positions", 1024)
    return Architecture(
        family="gpt2",
        vocab_size=keys.count("vocab_size"),
        max_positions=positions,
        layers=keys.count("n_layer"),
        query_heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        hidden_size=hidden,
        inner_size=keys.count("n_inner", 4 * hidden),
        norm=Norm.LAYER,
        epsilon=keys.number("layer_norm_epsilon", 1e-5),
        activation=Activation.GELU_TANH,
        tied=keys.flag("tie_word_embeddings", True),
        gated=False,
        joint=Joint.THIRDS,
        score_scale=(hidden // heads) ** -0.5 if keys.flag("scale_attn_weights", True) else 1.0,
        position_rows=positions,
        biased=frozenset({"joint", "output", "up", "down"}),
    )


NAMES = {
    "embedding": "wte",
    "places": "wpe",
    "attention_norm": "h.{}.ln_1",
    "joint": "h.{}.attn.c_attn",
    "output": "h.{}.attn.c_proj",
    "feed_norm": "h.{}.ln_2",
    "up": "h.{}.mlp.c_fc",
    "down": "h.{}.mlp.c_proj",
    "norm": "ln_f",
    "head": "lm_head",
}

FAMILY = Family(read, NAMES, prefix="transformer.", transposed=True, buffers=r"(.*\.)?attn\.(bias|masked_bias)")
