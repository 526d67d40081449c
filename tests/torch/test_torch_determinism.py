"""Deterministic answers are bit-equal whatever else runs: beside them in a batch, or between two of their steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np
import pytest

from dualtrace.engine import Batch, Engine, EngineSettings, Read, Readout, Reads, Segment, Step
from dualtrace.masks import spec as s
from dualtrace.masks.plan import MaskPlan, compile_mask
from dualtrace.masks.resolve import MaskContext, geometry_of, resolve
from dualtrace.views import BASE, Noise, View, finetuned, null, scaled
from tests.support.adapters import tiny_adapter
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.torch

VIEWS: tuple[View, ...] = (BASE, finetuned("a"), scaled("a", 0.5), null("a", Noise(3)))
STEP_TOKENS = 24


@dataclass(frozen=True)
class Request:
    """One call: its segments (the last may be measured against the first) and reads."""

    segments: tuple[Segment, ...]
    reads: Reads


@cache
def engine_of(family: str) -> Engine:
    import backend_torch

    folder = tiny_model(family=family)
    adapters = (("a", tiny_adapter(folder)),)
    return backend_torch.load(EngineSettings(model=folder, adapters=adapters, step_tokens=STEP_TOKENS))


def random_plan(engine: Engine, length: int, random: np.random.Generator) -> MaskPlan | None:
    start = int(random.integers(1, length))
    masks = (
        s.MaskSpec(),
        s.MaskSpec(base=s.Sliding(int(random.integers(2, 9)))),
        s.MaskSpec(base=s.Full()),
        s.MaskSpec(edges=(s.Edge(s.TokenRange(start, length), s.TokenRange(0, start), layers=(1,), heads=(0, 2)),)),
    )
    chosen = int(random.integers(-2, len(masks)))
    if chosen < 0:
        return None
    return compile_mask(resolve(masks[chosen], MaskContext(length, geometry_of(engine.card))))


def random_request(engine: Engine, random: np.random.Generator) -> Request:
    length = int(random.integers(2, 90))
    ids, rows = random.integers(0, engine.card.vocab_size, length, dtype=np.int32), np.arange(length, dtype=np.int32)
    view = VIEWS[int(random.integers(len(VIEWS)))]
    targets = random.integers(0, engine.card.vocab_size, length, dtype=np.int32)
    segments = [Segment(ids, rows, view=view, mask=random_plan(engine, length, random))]
    reads = [Read(rows, targets, top_k=int(random.integers(0, 6)), extra_ids=ids[:3], tail=bool(random.integers(2)))]
    if random.integers(3) == 0:
        segments.append(Segment(ids, rows, view=view, mask=random_plan(engine, length, random)))
        reads.append(Read(rows, targets, against=0))
    return Request(tuple(segments), tuple(reads))


def start(engine: Engine, requests: Sequence[Request]) -> Iterator[Step]:
    """One deterministic batch of all of them."""
    segments: list[Segment] = []
    reads: list[Read] = []
    for request in requests:
        for segment, read in zip(request.segments, request.reads, strict=True):
            against = None if read.against is None else read.against + len(segments) - 1
            reads.append(Read(read.rows, read.targets, read.top_k, read.extra_ids, read.tail, against))
            segments.append(segment)
    return engine.forward(Batch(tuple(segments), deterministic=True), tuple(reads), lambda _: True)


def as_bytes(readouts: Sequence[Readout]) -> list[bytes]:
    """Every number of the readouts of one segment, bit by bit."""
    content: list[bytes] = []
    for readout in readouts:
        for field in fields(Readout):
            value: Any = getattr(readout, field.name)
            if field.name == "counts" and value is not None:
                content += [getattr(value, column.name).tobytes() for column in fields(value)]
            elif isinstance(value, np.ndarray):
                content.append(value.tobytes())
    return content


def collect(steps: Iterator[Step], found: dict[int, list[Readout]]) -> bool:
    """Take one step; False when there is none left."""
    step = next(steps, None)
    for readout in step or ():
        found.setdefault(readout.segment, []).append(readout)
    return step is not None


def answers_of(request_count: Sequence[int], found: dict[int, list[Readout]]) -> list[list[bytes]]:
    """Per request, the bytes of its segments in order."""
    ends = np.cumsum([0, *request_count])
    return [
        [block for segment in range(begin, end) for block in as_bytes(found[segment])]
        for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
    ]


def under_load(engine: Engine, requests: Sequence[Request], random: np.random.Generator) -> list[list[bytes]]:
    """Batches of a few requests each, two forwards interleaved at random."""
    cuts = [0, *np.sort(random.choice(np.arange(1, len(requests)), len(requests) // 3, replace=False)), len(requests)]
    batches = [requests[a:b] for a, b in itertools.pairwise(cuts)]
    running: list[tuple[int, Iterator[Step], dict[int, list[Readout]]]] = []
    answers: dict[int, list[list[bytes]]] = {}
    waiting = list(enumerate(batches))
    while waiting or running:
        while waiting and len(running) < 2:
            number, batch = waiting.pop(0)
            running.append((number, start(engine, batch), {}))
        chosen = int(random.integers(len(running)))
        number, steps, found = running[chosen]
        if not collect(steps, found):
            answers[number] = answers_of([len(request.segments) for request in batches[number]], found)
            running.pop(chosen)
    return [answer for number in sorted(answers) for answer in answers[number]]


def alone(engine: Engine, request: Request) -> list[bytes]:
    found: dict[int, list[Readout]] = {}
    steps = start(engine, [request])
    while collect(steps, found):
        pass
    return answers_of([len(request.segments)], found)[0]


def find_differences(family: str, count: int) -> list[int]:
    engine, random = engine_of(family), np.random.default_rng(17)
    requests = [random_request(engine, random) for _ in range(count)]
    loaded = under_load(engine, requests, random)
    return [number for number, request in enumerate(requests) if alone(engine, request) != loaded[number]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sixty_random_requests_under_load_are_bit_equal_alone(family: str) -> None:
    assert find_differences(family, 60) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_five_hundred_random_requests_under_load_are_bit_equal_alone(family: str) -> None:
    assert find_differences(family, 500) == []


def test_one_changed_bit_is_found() -> None:
    engine = engine_of("llama")
    request = random_request(engine, np.random.default_rng(5))
    answer = alone(engine, request)
    number = next(i for i, block in enumerate(answer) if len(block) >= 8)
    changed = bytearray(answer[number])
    changed[0] ^= 1
    assert [*answer[:number], bytes(changed), *answer[number + 1 :]] != alone(engine, request)
