"""The decoder: one configurable function over stacked weights, scanned over the layers.

Plain functions over a tree of stacked arrays, and not flax modules: a module holds one layer's arrays, a scan wants
all layers' arrays in one, and splitting and merging module state around the scan would be the longest part of this
file. It knows arrays and an `Architecture`. It must not know families, segments, masks' languages or reads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from backend_jax.architecture import Activation, Architecture, Joint, Norm
from backend_jax.attention import Allowed, Keys, Mixes, attend, count_applied
from backend_jax.lora import Chosen, Factors, add_delta

Array = jax.Array
EVERYTHING = 2**30  # a window no position difference reaches


class Rows(NamedTuple):
    """The tokens of a call; axes as in `attention`."""

    ids: Array  # [N,C,T] int32
    places: Array  # [N,C,T] int32 positions
    segments: Array  # [N,C,T] int32: tokens of one row with one number are one sequence; -1 is padding
    cosines: Array  # [F,N,C,T,pairs]; F = 0 without rotary positions
    sines: Array


class Past(NamedTuple):
    """What was kept of earlier tokens."""

    keys: Array  # [L,N,G,P,D]
    values: Array
    lengths: Array  # [N] int32, valid entries
    places: Array  # [N,P] int32 positions


class Masks(NamedTuple):
    """Masks of the caller: the distinct layers' booleans and which of them each layer has."""

    own: Array  # [M, N, 1|G, C, 1|R, T, T] bool
    past: Array | None  # [M, N, 1|G, C, 1|R, T, P]
    zeroed_own: Array | None
    zeroed_past: Array | None
    layer: Array  # [L] int32
    mixes: Mixes


class Lora(NamedTuple):
    factors: dict[str, Factors]
    chosen: Chosen


class Outputs(NamedTuple):
    hidden: Array  # [N*C*T, outer] what the head reads; below a fork [N*C*T, hidden] states
    keys: Array | None  # [L,N,G,T,D] when kept
    values: Array | None
    counts: Array | None  # [L, 3|6, N, 1|G, C, 1|R, T] uint32 with masks


def forward(
    architecture: Architecture,
    keep: bool,
    weights: dict[str, Any],
    rows: Rows,
    past: Past | None,
    masks: Masks | None,
    lora: Lora | None,
) -> Outputs:
    inside, outside = _split_factors(architecture, lora)
    states = _embed(architecture, weights, rows, outside, lora)
    layer = _Layer(architecture, keep, rows, past, masks, lora)
    inputs = _layer_inputs(architecture, weights, past, masks, inside)
    states, (kept, counts) = jax.lax.scan(layer, states, inputs)
    hidden = _finish(architecture, weights, states, outside, lora)
    keys, values = (None, None) if kept is None else (kept.keys, kept.values)
    return Outputs(hidden, keys, values, counts)


def forward_below(
    architecture: Architecture,
    weights: dict[str, Any],
    rows: Rows,
    past: Past | None,
    masks: Masks | None,
    lora: Lora | None,
    fork: Array,
) -> Outputs:
    """The layers below `fork` [] int32. Counts of the others are nothing."""
    inside, outside = _split_factors(architecture, lora)
    states = _embed(architecture, weights, rows, outside, lora)
    layer = _Layer(architecture, False, rows, past, masks, lora)
    inputs = _layer_inputs(architecture, weights, past, masks, inside)
    states, counts = _run_layers(layer, states, inputs, jnp.zeros_like(fork), fork)
    return Outputs(states.reshape(-1, architecture.hidden_size), None, None, counts)


def forward_above(
    architecture: Architecture,
    weights: dict[str, Any],
    rows: Rows,
    past: Past | None,
    masks: Masks | None,
    lora: Lora | None,
    fork: Array,
    states: Array,
) -> Outputs:
    """The layers from `fork` [] int32 on, from its input [N,C,T,hidden]. Counts of the others are nothing."""
    inside, outside = _split_factors(architecture, lora)
    layer = _Layer(architecture, False, rows, past, masks, lora)
    inputs = _layer_inputs(architecture, weights, past, masks, inside)
    end = jnp.full_like(fork, architecture.layers)
    states, counts = _run_layers(layer, states, inputs, fork, end)
    return Outputs(_finish(architecture, weights, states, outside, lora), None, None, counts)


