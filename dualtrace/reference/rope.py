"""Rotary positions: how fast each pair of a head's columns turns, and turning them.

It knows config keys of rotary embeddings, old and new. True float64 throughout: transformers computes the frequencies
in float32 even for a float64 model, which moves angles by 6e-8 of themselves.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dualtrace.arrays import FloatArray, IntArray
from dualtrace.problems import InvalidArgument, Reason
from dualtrace.reference.config import ConfigReader

KINDS = ("default", "linear", "llama3")


def read_frequencies(config: ConfigReader, head_dim: int) -> FloatArray:
    """Radians per position of each column pair, [head_dim / 2], from `rope_parameters` or the older keys or both."""
    newer = config.mapping("rope_parameters")
    scaling = config.mapping("rope_scaling")
    older: dict[str, Any] = _one_name(scaling) if scaling else {}
    if config.has("rope_theta"):
        older["rope_theta"] = config.number("rope_theta")
    chosen = older if newer is None else _one_name(newer)
    for key in sorted(set(chosen) & set(older)):
        if chosen[key] != older[key]:
            raise InvalidArgument(
                Reason.MODEL_INVALID,
                f"config.json has {key} = {chosen[key]} in rope_parameters, {older[key]} beside it; make them agree.",
            )
    if newer is not None and (lost := sorted(set(older) - set(chosen) - {"rope_theta"})):
        raise InvalidArgument(
            Reason.MODEL_INVALID, f"config.json gives {lost[0]} in rope_scaling, not in rope_parameters."
        )
    if newer is not None and "rope_theta" in older:
        chosen.setdefault("rope_theta", older["rope_theta"])
    return _frequencies(ConfigReader(chosen, "the rope parameters of config.json"), head_dim)


def turn(columns: FloatArray, positions: IntArray, frequencies: FloatArray) -> FloatArray:
    """Turn [heads, T, D] by position. Column j is paired with column j + D/2."""
    angles = positions.astype(np.float64)[:, None] * frequencies  # [T, D/2]
    cosines, sines = np.cos(angles), np.sin(angles)
    first, second = np.split(columns, 2, axis=2)
    return np.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=2)


def _one_name(parameters: dict[str, Any]) -> dict[str, Any]:
    """`type` is the older name of `rope_type`; a file may hold both, and then they must agree."""
    named = {key: value for key, value in parameters.items() if key != "type"}
    old = parameters.get("type")
    if old is not None and named.setdefault("rope_type", old) != old:
        raise InvalidArgument(
            Reason.MODEL_INVALID, f"config.json names two kinds of rope: {old}, {named['rope_type']}."
        )
    return named


def _frequencies(parameters: ConfigReader, head_dim: int) -> FloatArray:
    kind = parameters.choice("rope_type", KINDS, "default")
    theta = parameters.number("rope_theta", 10000.0)
    plain: FloatArray = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if kind == "linear":
        plain = plain / parameters.number("factor")
    if kind == "llama3":
        plain = _stretch_slow_pairs(plain, parameters)
    parameters.finish()
    return plain


def _stretch_slow_pairs(plain: FloatArray, parameters: ConfigReader) -> FloatArray:
    """Llama 3: pairs that turn seldom within the old context are slowed, the quick ones kept, blended in between."""
    factor, context = parameters.number("factor"), parameters.count("original_max_position_embeddings")
    low, high = parameters.number("low_freq_factor"), parameters.number("high_freq_factor")
    if not low < high:
        raise InvalidArgument(Reason.MODEL_INVALID, f"low_freq_factor {low} must be below high_freq_factor {high}.")
    turns = context * plain / (2 * math.pi)  # full turns within the old context
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * plain + (1 - keep) * plain / factor
