"""Adapters' terms of linear layers: factors stacked over layers and adapters, chosen per row, strength as data.

It knows deltas as `dualtrace.adapters` hands them out. It must not know views, files or the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from backend_jax.architecture import Architecture
from backend_jax.shapes import LoraShape, bucket
from dualtrace.adapters import Delta

Array = jax.Array
RANKS = (8, 16, 32, 64, 128, 256)
ADAPTERS = (1, 2, 4, 8, 16)

Modules = Mapping[str, tuple[str, int]]
"""Full name of a linear module -> (role, layer)."""


class Chosen(NamedTuple):
    """Which adapter each row of a call wears."""

    which: Array  # [N, C] int32
    strength: Array  # [N, C]
    on: Array  # [N, C] bool; False: the term is skipped, whatever it is


class Factors(NamedTuple):
    """Of one role: stacked over layers and adapters, padded with zeros to the call's rank."""

    a: Array  # [L, K, r, in], L = 1 outside of the layers
    b: Array  # [L, K, out, r], the adapter's scaling multiplied in


def add_delta(outputs: Array, inputs: Array, factors: Factors, chosen: Chosen) -> Array:
    """outputs + strength * (inputs a^T) b^T at the rows that wear an adapter. Factors of one layer, without [L]."""
    a, b = factors.a[chosen.which], factors.b[chosen.which]  # [N,C,r,in], [N,C,out,r]
    narrow = jnp.einsum("ncti,ncri->nctr", inputs, a)
    delta = jnp.einsum("nctr,ncor->ncto", narrow, b) * chosen.strength[:, :, None, None]
    # selected, not multiplied by zero: 0 * NaN of a broken adapter would reach the rows without one
    return jnp.where(chosen.on[:, :, None, None], outputs + delta, outputs)


def lora_shape(deltas: Sequence[Delta], modules: Modules, architecture: Architecture) -> LoraShape:
    rank = bucket(max((f.a.shape[0] for delta in deltas for f in delta.factors.values()), default=1), RANKS)
    found = {modules[name][0] for delta in deltas for name in delta.factors}
    roles = tuple(role for role in (*architecture.linear_roles, *architecture.outer_roles) if role in found)
    return LoraShape(bucket(len(deltas), ADAPTERS), rank, roles)


def factor_sizes(shape: LoraShape, architecture: Architecture, role: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a and b of one role's Factors."""
    outputs, inputs = architecture.linear_shape(role)
    front = (1 if role in architecture.outer_roles else architecture.layers, shape.adapters)
    return (*front, shape.rank, inputs), (*front, outputs, shape.rank)


def stack_factors(
    shape: LoraShape,
    deltas: Sequence[Delta],
    modules: Modules,
    architecture: Architecture,
    dtype: np.dtype[np.generic],
) -> dict[str, Factors]:
    """The factors of all adapters of a call."""
    stacks: dict[str, tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]] = {}
    for role in shape.roles:
        of_a, of_b = factor_sizes(shape, architecture, role)
        stacks[role] = (np.zeros(of_a, dtype), np.zeros(of_b, dtype))
    for place, delta in enumerate(deltas):
        for name, factors in delta.factors.items():
            role, layer = modules[name]
            a, b = stacks[role]
            a[layer, place, : factors.a.shape[0]] = factors.a
            b[layer, place, :, : factors.b.shape[1]] = factors.b * factors.scaling
    return {role: Factors(*map(jax.device_put, pair)) for role, pair in stacks.items()}
