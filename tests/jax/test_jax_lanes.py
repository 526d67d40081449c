"""Long texts advance side by side; who leaves meanwhile is left behind as soon as that compiles nothing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from backend_jax import load
from backend_jax.engine import JaxEngine
from dualtrace.engine import Batch, EngineSettings, Read, Readout, Segment, Step, int_array
from tests.support.masked import MASKS, plan_for
from tests.support.tiny import tiny_model
from tests.support.tolerances import FLOAT32_HIGHEST

STEP = 16
LENGTHS = (6 * STEP, 5 * STEP + 5, 6 * STEP, 4 * STEP, 5 * STEP, 2 * STEP)  # in 8 lanes


@pytest.fixture
def engine() -> Iterator[JaxEngine]:
    """Nothing is compiled in it yet."""
    made = load(EngineSettings(model=tiny_model(attention="gqa"), step_tokens=STEP))
    yield made
    made.close()


def text(number: int, masked: bool, engine: JaxEngine) -> Segment:
    length = LENGTHS[number]
    ids = np.random.default_rng(number).integers(0, 200, length).astype(np.int32)
    mask = plan_for(engine.card, MASKS["sliding"], length) if masked else None
    return Segment(ids, int_array(range(length)), mask=mask)


def batch_of(engine: JaxEngine, *numbers: int, masked: bool = False) -> tuple[Batch, tuple[Read, ...]]:
    segments = tuple(text(number, masked, engine) for number in numbers)
    return Batch(segments), tuple(Read(one.positions, np.roll(one.ids, -1)) for one in segments)


def prepare(engine: JaxEngine, *numbers: int, masked: bool = False) -> None:
    for preparation in engine.list_missing(*batch_of(engine, *numbers, masked=masked)):
        preparation.run()


def steps_of(engine: JaxEngine, wanted: set[int], *numbers: int, masked: bool = False) -> Iterator[Step]:
    return engine.forward(*batch_of(engine, *numbers, masked=masked), wanted.__contains__)


def run_while(engine: JaxEngine, leaving: dict[int, set[int]], *numbers: int, masked: bool = False) -> list[Readout]:
    """All readouts; after so many steps some leave."""
    wanted = set(range(len(numbers)))
    found: list[Readout] = []
    for number, step in enumerate(steps_of(engine, wanted, *numbers, masked=masked), start=1):
        found += step
        wanted -= leaving.get(number, set())
    return found


def logprobs(found: list[Readout], segment: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.concatenate([one.logprobs for one in found if one.segment == segment and one.logprobs is not None])


def lanes(found: list[Readout]) -> list[int]:
    """Of each call in order."""
    sizes = [int(one.bucket.partition("x")[0]) for one in found]
    return [size for place, size in enumerate(sizes) if place == 0 or size != sizes[place - 1]]


@pytest.mark.parametrize("masked", [False, True])
def test_lanes_that_nobody_wants_are_left_behind_when_functions_for_fewer_are_there(
    engine: JaxEngine, masked: bool
) -> None:
    prepare(engine, 0, masked=masked)
    prepare(engine, 0, 1, 2, 3, 4, masked=masked)
    assert lanes(run_while(engine, {2: {1, 2, 3, 4}}, 0, 1, 2, 3, 4, masked=masked)) == [8, 1]


def test_the_lanes_grow_fewer_as_often_as_functions_allow(engine: JaxEngine) -> None:
    for numbers in ((0,), (0, 2), (0, 1, 2, 3, 4)):
        prepare(engine, *numbers)
    assert lanes(run_while(engine, {2: {1, 3, 4}, 4: {2}}, 0, 1, 2, 3, 4)) == [8, 2, 1]


@pytest.mark.parametrize("masked", [False, True])
def test_who_stays_is_answered_as_alone(engine: JaxEngine, masked: bool) -> None:
    prepare(engine, 2, masked=masked)
    prepare(engine, 0, 1, 2, 3, masked=masked)
    found = run_while(engine, {3: {0, 1, 3}}, 0, 1, 2, 3, masked=masked)
    assert lanes(found) == [4, 1]
    alone = logprobs(run_while(engine, {}, 2, masked=masked), 0)
    assert np.abs(logprobs(found, 2) - alone).max() <= FLOAT32_HIGHEST.abs_epsilon


def test_who_stays_behind_shorter_ones_is_answered_as_alone(engine: JaxEngine) -> None:
    prepare(engine, 0)
    prepare(engine, 5, 0, 3)
    found = run_while(engine, {}, 5, 0, 3)
    assert lanes(found) == [4, 1]
    alone = logprobs(run_while(engine, {}, 0), 0)
    assert np.abs(logprobs(found, 1) - alone).max() <= FLOAT32_HIGHEST.abs_epsilon


def test_the_receipts_of_who_stays_are_whole(engine: JaxEngine) -> None:
    prepare(engine, 2, masked=True)
    prepare(engine, 0, 1, 2, masked=True)
    found = run_while(engine, {3: {0, 1}}, 0, 1, 2, masked=True)
    assert sum(int(one.counts.rows[0, 0]) for one in found if one.segment == 2 and one.counts) == LENGTHS[2]


def test_lanes_at_their_end_are_left_behind_too(engine: JaxEngine) -> None:
    prepare(engine, 0)
    prepare(engine, 0, 3, 5)
    found = run_while(engine, {}, 0, 3, 5)
    assert lanes(found) == [4, 1]
    assert [max(one.stop for one in found if one.segment == n) for n in range(3)] == [LENGTHS[n] for n in (0, 3, 5)]


def test_without_such_functions_the_dead_go_on_with_the_living(engine: JaxEngine) -> None:
    prepare(engine, 0, 1, 2, 3, 4)
    assert lanes(run_while(engine, {2: {1, 2, 3, 4}}, 0, 1, 2, 3, 4)) == [8]


@pytest.mark.parametrize("before", [(0,), (4,), ()])
def test_leaving_lanes_behind_compiles_nothing(engine: JaxEngine, before: tuple[int, ...]) -> None:
    """Also where functions for fewer lanes are there for a part of the way only."""
    if before:
        prepare(engine, *before)
    prepare(engine, 0, 1, 2, 3, 4)
    run_while(engine, {2: {1, 2, 3, 4}}, 0, 1, 2, 3, 4)
    assert engine.late_compilations == {}


def test_who_left_before_the_first_step_is_not_computed(engine: JaxEngine) -> None:
    prepare(engine, 0)
    prepare(engine, 0, 1, 2)
    steps = steps_of(engine, {0}, 0, 1, 2)
    assert lanes([one for step in steps for one in step]) == [1]


def test_a_batch_that_nobody_wants_any_more_ends(engine: JaxEngine) -> None:
    found = run_while(engine, {2: {0, 1}}, 0, 1)
    assert max(one.stop for one in found) == 2 * STEP
