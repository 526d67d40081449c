"""What the contract suite is run on: an engine by name, its tokenizer, and how far its numbers may move.

It knows models and tolerances. It must not know any engine's insides.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from dualtrace.batching import lay_out
from dualtrace.engine import Engine, Live, Readout
from dualtrace.engine_scorer import EngineScorer
from dualtrace.fake import fake_tokenizer
from dualtrace.model_card import ModelCard
from dualtrace.rows import Row
from dualtrace.tokens import Tokenizer
from tests.support.engines import lend, load_engine
from tests.support.tiny import tiny_model
from tests.support.tolerances import Precision, Tolerance, find_tolerance

SEEDS = {"llama": 1, "gpt2": 2}
ATTENTION = {"llama": "gqa", "gpt2": "mha"}


@dataclass(frozen=True)
class Subject:
    name: str
    family: str
    engine: Engine
    tokenizer: Tokenizer
    tolerance: Tolerance  # between two careful answers of this engine

    def scorer(self) -> EngineScorer:
        return EngineScorer(lend(self.engine), self.tokenizer)


@cache
def load_subject(name: str, family: str) -> Subject:
    if name == "fake":
        engine = load_engine(name, Path(), spec=f"seed={SEEDS[family]},positions=512")
        tokenizer = fake_tokenizer()
    else:
        folder = tiny_model(family=family, attention=ATTENTION[family], seed=SEEDS[family])
        engine, tokenizer = load_engine(name, folder), Tokenizer.from_directory(folder)
    return Subject(name, family, engine, tokenizer, tolerance_of(engine.card))


def tolerance_of(card: ModelCard) -> Tolerance:
    side = Precision(card.provenance.dtype, card.provenance.matmul_precision)
    return find_tolerance(side, side)


def run_layout(engine: Engine, rows: Sequence[Row], *, share: bool, live: Live) -> list[Readout]:
    """All readouts of the rows, `segment` replaced by the row's number; those of shared prefixes are left out."""
    layout = lay_out(rows, share=share)
    found = []
    for step in engine.forward(layout.batch, layout.reads, live):
        for readout in step:
            row = layout.row_of_segment[readout.segment]
            if row is not None:
                found.append(replace(readout, segment=row))
    return found


def assert_close(left: Sequence[float], right: Sequence[float], tolerance: Tolerance) -> None:
    """Every pair agrees within the tolerance, by the pass rule."""
    assert len(left) == len(right)
    for index, (one, two) in enumerate(zip(left, right, strict=True)):
        assert tolerance.allows(one, two), f"value {index}: {one!r} and {two!r} part by more than {tolerance.name}"


def changed_model(folder: Path, tensor: str, change: Callable[[Any], None]) -> Path:
    """A copy of the tiny llama in which one tensor was changed in place."""
    copy = shutil.copytree(tiny_model(), folder / "changed")
    tensors = load_file(copy / "model.safetensors")
    tensors[tensor] = tensors[tensor].copy()
    change(tensors[tensor])
    save_file(tensors, copy / "model.safetensors")
    return copy


def set_row(row: int, value: float) -> Callable[[Any], None]:
    def change(tensor: Any) -> None:
        tensor[row] = value

    return change


def random_ids(card: ModelCard, count: int, seed: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, card.vocab_size, count)]
