"""The Llama family: RMSNorm, rotary positions, grouped queries, gated feed-forward.

It knows the family's config keys and tensor names. It must not know batches or reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dualtrace.arrays import FloatArray, IntArray
from dualtrace.checkpoint import Checkpoint
from dualtrace.problems import InvalidArgument, Reason
from dualtrace.reference.attention import Mask, attend
from dualtrace.reference.config import ConfigReader
from dualtrace.reference.rope import read_frequencies, turn
from dualtrace.reference.weights import Linear, Project, TensorTaker


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int
    max_positions: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    inner_size: int
    epsilon: float
    attention_bias: bool
    mlp_bias: bool
    tied: bool
    frequencies: FloatArray  # [head_dim / 2] radians per position


@dataclass(frozen=True)
class LlamaLayer:
    attention_norm: FloatArray  # [hidden]
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    feed_norm: FloatArray  # [hidden]
    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True)
class LlamaDecoder:
    config: LlamaConfig
    embedding: FloatArray  # [V, hidden]
    layers: tuple[LlamaLayer, ...]
    norm: FloatArray  # [hidden]
    head: FloatArray  # [V, hidden]

    def hidden(self, ids: IntArray, positions: IntArray, mask: Mask, project: Project) -> FloatArray:
        """What the head reads at each row, [T, hidden]."""
        states = self.embedding[ids]
        for index, layer in enumerate(self.layers):
            normed = rms_norm(states, layer.attention_norm, self.config.epsilon)
            states = states + self._attention(layer, normed, positions, mask, index, project)
            normed = rms_norm(states, layer.feed_norm, self.config.epsilon)
            states = states + project(layer.down, silu(project(layer.gate, normed)) * project(layer.up, normed))
        return rms_norm(states, self.norm, self.config.epsilon)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every layer that an adapter can reach."""
        return tuple(
            linear
            for layer in self.layers
            for linear in (layer.query, layer.key, layer.value, layer.output, layer.gate, layer.up, layer.down)
        )

    def logits(self, hidden: FloatArray) -> FloatArray:
        """[R, hidden] -> [R, V]"""
        return hidden @ self.head.T

    def _attention(
        self,
        layer: LlamaLayer,
        normed: FloatArray,
        positions: IntArray,
        mask: Mask,
        index: int,
        project: Project,
    ) -> FloatArray:
        width = self.config.head_dim
        queries = turn(_heads(project(layer.query, normed), width), positions, self.config.frequencies)
        keys = turn(_heads(project(layer.key, normed), width), positions, self.config.frequencies)
        values = _heads(project(layer.value, normed), width)
        return project(layer.output, attend(queries, keys, values, mask, index, width**-0.5))


def rms_norm(states: FloatArray, weight: FloatArray, epsilon: float) -> FloatArray:
    mean_square = np.mean(states * states, axis=1, keepdims=True)
    normed: FloatArray = weight * (states / np.sqrt(mean_square + epsilon))
    return normed


def silu(values: FloatArray) -> FloatArray:
    return values / (1.0 + np.exp(-values))


def load_llama(checkpoint: Checkpoint) -> LlamaDecoder:
    config = read_llama_config(checkpoint.config)
    tensors = TensorTaker(checkpoint, "model.")
    embedding = tensors.take("embed_tokens.weight", (config.vocab_size, config.hidden_size))
    decoder = LlamaDecoder(
        config=config,
        embedding=embedding,
        layers=tuple(_take_layer(tensors, config, f"layers.{index}") for index in range(config.layers)),
        norm=tensors.take("norm.weight", (config.hidden_size,)),
        head=tensors.head("lm_head.weight", "embed_tokens.weight", embedding, tied=config.tied),
    )
    tensors.finish()
    return decoder


def read_llama_config(values: dict[str, object]) -> LlamaConfig:
    keys = ConfigReader(values)
    hidden, heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    kv_heads = keys.count("num_key_value_heads", heads)
    if heads % kv_heads or (not keys.has("head_dim") and hidden % heads):
        raise InvalidArgument(
            Reason.MODEL_INVALID, f"{heads} heads do not divide into {kv_heads} key-value heads and {hidden} columns."
        )
    head_dim = keys.count("head_dim", hidden // heads)
    if head_dim % 2:
        raise InvalidArgument(Reason.MODEL_INVALID, f"head_dim {head_dim} is odd; rotary positions turn pairs.")
    keys.choice("hidden_act", ("silu",), "silu")
    config = LlamaConfig(
        vocab_size=keys.count("vocab_size"),
        max_positions=keys.count("max_position_embeddings", 2048),
        layers=keys.count("num_hidden_layers"),
        query_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=hidden,
        inner_size=keys.count("intermediate_size"),
        epsilon=keys.number("rms_norm_eps", 1e-6),
        attention_bias=keys.flag("attention_bias", False),
        mlp_bias=keys.flag("mlp_bias", False),
        tied=keys.flag("tie_word_embeddings", False),
        frequencies=read_frequencies(keys, head_dim),
    )
    keys.finish()
    return config


def _take_layer(tensors: TensorTaker, config: LlamaConfig, name: str) -> LlamaLayer:
    hidden, inner, bias, mlp_bias = config.hidden_size, config.inner_size, config.attention_bias, config.mlp_bias
    queries, keys = config.query_heads * config.head_dim, config.kv_heads * config.head_dim
    return LlamaLayer(
        attention_norm=tensors.take(f"{name}.input_layernorm.weight", (hidden,)),
        query=tensors.linear(f"{name}.self_attn.q_proj", queries, hidden, bias=bias),
        key=tensors.linear(f"{name}.self_attn.k_proj", keys, hidden, bias=bias),
        value=tensors.linear(f"{name}.self_attn.v_proj", keys, hidden, bias=bias),
        output=tensors.linear(f"{name}.self_attn.o_proj", hidden, queries, bias=bias),
        feed_norm=tensors.take(f"{name}.post_attention_layernorm.weight", (hidden,)),
        gate=tensors.linear(f"{name}.mlp.gate_proj", inner, hidden, bias=mlp_bias),
        up=tensors.linear(f"{name}.mlp.up_proj", inner, hidden, bias=mlp_bias),
        down=tensors.linear(f"{name}.mlp.down_proj", hidden, inner, bias=mlp_bias),
    )


def _heads(columns: FloatArray, width: int) -> FloatArray:
    """[T, heads * D] -> [heads, T, D]"""
    return columns.reshape(columns.shape[0], -1, width).transpose(1, 0, 2)