def _run_layers(
    layer: _Layer, states: Array, inputs: dict[str, Any], first: Array, end: Array
) -> tuple[Array, Array | None]:
    """What the scan of `forward` does, from layer `first` up to `end`, both known when it runs: one function serves
    every fork."""
    at = jax.tree.map(lambda leaf: leaf[0], inputs)
    counted = jax.eval_shape(layer, states, at)[1][1]
    counts = None if counted is None else jnp.zeros((layer.architecture.layers, *counted.shape), counted.dtype)

    def step(index: Array, carry: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
        states, counts = carry
        own = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), inputs)
        states, (_, counted) = layer(states, own)
        if counts is not None and counted is not None:
            counts = jax.lax.dynamic_update_index_in_dim(counts, counted, index, 0)
        return states, counts

    reached: tuple[Array, Array | None] = jax.lax.fori_loop(first, end, step, (states, counts))
    return reached


def _embed(
    architecture: Architecture, weights: dict[str, Any], rows: Rows, factors: dict[str, Factors], lora: Lora | None
) -> Array:
    """[N,C,T,hidden] the input of the first layer."""
    states: Array = weights["embedding"][rows.ids]
    if architecture.embedding_size:
        states = _project_outside("project_in", states, weights, factors, lora)
    if architecture.embedding_scale != 1.0:
        states = states * jnp.asarray(architecture.embedding_scale, states.dtype)
    if architecture.position_rows:
        states = states + weights["places"][rows.places + architecture.position_offset]
    return states


def _finish(
    architecture: Architecture, weights: dict[str, Any], states: Array, factors: dict[str, Factors], lora: Lora | None
) -> Array:
    """[N*C*T, outer] from the output of the last layer."""
    hidden = normalise(architecture, states, weights["norm"])
    if architecture.embedding_size:
        hidden = _project_outside("project_out", hidden, weights, factors, lora)
    return hidden.reshape(-1, architecture.outer_size)


def _layer_inputs(
    architecture: Architecture,
    weights: dict[str, Any],
    past: Past | None,
    masks: Masks | None,
    factors: dict[str, Factors],
) -> dict[str, Any]:
    """What differs between layers: arrays [L, ...]."""
    windows = [architecture.window(index) or EVERYTHING for index in range(architecture.layers)]
    return {
        "weights": weights["layers"],
        "past": None if past is None else Keys(past.keys, past.values),
        "window": jnp.asarray(windows, jnp.int32),
        "rotary": jnp.asarray(architecture.rotary_of or (0,) * architecture.layers, jnp.int32),
        "mask": None if masks is None else masks.layer,
        "factors": factors,
    }


def _split_factors(architecture: Architecture, lora: Lora | None) -> tuple[dict[str, Factors], dict[str, Factors]]:
    """Those of the layers, and those of linear layers before and after them."""
    factors = {} if lora is None else lora.factors
    outside = {role: factors[role] for role in architecture.outer_roles if role in factors}
    return {role: factors[role] for role in factors if role not in outside}, outside


def _project_outside(
    role: str, values: Array, weights: dict[str, Any], factors: dict[str, Factors], lora: Lora | None
) -> Array:
    """[N,C,T,in] -> [N,C,T,out] before the first layer or after the last."""
    outputs = jnp.einsum("ncti,oi->ncto", values, weights[role])
    if lora is None or role not in factors:
        return outputs
    return add_delta(outputs, values, Factors(factors[role].a[0], factors[role].b[0]), lora.chosen)


