"""The GPT-2 family: learned positions, LayerNorm, a plain feed-forward, one joint projection for q, k and v.

It knows the family's config keys and tensor names. It must not know batches or reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dualtrace.arrays import FloatArray, IntArray
from dualtrace.checkpoint import Checkpoint
from dualtrace.problems import InvalidArgument, Reason
from dualtrace.reference.attention import Mask, attend
from dualtrace.reference.config import ConfigReader
from dualtrace.reference.weights import Linear, Project, TensorTaker


@dataclass(frozen=True)
class Gpt2Config:
    vocab_size: int
    max_positions: int
    layers: int
    query_heads: int
    hidden_size: int
    inner_size: int
    epsilon: float
    scale: float  # of the attention scores
    tied: bool

    @property
    def kv_heads(self) -> int:
        return self.query_heads


@dataclass(frozen=True)
class Norm:
    weight: FloatArray  # [hidden]
    bias: FloatArray  # [hidden]


@dataclass(frozen=True)
class Gpt2Layer:
    attention_norm: Norm
    joint: Linear  # q, k and v in one
    output: Linear
    feed_norm: Norm
    up: Linear
    down: Linear


@dataclass(frozen=True)
class Gpt2Decoder:
    config: Gpt2Config
    embedding: FloatArray  # [V, hidden]
    places: FloatArray  # [max_positions, hidden]
    layers: tuple[Gpt2Layer, ...]
    norm: Norm
    head: FloatArray  # [V, hidden]

    def hidden(self, ids: IntArray, positions: IntArray, mask: Mask, project: Project) -> FloatArray:
        """What the head reads at each row, [T, hidden]."""
        epsilon = self.config.epsilon
        states = self.embedding[ids] + self.places[positions]
        for index, layer in enumerate(self.layers):
            joint = project(layer.joint, layer_norm(states, layer.attention_norm, epsilon))
            queries, keys, values = joint.reshape(len(ids), 3, self.config.query_heads, -1).transpose(1, 2, 0, 3)
            mixed = attend(queries, keys, values, mask, index, self.config.scale)
            states = states + project(layer.output, mixed)
            inner = project(layer.up, layer_norm(states, layer.feed_norm, epsilon))
            states = states + project(layer.down, gelu_tanh(inner))
        return layer_norm(states, self.norm, epsilon)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every layer that an adapter can reach."""
        return tuple(linear for layer in self.layers for linear in (layer.joint, layer.output, layer.up, layer.down))

    def logits(self, hidden: FloatArray) -> FloatArray:
        """[R, hidden] -> [R, V]"""
        return hidden @ self.head.T


def layer_norm(states: FloatArray, norm: Norm, epsilon: float) -> FloatArray:
    centred = states - states.mean(axis=1, keepdims=True)
    variance = np.mean(centred * centred, axis=1, keepdims=True)
    normed: FloatArray = norm.weight * (centred / np.sqrt(variance + epsilon)) + norm.bias
    return normed


def gelu_tanh(values: FloatArray) -> FloatArray:
    return 0.5 * values * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (values + 0.044715 * values**3)))


def load_gpt2(checkpoint: Checkpoint) -> Gpt2Decoder:
    config = read_gpt2_config(checkpoint.config)
    # a checkpoint saved without its head, as the first ones were, has no prefix; adapters know the model with its head
    prefix = "" if "wte.weight" in checkpoint.tensors else "transformer."
    tensors = TensorTaker(checkpoint, prefix, modules="transformer.")
    embedding = tensors.take("wte.weight", (config.vocab_size, config.hidden_size))
    decoder = Gpt2Decoder(
        config=config,
        embedding=embedding,
        places=tensors.take("wpe.weight", (config.max_positions, config.hidden_size)),
        layers=tuple(_take_layer(tensors, config, f"h.{index}") for index in range(config.layers)),
        norm=_take_norm(tensors, "ln_f", config.hidden_size),
        head=tensors.head("lm_head.weight", "wte.weight", embedding, tied=config.tied),
    )
    tensors.finish()
    return decoder


def read_gpt2_config(values: dict[str, object]) -> Gpt2Config:
    keys = ConfigReader(values)
    hidden, heads = keys.count("n_embd"), keys.count("n_head")
    if hidden % heads:
        raise InvalidArgument(Reason.MODEL_INVALID, f"n_embd {hidden} does not divide into {heads} heads.")
    keys.choice("activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new")
    keys.refuse_true("scale_attn_by_inverse_layer_idx")
    keys.refuse_true("reorder_and_upcast_attn")
    config = Gpt2Config(
        vocab_size=keys.count("vocab_size"),
        max_positions=keys.count("n_positions", 1024),
        layers=keys.count("n_layer"),
        query_heads=heads,
        hidden_size=hidden,
        inner_size=keys.count("n_inner", 4 * hidden),
        epsilon=keys.number("layer_norm_epsilon", 1e-5),
        scale=(hidden // heads) ** -0.5 if keys.flag("scale_attn_weights", True) else 1.0,
        tied=keys.flag("tie_word_embeddings", True),
    )
    keys.finish()
    return config


def _take_layer(tensors: TensorTaker, config: Gpt2Config, name: str) -> Gpt2Layer:
    hidden, inner = config.hidden_size, config.inner_size
    return Gpt2Layer(
        attention_norm=_take_norm(tensors, f"{name}.ln_1", hidden),
        joint=tensors.linear(f"{name}.attn.c_attn", 3 * hidden, hidden, bias=True, transposed=True),
        output=tensors.linear(f"{name}.attn.c_proj", hidden, hidden, bias=True, transposed=True),
        feed_norm=_take_norm(tensors, f"{name}.ln_2", hidden),
        up=tensors.linear(f"{name}.mlp.c_fc", inner, hidden, bias=True, transposed=True),
        down=tensors.linear(f"{name}.mlp.c_proj", hidden, inner, bias=True, transposed=True),
    )


def _take_norm(tensors: TensorTaker, name: str, hidden: int) -> Norm:
    return Norm(tensors.take(f"{name}.weight", (hidden,)), tensors.take(f"{name}.bias", (hidden,)))
