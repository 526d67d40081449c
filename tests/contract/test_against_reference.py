"""An engine is held to the float64 reference: the same checkpoint, the same numbers, within the tolerance table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualtrace.engine import Engine, Read, int_array
from dualtrace.rows import Row, plain_row
from tests.support.answering import joined, wanted
from tests.support.contract import Subject, assert_close, changed_model, load_subject, random_ids, run_layout
from tests.support.engines import load_engine
from tests.support.tiny import tiny_model
from tests.support.tolerances import FLOAT64

LENGTHS = (1, 2, 17, 64, 200)  # rope faults hide in short texts


# No model stands behind the fake engine, and the reference is what others are held to.
OTHERS = pytest.mark.engines_but("fake", "reference")


def rows_of(subject: Subject) -> list[Row]:
    rows = []
    for seed, length in enumerate(LENGTHS):
        row = int_array(random_ids(subject.engine.card, length, seed))
        read = Read(int_array(range(length)), targets=np.roll(row, -1), top_k=5, extra_ids=int_array([3]), tail=True)
        rows.append(plain_row(row, read))
    return rows


def column(engine: Engine, rows: list[Row], name: str) -> list[float]:
    readouts = run_layout(engine, rows, share=False, live=wanted)
    in_order = sorted(readouts, key=lambda readout: (readout.segment, readout.start))
    values: list[float] = joined(getattr(r, name) for r in in_order if r.rows.size).ravel().tolist()
    return values


@OTHERS
@pytest.mark.parametrize("name", ["logprobs", "top_logprobs", "extra_logprobs", "tail_logprobs", "rest_logprobs"])
def test_its_numbers_are_those_of_the_reference(subject: Subject, name: str) -> None:
    reference = load_subject("reference", subject.family)
    rows = rows_of(subject)
    found, expected = column(subject.engine, rows, name), column(reference.engine, rows, name)
    assert_close(found, expected, subject.tolerance)


@OTHERS
def test_its_card_describes_the_same_model(subject: Subject) -> None:
    reference = load_subject("reference", subject.family)
    mine, theirs = subject.engine.card, reference.engine.card
    for name in ("vocab_size", "max_positions", "layers", "query_heads", "kv_heads", "hidden_size", "windows"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert mine.provenance.weights_digest == theirs.provenance.weights_digest


def sum_of_logprobs(engine: Engine) -> float:
    """Over ids that no library's random numbers decide."""
    row = int_array([i * i % engine.card.vocab_size for i in range(100)])
    read = Read(int_array(range(99)), targets=row[1:])
    return math.fsum(column(engine, [plain_row(row, read)], "logprobs"))


WRITTEN_DOWN = {"llama": -790.5566076184784, "gpt2": -789.9343759965108}
"""Of the reference engine on 2026-11-21, when it was held to transformers in float64."""


@pytest.mark.parametrize("family", WRITTEN_DOWN)
def test_the_reference_itself_gives_what_was_once_written_down(family: str) -> None:
    found = sum_of_logprobs(load_subject("reference", family).engine)
    assert_close([found], [WRITTEN_DOWN[family]], FLOAT64)


def test_one_weight_that_is_off_by_a_millionth_would_be_caught(tmp_path: Path) -> None:
    def push(tensor: Any) -> None:
        tensor[0] *= 1 + 1e-6

    changed = load_engine("reference", changed_model(tmp_path, "model.norm.weight", push))
    whole = load_engine("reference", tiny_model())
    with pytest.raises(AssertionError, match="part by more than float64"):
        assert_close([sum_of_logprobs(changed)], [sum_of_logprobs(whole)], FLOAT64)
