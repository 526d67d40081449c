"""The checkpoint's tensors as the decoder wants them: stacked over layers, upcast exactly, none unused, none missing.

Each stack is allocated once in memory that the device may keep as it is, and filled a layer at a time from the mapped
files, so that loading needs little more than the model itself. It knows names and shapes. It must not know what the
tensors do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding

from backend_jax.architecture import Architecture, Norm
from backend_jax.config import refuse_model
from backend_jax.families import Family
from backend_jax.mesh import Spread
from dualtrace.checkpoint import Checkpoint

Weights = dict[str, Any]
"""role -> [L, ...] for layers (under "layers"), and embedding, places, norm, head. Leaves are jax.Array."""

ALIGNMENT_BYTES = 64  # a buffer so aligned can be handed to the CPU device without a copy


class Taker:
    """Hands out each tensor once and refuses, in the end, what nobody took."""

    def __init__(self, checkpoint: Checkpoint, family: Family) -> None:
        self._checkpoint = checkpoint
        plain = family.names["embedding"] + ".weight"
        bare = plain in checkpoint.tensors and family.prefix + plain not in checkpoint.tensors
        self._prefix = "" if bare else family.prefix
        self._left = {name for name in checkpoint.tensors if not re.fullmatch(family.buffers, name)}

    def name(self, role: str, names: dict[str, str], layer: int | None = None) -> str:
        own = names[role] if layer is None else names[role].format(layer)
        return own if role == "head" else self._prefix + own

    def take(self, name: str, shape: tuple[int, ...], wide: type[np.float32] | type[np.float64]) -> npt.NDArray[Any]:
        entry = self._checkpoint.tensors.get(name)
        if entry is None:
            refuse_model(f"the checkpoint has no tensor {name!r}, which its config needs")
        if entry.shape != shape:
            refuse_model(f"tensor {name!r} has the shape {entry.shape}; its config asks for {shape}")
        self._left.discard(name)
        return self._checkpoint.values(name, wide)

    def take_tied(self, name: str, original: str) -> None:
        """A stored copy of a tied head must be the embedding, to the byte."""
        if name not in self._left:
            return
        copy, source = self._checkpoint.tensors[name], self._checkpoint.tensors[original]
        same = (copy.dtype, copy.shape) == (source.dtype, source.shape)
        if not same or not np.array_equal(self._checkpoint.raw(name), self._checkpoint.raw(original)):
            refuse_model(
                f"the config ties the head to the embedding, but {name!r} differs from {original!r}; "
                "set tie_word_embeddings to false or remove the tensor"
            )
        self._left.discard(name)

    def release(self) -> None:
        """Pages that were read are let go, or the files would stand in memory beside the model."""
        self._checkpoint.close()

    def finish(self) -> None:
        if self._left:
            first = min(self._left)
            refuse_model(
                f"the checkpoint holds {len(self._left)} tensors that the model has no use for, first {first!r}; "
                "it is of another architecture than its config says"
            )


def load_weights(
    checkpoint: Checkpoint,
    family: Family,
    architecture: Architecture,
    dtype: np.dtype[Any],
    spread: Spread | None = None,
) -> Weights:
    taker = Taker(checkpoint, family)
    names = family.names
    hidden, outer = architecture.hidden_size, architecture.outer_size
    weights: Weights = {}
    embedding = taker.name("embedding", names) + ".weight"
    weights["embedding"] = _one(taker, embedding, (architecture.vocab_size, outer), dtype, _lie(spread, "embedding"))
    for role in architecture.outer_roles:
        shape = architecture.linear_shape(role)
        weights[role] = _one(taker, taker.name(role, names) + ".weight", shape, dtype, _lie(spread, role))
    if architecture.position_rows:
        places = taker.name("places", names) + ".weight"
        weights["places"] = _one(taker, places, (architecture.position_rows, hidden), dtype, _lie(spread, "places"))
    weights["norm"] = {
        part: _one(taker, f"{taker.name('norm', names)}.{part}", (hidden,), dtype, _lie(spread, "norm"))
        for part in _parts(architecture)
    }
    head = taker.name("head", names) + ".weight"
    if architecture.tied:
        taker.take_tied(head, embedding)
    else:
        weights["head"] = _one(taker, head, (architecture.vocab_size, outer), dtype, _lie(spread, "head"))
    weights["layers"] = _load_layers(taker, family, architecture, dtype, spread)
    taker.finish()
    return weights


def _load_layers(
    taker: Taker, family: Family, architecture: Architecture, dtype: np.dtype[Any], spread: Spread | None
) -> dict[str, dict[str, jax.Array]]:
    layers: dict[str, dict[str, jax.Array]] = {}
    for role, part, shape in _layer_tensors(architecture):
        turned = family.transposed and len(shape) == 2
        stack = _aligned((architecture.layers, *shape), dtype)
        for layer in range(architecture.layers):
            name = f"{taker.name(role, family.names, layer)}.{part}"
            stored = taker.take(name, shape[::-1] if turned else shape, _wide(dtype))
            stack[layer] = stored.T if turned else stored
            del stored
            taker.release()
        layers.setdefault(role, {})[part] = _place(stack, _lie(spread, role, part))
    return layers


def module_names(family: Family, architecture: Architecture) -> dict[str, tuple[str, int]]:
    """Every linear module but the head by its full name -> (role, layer); layer 0 where it stands outside of them."""
    inside = {
        family.prefix + family.names[role].format(layer): (role, layer)
        for role in architecture.linear_roles
        for layer in range(architecture.layers)
    }
    return inside | {family.prefix + family.names[role]: (role, 0) for role in architecture.outer_roles}


def _layer_tensors(architecture: Architecture) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(role, weight or bias, shape) of everything one layer holds."""
    for role in architecture.norm_roles:
        for part in _parts(architecture):
            yield role, part, (architecture.norm_width(role),)
    for role in architecture.linear_roles:
        shape = architecture.linear_shape(role)
        yield role, "weight", shape
        if role in architecture.biased:
            yield role, "bias", shape[:1]


def _parts(architecture: Architecture) -> tuple[str, ...]:
    return ("weight", "bias") if architecture.norm is Norm.LAYER else ("weight",)


def _one(taker: Taker, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], lie: NamedSharding | None) -> jax.Array:
    buffer = _aligned(shape, dtype)
    buffer[...] = taker.take(name, shape, _wide(dtype))
    taker.release()
    return _place(buffer, lie)


def _wide(dtype: np.dtype[Any]) -> type[np.float32] | type[np.float64]:
    return np.float64 if dtype == np.float64 else np.float32


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT_BYTES, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[start : start + size].view(dtype).reshape(shape)


def _lie(spread: Spread | None, role: str, part: str = "weight") -> NamedSharding | None:
    return None if spread is None else spread.weight(role, part)


def _place(values: npt.NDArray[Any], lie: NamedSharding | None) -> jax.Array:
    """Onto the device; nobody writes to `values` afterwards, so the CPU device may keep the very buffer. Over a mesh
    every device gets its piece, and the whole stays on none."""
    placed: jax.Array = jax.device_put(values, lie, may_alias=True)
    return placed
