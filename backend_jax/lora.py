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


class Chosen(NamedTuple):
    """Which adapter each row of a call wears."""

    which: Array  # [N, C] int32
    strength: Array  # [N, C]
    on: Array  # [N, C] bool; False: the term is skipped, whatever it is


class Factors(NamedTuple):
    """Of one role: stacked over layers and adapters, padded with zeros to the call's rank."""

    a: Array  # [L, K, r, in]
    b: Array  # [L, K, out, r], the adapter's scaling multiplied in


def add_delta(outputs: Array, inputs: Array, factors: Factors, chosen: Chosen) -> Array:
    """outputs + strength * (inputs a^T) b^T at the rows that wear an adapter. Factors of one layer, without [L]."""
    a, b = factors.a[chosen.which], factors.b[chosen.which]  # [N,C,r,in], [N,C,out,r]
    narrow = jnp.einsum("ncti,ncri->nctr", inputs, a)
    delta = jnp.einsum("nctr,ncor->ncto", narrow, b) * chosen.strength[:, :, None, None]
    # selected, not multiplied by zero: 0 * NaN of a broken adapter would reach the rows without one
    return jnp.where(chosen.on[:, :, None, None], outputs + delta, outputs)


def stack_factors(
    deltas: Sequence[Delta],
    modules: Mapping[str, tuple[str, int]],
    architecture: Architecture,
    dtype: np.dtype[np.generic],
) -> tuple[LoraShape, dict[str, Factors]]:
    """The factors of all adapters of a call. `modules`: full name -> (role, layer)."""
    rank = bucket(max((f.a.shape[0] for delta in deltas for f in delta.factors.values()), default=1), RANKS)
    count = bucket(len(deltas), ADAPTERS)
    found = {modules[name][0] for delta in deltas for name in delta.factors}
    roles = tuple(role for role in architecture.linear_roles if role in found)
    stacks: dict[str, tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]] = {}
    for role in roles:
        outputs, inputs = architecture.linear_shape(role)
        stacks[role] = (
            np.zeros((architecture.layers, count, rank, inputs), dtype),
            np.zeros((architecture.layers, count, outputs, rank), dtype),
        )
    for place, delta in enumerate(deltas):
        for name, factors in delta.factors.items():
            role, layer = modules[name]
            a, b = stacks[role]
            a[layer, place, : factors.a.shape[0]] = factors.a
            b[layer, place, :, : factors.b.shape[1]] = factors.b * factors.scaling
    return LoraShape(count, rank, roles), {role: Factors(*map(jax.device_put, pair)) for role, pair in stacks.items()}
