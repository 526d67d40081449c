"""What a batch needs is compiled before its forward, whatever the batch holds and whoever leaves; and in the open."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np
import pytest

from backend_jax import load
from backend_jax.engine import JaxEngine
from backend_jax.programs import Programs, Recipe
from backend_jax.shapes import token_buckets
from dualtrace.engine import NOTHING, Batch, EngineSettings, Read, Reads, Segment, int_array
from dualtrace.engine_scorer import describe_engine
from dualtrace.masks.spec import MaskSpec
from dualtrace.metrics import Metrics
from dualtrace.rows import Row
from dualtrace.scheduler import Scheduler, SchedulerLimits
from dualtrace.views import finetuned, scaled
from tests.support.adapters import tiny_adapter
from tests.support.masked import MASKS, TOKENS, edge, plan_for, read_all, split, whole
from tests.support.tiny import tiny_model
from tests.unit.test_scheduler import drain, until

STEP = 8
ADAPTERS = ("first", "second")


def new_engine() -> JaxEngine:
    folder = tiny_model()
    adapters = tuple((name, tiny_adapter(folder, rank=2 + place)) for place, name in enumerate(ADAPTERS))
    return load(EngineSettings(model=folder, step_tokens=STEP, adapters=adapters))


@pytest.fixture
def engine() -> Iterator[JaxEngine]:
    """Nothing is compiled in it yet."""
    made = new_engine()
    yield made
    made.close()


Asked = tuple[list[Segment], list[Read]]


def texts(*lengths: int) -> Asked:
    ids = [np.full(length, number, np.int32) for number, length in enumerate(lengths)]
    return [whole(one) for one in ids], [read_all(one) for one in ids]


def tree(_engine: JaxEngine) -> Asked:
    """A prompt of several steps, short completions on it, and one of several steps."""
    prompt, rest = split(whole(), 20)
    long = Segment(int_array(range(3 * STEP)), int_array(range(20, 20 + 3 * STEP)), 0)
    last = int_array(range(19, 20 + 3 * STEP))
    return [prompt, rest, rest, long], [NOTHING, read_all(), Read(int_array([3, 21])), Read(last, last)]


def variants(engine: JaxEngine, *names: str) -> Asked:
    """The text unmasked, and under masks, measured against it."""
    plans = [plan_for(engine.card, MASKS[name]) for name in ("causal", *names)]
    return [whole(mask=plan) for plan in plans], [NOTHING, *(read_all(against=0) for _ in names)]


def cut_answers(engine: JaxEngine) -> Asked:
    """As EdgePatch asks: one prefix, and its end once plain and twice cut."""
    plans = [plan_for(engine.card, MASKS[name]) for name in ("causal", "edges", "zeroed after the softmax")]
    prefix = split(whole(mask=plans[0]), STEP)[0]
    answer = int_array(range(STEP, TOKENS))
    leaves = [dataclasses.replace(split(whole(mask=plan), STEP)[1], parent=0) for plan in plans]
    return [prefix, *leaves], [NOTHING, NOTHING, *(Read(answer, answer, against=1) for _ in plans[1:])]


def late_cuts(engine: JaxEngine) -> Asked:
    """Cut in the last layer only, so that the layers below are run for one of them."""
    spans = ((0, 3), (3, 5), (2, 9), (1, 2), (4, 10), (5, 8))
    edges = [MaskSpec(edges=(edge((TOKENS - STEP, TOKENS), span, layers=(engine.card.layers - 1,)),)) for span in spans]
    plans = [plan_for(engine.card, spec) for spec in (MASKS["causal"], *edges)]
    prefix = split(whole(mask=plans[0]), TOKENS - STEP)[0]
    answer = int_array(range(TOKENS - STEP, TOKENS))
    leaves = [dataclasses.replace(split(whole(mask=plan), TOKENS - STEP)[1], parent=0) for plan in plans]
    return [prefix, *leaves], [NOTHING, NOTHING, *(Read(answer, answer, against=1) for _ in edges)]


def views(_engine: JaxEngine) -> Asked:
    worn = (None, finetuned("first"), scaled("second", 0.5), finetuned("first"))
    segments = [whole(range(6 + n), view=view) if view else whole(range(5)) for n, view in enumerate(worn)]
    return segments, [read_all(segment.ids) for segment in segments]


BATCHES: dict[str, Callable[[JaxEngine], Asked]] = {
    "one text": lambda _: texts(5),
    "texts of one step": lambda _: texts(5, 8, 3, 1, 7),
    "long texts side by side": lambda _: texts(20, 9, 31),
    "short and long": lambda _: texts(5, 20, 3, 40),
    "a tree": tree,
    "masks without heads": lambda engine: variants(engine, "sliding", "full", "edges"),
    "masks with heads": lambda engine: variants(engine, "edge in one layer and head", "array of layers, zero"),
    "zeroed weights": lambda engine: variants(engine, "zeroed after the softmax"),
    "cut answers": cut_answers,
    "late cuts": late_cuts,
    "views": views,
    "much asked": lambda _: (texts(6, 7)[0], [read_all(int_array(range(n)), top_k=n, tail=True) for n in (6, 7)]),
    "ids asked": lambda _: (texts(6)[0], [read_all(int_array(range(6)), extra_ids=int_array([3, 4]))]),
}
each_batch = pytest.mark.parametrize("name", BATCHES)


def batch_of(engine: JaxEngine, name: str, *, deterministic: bool = False) -> tuple[Batch, Reads]:
    segments, reads = BATCHES[name](engine)
    return Batch(tuple(segments), deterministic), tuple(reads)


def prepare(engine: JaxEngine, batch: Batch, reads: Reads) -> None:
    for preparation in engine.list_missing(batch, reads):
        preparation.run()


@pytest.mark.parametrize("deterministic", [False, True])
@each_batch
def test_a_prepared_batch_compiles_nothing_while_it_runs(engine: JaxEngine, name: str, deterministic: bool) -> None:
    batch, reads = batch_of(engine, name, deterministic=deterministic)
    prepare(engine, batch, reads)
    list(engine.forward(batch, reads, lambda _: True))
    assert engine.late_compilations == {}


@each_batch
def test_who_leaves_while_a_batch_runs_makes_it_compile_nothing(engine: JaxEngine, name: str) -> None:
    batch, reads = batch_of(engine, name)
    prepare(engine, batch, reads)
    for leaving in range(len(batch.segments)):
        wanted = set(range(len(batch.segments)))
        for _step in engine.forward(batch, reads, wanted.__contains__):
            wanted.discard(leaving)
    assert engine.late_compilations == {}


@each_batch
def test_nothing_is_compiled_that_the_batch_does_not_use(
    engine: JaxEngine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, reads = batch_of(engine, name)
    prepare(engine, batch, reads)
    used: set[tuple[str, Hashable]] = set()
    find = Programs.find

    def note(self: Programs, recipe: Recipe) -> Any:
        used.add((recipe.kind, recipe.key))
        return find(self, recipe)

    monkeypatch.setattr(Programs, "find", note)
    list(engine.forward(batch, reads, lambda _: True))
    assert len(used) == sum(engine.compilations.values())


def test_the_batch_of_late_cuts_has_a_fork(engine: JaxEngine) -> None:
    names = [preparation.name for preparation in engine.list_missing(*batch_of(engine, "late cuts"))]
    assert [name.split(", ")[-1] for name in names if "fork" in name] == ["below a fork", "above a fork"]


def test_a_forward_that_nobody_prepared_is_noticed(engine: JaxEngine) -> None:
    batch, reads = batch_of(engine, "one text")
    list(engine.forward(batch, reads, lambda _: True))
    assert engine.late_compilations == {"forward": 1, "read": 1}


def test_a_prepared_batch_misses_nothing(engine: JaxEngine) -> None:
    batch, reads = batch_of(engine, "cut answers")
    prepare(engine, batch, reads)
    assert engine.list_missing(batch, reads) == ()


# ---- behind the queue


def row(length: int) -> Row:
    (segment,), (read,) = texts(length)
    return Row(segment.ids, segment.positions, read)


async def answer_beside(engine: JaxEngine, monkeypatch: pytest.MonkeyPatch) -> tuple[int, bool, int]:
    """An unusual text, whose function takes as long as it takes to answer a usual one: what the usual one was
    answered, whether the unusual was still open then, and what it was answered in the end."""
    may_compile, compiling = threading.Event(), threading.Event()
    make = Programs.prepare

    def make_slowly(self: Programs, recipe: Recipe) -> None:
        compiling.set()
        assert may_compile.wait(20)
        make(self, recipe)

    prepare(engine, *batch_of(engine, "one text"))
    monkeypatch.setattr(Programs, "prepare", make_slowly)
    scheduler = Scheduler(engine, SchedulerLimits(), Metrics())
    scheduler.start()
    try:
        unusual = scheduler.submit([row(3 * STEP)])
        await until(compiling.is_set)
        answered = await drain(scheduler.submit([row(5)]))
        was_open = not unusual.is_done
        may_compile.set()
        return answered, was_open, await drain(unusual)
    finally:
        may_compile.set()
        await asyncio.to_thread(scheduler.close)


async def test_a_usual_call_is_answered_while_a_function_for_another_is_compiled(
    engine: JaxEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await answer_beside(engine, monkeypatch) == (5, True, 3 * STEP)


async def test_no_call_behind_the_queue_waits_for_a_compilation_in_its_forward(
    engine: JaxEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await answer_beside(engine, monkeypatch)
    assert engine.late_compilations == {}


async def test_an_answer_names_the_padded_shapes_it_ran_in(engine: JaxEngine) -> None:
    scheduler = Scheduler(engine, SchedulerLimits(), Metrics())
    scheduler.start()
    try:
        ticket = scheduler.submit([row(STEP + 5)])
        await drain(ticket)
    finally:
        await asyncio.to_thread(scheduler.close)
    assert ticket.stats.buckets == {"1x16", "1x16+64"}


async def test_an_answer_and_the_metrics_tell_how_much_ran_empty(engine: JaxEngine) -> None:
    metrics = Metrics()
    scheduler = Scheduler(engine, SchedulerLimits(), metrics)
    scheduler.start()
    try:
        ticket = scheduler.submit([row(STEP + 5)])
        await drain(ticket)
    finally:
        await asyncio.to_thread(scheduler.close)
    assert ticket.stats.padded_tokens == 2 * 16 - (STEP + 5)
    assert metrics.registry.get_sample_value("dualtrace_padded_tokens_total") == ticket.stats.padded_tokens


async def test_an_answer_tells_the_time_of_compilations_as_time_in_the_queue(
    engine: JaxEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Programs.prepare

    def make_slowly(self: Programs, recipe: Recipe) -> None:
        time.sleep(0.2)
        make(self, recipe)

    monkeypatch.setattr(Programs, "prepare", make_slowly)
    scheduler = Scheduler(engine, SchedulerLimits(), Metrics())
    scheduler.start()
    begun = time.monotonic()
    try:
        ticket = scheduler.submit([row(5)])
        await drain(ticket)
    finally:
        await asyncio.to_thread(scheduler.close)
    assert ticket.stats.queue_seconds >= 2 * 0.2  # a forward and a read
    assert 0 < ticket.stats.compute_seconds <= time.monotonic() - begun - ticket.stats.queue_seconds


def test_the_card_lists_the_buckets(engine: JaxEngine) -> None:
    tokens = " ".join(map(str, token_buckets(engine.card.max_positions)))
    assert f"row_tokens {tokens}" in describe_engine(engine, None, None).buckets


# ---- how many there are


def test_what_is_usual_is_warm_after_warming_up() -> None:
    engine = load(EngineSettings(model=tiny_model(max_positions=64)))
    for preparation in engine.list_usual():
        preparation.run()
    for lengths in ((3,), (20,), (60,)):
        segments, reads = texts(*lengths)
        list(engine.forward(Batch(tuple(segments)), tuple(reads), lambda _: True))
    assert (engine.late_compilations, engine.list_usual()) == ({}, ())


def test_texts_of_every_length_need_no_more_functions_than_there_are_buckets() -> None:
    engine = load(EngineSettings(model=tiny_model(), step_tokens=256))
    longest = 192
    for length in range(1, longest + 1):
        (segment,), _ = texts(length)
        read = Read(int_array([length - 1]), int_array([0]))
        prepare(engine, Batch((segment,)), (read,))
    assert engine.compilations["forward"] <= token_buckets(longest).index(longest) + 1
