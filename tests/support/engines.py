"""Engines under test: loaded by the name they announce, lent to scorers that would close them, held to the reference.

It knows the engine registry and the tolerance table. It must not know any engine's insides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from dualtrace.arrays import FloatArray
from dualtrace.engine import Batch, Engine, EngineSettings, Live, Preparation, Preparing, Reads, Shape, Step
from dualtrace.engine_registry import find_engine
from dualtrace.model_card import ModelCard
from tests.support.adapters import broken_adapter, tiny_adapter
from tests.support.tiny import tiny_model
from tests.support.tolerances import Precision, Tolerance, find_tolerance

SHORT_STEP = 8  # tokens, so that tiny texts take several steps where an engine has steps

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
    return find_engine(engine_name)(settings)


def load_engine(engine_name: str, model: Path, *, step_tokens: int = SHORT_STEP, **options: str) -> Engine:
    """A new engine over a model; options are those that only this engine knows."""
    return find_engine(engine_name)(EngineSettings(model=model, step_tokens=step_tokens, options=options))


class Lent:
    """An engine that outlives the scorer it is lent to."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def card(self) -> ModelCard:
        return self._engine.card

    def prepare(self, shape: Shape) -> None:
        self._engine.prepare(shape)

    def forward(self, batch: Batch, reads: Reads, live: Live) -> Iterator[Step]:
        return self._engine.forward(batch, reads, live)

    def close(self) -> None:
        """Its owner still needs it."""


class LentPreparing(Lent):
    """The same for an engine that compiles."""

    def __init__(self, engine: Engine, preparing: Preparing) -> None:
        super().__init__(engine)
        self._preparing = preparing

    def list_missing(self, batch: Batch, reads: Reads) -> tuple[Preparation, ...]:
        return self._preparing.list_missing(batch, reads)

    def list_usual(self) -> tuple[Preparation, ...]:
        return self._preparing.list_usual()


def lend(engine: Engine) -> Engine:
    """All that the engine has but its end."""
    return LentPreparing(engine, engine) if isinstance(engine, Preparing) else Lent(engine)


@cache
def _adapters(model: Path) -> tuple[tuple[str, Path], ...]:
    usual = tiny_adapter(model)
    everywhere = tiny_adapter(model, targets="all-linear", rank=2, alpha=3)
    return (("all", everywhere), ("broken", broken_adapter(usual, usual.parent / "broken")), ("usual", usual))


def require(engine_name: str, engine: Engine, *abilities: str) -> None:
    """An engine under contract must be able; the fake engine, which has no model, is left out by its tests."""
    lacking = [name for name in abilities if not getattr(engine.card.capabilities, name)]
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