class _Layer:
    """One layer as the scan calls it: what all layers share stands in `self`, what differs comes with the call."""

    def __init__(
        self,
        architecture: Architecture,
        keep: bool,
        rows: Rows,
        past: Past | None,
        masks: Masks | None,
        lora: Lora | None,
    ) -> None:
        self.architecture = architecture
        self.keep = keep
        self.rows = rows
        self.past = past
        self.masks = masks
        self.lora = lora

    def __call__(self, states: Array, inputs: dict[str, Any]) -> tuple[Array, tuple[Keys | None, Array | None]]:
        a, weights, factors = self.architecture, inputs["weights"], inputs["factors"]
        mixed, own, counts = self._attention(normalise(a, states, weights["attention_norm"]), inputs)
        written = self._project("output", mixed, weights, factors)
        if a.post_norms:
            written = normalise(a, written, weights["attention_post_norm"])
        attended = states + written
        source = states if a.parallel else attended
        fed = self._feed(normalise(a, source, weights["feed_norm"]), weights, factors)
        if a.post_norms:
            fed = normalise(a, fed, weights["feed_post_norm"])
        kept = Keys(own.keys[:, :, 0], own.values[:, :, 0]) if self.keep else None
        return attended + fed, (kept, counts)

    def _project(self, role: str, values: Array, weights: dict[str, Any], factors: dict[str, Factors]) -> Array:
        """[N,C,T,in] -> [N,C,T,out]"""
        layer = weights[role]
        outputs = jnp.einsum("ncti,oi->ncto", values, layer["weight"])
        if "bias" in layer:
            outputs = outputs + layer["bias"][None, None, None]
        if self.lora is not None and role in factors:
            outputs = add_delta(outputs, values, factors[role], self.lora.chosen)
        return outputs

    def _attention(self, normed: Array, inputs: dict[str, Any]) -> tuple[Array, Keys, Array | None]:
        a, weights = self.architecture, inputs["weights"]
        queries, keys, values = self._heads(normed, weights, inputs["factors"])
        if a.head_norm:
            queries = normalise(a, queries, weights["query_norm"])
            keys = normalise(a, keys, weights["key_norm"])
        if a.rotary:
            cosines, sines = self.rows.cosines[inputs["rotary"]], self.rows.sines[inputs["rotary"]]  # [N,C,T,pairs]
            queries, keys = turn(queries, cosines, sines), turn(keys, cosines, sines)
        n, c, t = self.rows.ids.shape
        grouped = queries.reshape(n, c, t, a.kv_heads, a.share, a.head_dim).transpose(0, 3, 1, 4, 2, 5)
        own = Keys(keys.transpose(0, 3, 1, 2, 4), values.transpose(0, 3, 1, 2, 4))  # [N,G,C,T,D]
        allowed = self._allowed(inputs)
        mixed = attend(grouped, own, inputs["past"], allowed, a.score_scale, a.score_softcap)
        counts = None if self.masks is None else count_applied(allowed, self.masks.mixes)
        return mixed.transpose(0, 2, 4, 1, 3, 5).reshape(n, c, t, a.query_heads * a.head_dim), own, counts

    def _heads(self, normed: Array, weights: dict[str, Any], factors: dict[str, Factors]) -> tuple[Array, Array, Array]:
        """Queries [N,C,T,H,D], keys and values [N,C,T,G,D]."""
        a = self.architecture
        if a.joint is None:
            parts = tuple(self._project(role, normed, weights, factors) for role in ("query", "key", "value"))
        else:
            joint = self._project("joint", normed, weights, factors)
            if a.joint is Joint.PER_HEAD:
                split = joint.reshape(*joint.shape[:3], a.query_heads, 3, a.head_dim)
                return split[..., 0, :], split[..., 1, :], split[..., 2, :]
            queries, keys = a.query_heads * a.head_dim, a.kv_heads * a.head_dim
            parts = tuple(jnp.split(joint, (queries, queries + keys), axis=-1))
        shaped = [part.reshape(*part.shape[:3], -1, a.head_dim) for part in parts]
        return shaped[0], shaped[1], shaped[2]

    def _allowed(self, inputs: dict[str, Any]) -> Allowed:
        """From the caller's masks, or from positions: then no [T,T] array is ever made on the host."""
        masks, past = self.masks, self.past
        if masks is not None:
            parts = (masks.own, masks.past, masks.zeroed_own, masks.zeroed_past)
            return Allowed(*(None if part is None else part[inputs["mask"]] for part in parts))  # type: ignore[arg-type]
        rows, window = self.rows, inputs["window"]
        order = jnp.arange(rows.ids.shape[2], dtype=jnp.int32)
        own = (rows.segments[..., :, None] == rows.segments[..., None, :]) & (order[:, None] >= order[None, :])[
            None, None
        ]
        valid = None
        if past is not None:
            before = jnp.arange(past.places.shape[1], dtype=jnp.int32)
            valid = (before[None, :] < past.lengths[:, None])[:, None, None, :]  # [N,1,1,P]
        if self.architecture.has_windows:
            own = own & (jnp.abs(rows.places[..., :, None] - rows.places[..., None, :]) < window)
            if past is not None and valid is not None:
                valid = valid & (jnp.abs(rows.places[..., :, None] - past.places[:, None, None, :]) < window)
        return Allowed(own[:, None, :, None], None if valid is None else valid[:, None, :, None])

    def _feed(self, normed: Array, weights: dict[str, Any], factors: dict[str, Factors]) -> Array:
        a = self.architecture
        if a.joint_gate:
            gate, up = jnp.split(self._project("gate_up", normed, weights, factors), 2, axis=-1)
        else:
            up = self._project("up", normed, weights, factors)
            gate = self._project("gate", normed, weights, factors) if a.gated else up
        inner = activate(a.activation, gate)
        return self._project("down", inner * up if a.gated else inner, weights, factors)


