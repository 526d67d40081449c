"""Rotary positions: how fast each pair of a head's columns turns, from old and new config keys.

Angles are made on the host in float64 and rounded once, as cosines and sines: in float32 the angle of position 8,000
is already 2e-4 off. It knows config keys of rotary embeddings. It must not know families or JAX.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from backend_jax.config import Keys, refuse_model

Floats = npt.NDArray[np.float64]
KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Rotary:
    frequencies: tuple[float, ...]  # radians per position of each turned pair: column j with column j + pairs


def rotary_tables(rotary: tuple[Rotary, ...], positions: npt.NDArray[np.int32]) -> tuple[Floats, Floats]:
    """Cosines and sines [F, *positions.shape, pairs] of all distinct rotaries."""
    frequencies = np.array([one.frequencies for one in rotary])  # [F, pairs]
    spread = frequencies.reshape(len(rotary), *[1] * positions.ndim, -1)
    angles = positions.astype(np.float64)[None, ..., None] * spread
    return np.cos(angles), np.sin(angles)


def read_rotary(keys: Keys, head_dim: int, *, theta: float = 10000.0, partial: float = 1.0) -> Rotary:
    """One rotary for all layers, from `rope_parameters`, the older `rope_scaling` and `rope_theta`, or both."""
    newer = keys.mapping("rope_parameters")
    older = _named(keys.mapping("rope_scaling") or {})
    if keys.has("rope_theta"):
        older["rope_theta"] = keys.number("rope_theta")
    if keys.has("partial_rotary_factor"):
        older["partial_rotary_factor"] = keys.number("partial_rotary_factor")
    chosen = merge(newer, older)
    chosen.setdefault("rope_theta", theta)
    chosen.setdefault("partial_rotary_factor", partial)
    return make_rotary(chosen, head_dim)


def merge(newer: dict[str, Any] | None, older: dict[str, Any]) -> dict[str, Any]:
    """Both ways of writing the same thing must agree where both speak; the older may not add a kind of its own."""
    if newer is None:
        return dict(older)
    chosen = _named(newer)
    for key, value in older.items():
        if key in chosen and chosen[key] != value:
            refuse_model(f"config.json has {key} = {chosen[key]} in rope_parameters and {value} beside it")
        if key not in chosen and key not in {"rope_theta", "partial_rotary_factor"}:
            refuse_model(f"config.json gives {key} in rope_scaling and not in rope_parameters")
        chosen[key] = value
    return chosen


def make_rotary(parameters: dict[str, Any], head_dim: int) -> Rotary:
    keys = Keys(_named(parameters), "the rope parameters of config.json")
    kind = keys.one_of("rope_type", KINDS, "default")
    theta = keys.number("rope_theta", 10000.0)
    turned = int(head_dim * keys.number("partial_rotary_factor", 1.0))
    if turned % 2 or not 0 < turned <= head_dim:
        refuse_model(f"{turned} of {head_dim} columns of a head would be turned; rotary positions turn pairs")
    plain: Floats = theta ** -(np.arange(0, turned, 2, dtype=np.float64) / turned)
    if kind == "linear":
        plain = plain / keys.number("factor")
    if kind == "llama3":
        plain = _slow_down(plain, keys)
    keys.finish()
    return Rotary(tuple(plain.tolist()))


def _named(parameters: dict[str, Any]) -> dict[str, Any]:
    """`type` is what older files call `rope_type`; a file that holds both must agree with itself."""
    named = {key: value for key, value in parameters.items() if key != "type"}
    old = parameters.get("type")
    if old is not None and named.setdefault("rope_type", old) != old:
        refuse_model(f"config.json names two kinds of rope: {old} and {named['rope_type']}")
    return named


def _slow_down(plain: Floats, keys: Keys) -> Floats:
    """Llama 3.x: pairs that turn rarely within the original context go slower, quick ones stay, those between blend."""
    factor, context = keys.number("factor"), keys.count("original_max_position_embeddings")
    low, high = keys.number("low_freq_factor"), keys.number("high_freq_factor")
    if not low < high:
        refuse_model(f"low_freq_factor {low} must be below high_freq_factor {high}")
    turns = plain * context / (2 * math.pi)
    stay = ((turns - low) / (high - low)).clip(0.0, 1.0)
    return plain * (stay + (1 - stay) / factor)
