"""Every dtype of the torch engine against its float64, alone and as siblings behind a prefix, within the table."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from dualtrace.arrays import FloatArray
from dualtrace.engine import NOTHING, Engine, EngineSettings, Read, Segment, int_array
from tests.support.contract import tolerance_of
from tests.support.masked import run
from tests.support.tiny import tiny_model
from tests.support.tiny_families import FAMILIES, VOCABULARY, family_model

pytestmark = pytest.mark.torch

TOKENS, PREFIX = 40, 20
IDS = np.random.default_rng(3).integers(3, VOCABULARY, TOKENS, dtype=np.int32)
ROWS = int_array(range(TOKENS))
DTYPES = ("float32", "float16", "bfloat16")
MODELS = (*FAMILIES, "llama gqa", "llama mqa")
UNIT = {"float32": 6e-8, "float16": 5e-4, "bfloat16": 4e-3}  # half a unit in the last place of 1.0


def folder_of(model: str) -> Path:
    return tiny_model(attention=model.split()[1]) if " " in model else family_model(model)


@cache
def engine_of(model: str, dtype: str) -> Engine:
    import backend_torch

    return backend_torch.load(EngineSettings(model=folder_of(model), dtype=dtype))


def alone(model: str, dtype: str) -> FloatArray:
    """[T-1]"""
    return run(engine_of(model, dtype), [Segment(IDS, ROWS)], [Read(ROWS[:-1], IDS[1:])])[0].logprobs


def as_siblings(model: str, dtype: str) -> list[FloatArray]:
    """[PREFIX-1:] of the same, three times behind one prefix, one of them shorter."""
    stops = (TOKENS, TOKENS - 7, TOKENS)
    leaves = [Segment(IDS[PREFIX:stop], ROWS[PREFIX:stop], 0) for stop in stops]
    reads = [NOTHING, *[Read(ROWS[PREFIX - 1 : stop - 1], IDS[PREFIX:stop]) for stop in stops]]
    answers = run(engine_of(model, dtype), [Segment(IDS[:PREFIX], ROWS[:PREFIX]), *leaves], reads)
    return [answers[1 + number].logprobs for number in range(len(stops))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
def test_a_dtype_is_within_its_tolerance_of_float64(model: str, dtype: str) -> None:
    tolerance = tolerance_of(engine_of(model, dtype).card)
    wanted = alone(model, "float64")
    for found in (alone(model, dtype), *as_siblings(model, dtype)):
        theirs = wanted if found.size == wanted.size else wanted[PREFIX - 1 :][: found.size]
        assert all(tolerance.allows(float(one), float(other)) for one, other in zip(found, theirs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_is_really_used(dtype: str) -> None:
    """Rounding shows: an engine that calculated in a wider type would be closer."""
    difference = float(np.abs(alone("llama", dtype) - alone("llama", "float64")).max())
    assert difference > UNIT[dtype]