def normalise(architecture: Architecture, values: Array, weights: dict[str, Array]) -> Array:
    """Over the last axis, in float32 or better."""
    wide = values if values.dtype == jnp.float64 else values.astype(jnp.float32)
    weight = weights["weight"].astype(wide.dtype).reshape((1,) * (wide.ndim - 1) + (-1,))
    if architecture.norm is Norm.LAYER:
        centred = wide - wide.mean(axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + architecture.epsilon)
        bias = weights["bias"].astype(wide.dtype).reshape(weight.shape)
        return (normed * weight + bias).astype(values.dtype)
    normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + architecture.epsilon)
    if architecture.norm is Norm.RMS_PLUS_ONE:
        weight = 1 + weight
    return (normed * weight).astype(values.dtype)


def turn(columns: Array, cosines: Array, sines: Array) -> Array:
    """Turn [N,C,T,heads,D] by position; column j is paired with j + pairs, columns beyond the pairs stay."""
    pairs = cosines.shape[-1]
    cosines, sines = cosines[:, :, :, None], sines[:, :, :, None]
    first, second, rest = columns[..., :pairs], columns[..., pairs : 2 * pairs], columns[..., 2 * pairs :]
    turned = [first * cosines - second * sines, second * cosines + first * sines]
    return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1)


def activate(kind: Activation, values: Array) -> Array:
    match kind:
        case Activation.SILU:
            return jax.nn.silu(values)
        case Activation.GELU:
            return jax.nn.gelu(values, approximate=False)
        case Activation.GELU_TANH:
            return jax.nn.gelu(values, approximate=True)
        case Activation.RELU:
            return jax.nn.relu(values)


def append_kept(store: Keys, fresh: Keys, offsets: Array) -> Keys:
    """Write fresh keys and values [L,N,G,T,D] into a store [L,N,G,P,D] at each lane's offset [N]."""

    def one(into: Array, new: Array, at: Array) -> Array:
        zero = jnp.zeros((), at.dtype)
        return jax.lax.dynamic_update_slice(into, new, (zero, zero, at, zero))

    lanes = jax.vmap(one, in_axes=(1, 1, 0), out_axes=1)
    return Keys(lanes(store.keys, fresh.keys, offsets), lanes(store.values, fresh.values, offsets))


def widen_kept(store: Keys, tokens: int) -> Keys:
    """A store with room for `tokens`, what it holds kept."""
    room = [(0, 0)] * 3 + [(0, tokens - store.keys.shape[3]), (0, 0)]
    return Keys(jnp.pad(store.keys, room), jnp.pad(store.values, room))
