"""Engines under test, by name, each loaded once in a test session; and how near an engine must be to the reference.

It knows the names of tests/conftest.py and the tolerance table. It must not know any engine's insides.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from dualtrace.engine import Engine, EngineSettings, FloatArray, ModelCard
from tests.conftest import ENGINE_MODULES
from tests.support.adapters import broken_adapter, tiny_adapter
from tests.support.tiny import tiny_model
from tests.support.tolerances import Precision, Tolerance, find_tolerance

MODELS: dict[str, tuple[tuple[str, str], ...]] = {
    "llama mha": (),
    "llama mqa": (("attention", "mqa"),),
    "llama gqa": (("attention", "gqa"),),
    "gpt2": (("family", "gpt2"),),
}


@cache
def loaded(engine_name: str, model: str, *, adapters: bool = False, step_tokens: int = 256) -> Engine:
    """The engine over a tiny model, with the adapters `usual`, `all` and `broken` when asked. It is shared: do not
    close it."""
    folder = tiny_model(**dict(MODELS[model]))
    settings = EngineSettings(
        model=folder, adapters=_adapters(folder) if adapters else (), step_tokens=step_tokens, options={}
    )
    engine: Engine = importlib.import_module(ENGINE_MODULES[engine_name]).load(settings)
    return engine


@cache
def _adapters(model: Path) -> tuple[tuple[str, Path], ...]:
    usual = tiny_adapter(model)
    everywhere = tiny_adapter(model, targets="all-linear", rank=2, alpha=3)
    return (("all", everywhere), ("broken", broken_adapter(usual, usual.parent / "broken")), ("usual", usual))


def require(engine_name: str, engine: Engine, *abilities: str) -> None:
    """Skip the fake engine, which has no model behind it; any other engine must be able."""
    lacking = [name for name in abilities if not getattr(engine.card.capabilities, name)]
    if lacking and engine_name == "fake":
        pytest.skip(f"the fake engine has no {' and no '.join(lacking)}")
    assert not lacking, f"{engine_name} has no {lacking}"


def tolerance_of(engine: Engine, reference: Engine) -> Tolerance:
    return find_tolerance(_precision(engine.card), _precision(reference.card))


def _precision(card: ModelCard) -> Precision:
    return Precision(card.provenance.dtype, card.provenance.matmul_precision)


def assert_near(found: FloatArray | None, wanted: FloatArray | None, tolerance: Tolerance, rows: Sequence[int]) -> None:
    """Every row within the tolerance; the message names the worst."""
    assert found is not None
    assert wanted is not None
    assert found.shape == wanted.shape
    allowed = tolerance.abs_epsilon + tolerance.rel_epsilon * np.maximum(np.abs(found), np.abs(wanted))
    excess = np.abs(found - wanted) - allowed
    worst = int(np.argmax(np.where(np.isnan(excess), np.inf, excess)))
    assert excess[worst] <= 0, (
        f"row {rows[worst]}: {found[worst]!r}, the reference says {wanted[worst]!r}; {tolerance.name} allows "
        f"{allowed[worst]:.3g}, {int((~(excess <= 0)).sum())} of {excess.size} rows are out"
    )
