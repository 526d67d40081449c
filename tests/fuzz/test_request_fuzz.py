"""Nothing a stranger sends as a request may do anything but be answered, or be refused as a Problem, soon and small."""

from __future__ import annotations

import asyncio
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualtrace.engine_scorer import EngineScorer
from dualtrace.problems import Problem
from dualtrace.questions.answers import NextTokenAnswer, PreflightAnswer, ScoreAnswer, StreamEvent, TokenizeAnswer
from dualtrace.v1 import scoring_pb2 as pb
from dualtrace.v1 import token_pb2, view_pb2
from dualtrace.wire import answers as answers_wire
from dualtrace.wire import events as events_wire
from dualtrace.wire import questions as wire
from tests.support.answering import fake_engine
from tests.support.scorers import fake_scorer

pytestmark = pytest.mark.fuzz

SECONDS_EACH = 5.0  # an example takes milliseconds; the bound is there for hangs, on a machine that others use too
MEGABYTES_EACH = 100
FUZZ = settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

READERS: dict[str, Callable[[Any], Any]] = {
    "LogprobRequest": wire.logprob_from_pb,
    "RollingLogprobRequest": wire.rolling_from_pb,
    "NextTokenDistRequest": wire.next_token_from_pb,
    "ScoreRequest": wire.score_from_pb,
    "TokenizeRequest": wire.tokenize_from_pb,
    "PreflightRequest": wire.preflight_from_pb,
}
KINDS: dict[str, Any] = {name: getattr(pb, name) for name in READERS}

EDGES = [-(2**31), -1, 0, 1, 2, 3, 7, 255, 256, 2**31 - 1]
HOSTILE = [
    "", "\0", "a\0b", "🙂", "👩\u200d👩\u200d👧", "e\u0301\u0323", "\u202eab\u202c", "שלום", "\ufeff", "\u2028", "</s>",
    "<|bos|>", "\U0010ffff", " " * 200, "\u0301" * 50, "x" * 500,
]  # fmt: skip
NUMBERS = st.sampled_from(EDGES) | st.integers(0, 20)
SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_STRING: st.sampled_from(HOSTILE) | st.text(max_size=20),
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=20),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_DOUBLE: st.floats() | st.sampled_from([5e-324, 1e308, -0.0]),
    FieldDescriptor.TYPE_INT32: NUMBERS,
    FieldDescriptor.TYPE_INT64: NUMBERS | st.sampled_from([-(2**63), 2**63 - 1]),
    FieldDescriptor.TYPE_ENUM: st.sampled_from([1] * 6 + [2, 3, 0, -1, 99]),
}


@st.composite
def messages(draw: st.DrawFn, kind: Any, depth: int = 0) -> Any:
    """A message with any of its fields set to anything of their type."""
    message = kind()
    for field in kind.DESCRIPTOR.fields:
        if not _wanted(field) and draw(st.integers(0, 3 + depth)):
            continue
        count = draw(st.integers(0, 3)) if field.is_repeated else 1
        for _ in range(count):
            _put(draw, message, field, depth)
    return message


def _wanted(field: FieldDescriptor) -> bool:
    """Fields without which nearly every request is refused at the door."""
    return field.name in {
        "items", "inputs", "prompts", "prompt", "completion", "query", "ids", "text", "label_token_ids", "base",
    }  # fmt: skip


def _put(draw: st.DrawFn, message: Any, field: FieldDescriptor, depth: int) -> None:
    place = getattr(message, field.name)
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        if depth > 5:
            return
        made = draw(messages(type(_empty(place, field)), depth + 1))
        (place.append if field.is_repeated else place.CopyFrom)(made)
        return
    value = draw(SCALARS[field.type])
    if field.is_repeated:
        place.append(value)
    else:
        setattr(message, field.name, value)


def _empty(place: Any, field: FieldDescriptor) -> Message:
    if not field.is_repeated:
        single: Message = type(place)()
        return single
    made: Message = place.add()
    del place[-1]
    return made


@dataclass
class House:
    """One scorer for the whole module, and a loop to ask it in."""

    scorer: EngineScorer
    runner: asyncio.Runner

    def ask(self, message: Any) -> list[Any] | Problem:
        """All events of the answer, translated for the wire too; or the problem that refused it."""
        begun = time.monotonic()
        try:
            question = READERS[message.DESCRIPTOR.name](message)
            return self.runner.run(self._events(question))
        except Problem as problem:
            return problem
        finally:
            assert time.monotonic() - begun < SECONDS_EACH, "too slow"

    async def _events(self, question: Any) -> list[Any]:
        events = [event async for event in self.scorer.ask(question)]
        for event in events:
            translate(event).SerializeToString()
        return events


def translate(event: Any) -> Message:
    match event:
        case NextTokenAnswer():
            return answers_wire.next_token_to_pb(event)
        case ScoreAnswer():
            return answers_wire.score_to_pb(event)
        case TokenizeAnswer():
            return answers_wire.tokenize_to_pb(event)
        case PreflightAnswer():
            return answers_wire.preflight_to_pb(event)
    assert isinstance(event, StreamEvent)
    return events_wire.event_to_pb(event, 0)


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with asyncio.Runner() as runner:

        async def build() -> EngineScorer:
            return fake_scorer(fake_engine(step=64, positions=512))

        scorer = runner.run(build())
        yield House(scorer, runner)
        runner.run(scorer.close())


def outcome(answer: list[Any] | Problem) -> None:
    """An answer that ends as it should, or a problem that says why."""
    if isinstance(answer, Problem):
        assert answer.detail.message
        assert type(answer) is not Problem
    else:
        assert answer


@FUZZ
@given(data=st.data(), name=st.sampled_from(sorted(KINDS)))
def test_any_request_of_valid_structure_is_answered_or_refused(house: House, data: st.DataObject, name: str) -> None:
    outcome(house.ask(data.draw(messages(KINDS[name]))))


@FUZZ
@given(name=st.sampled_from(sorted(KINDS)), junk=st.binary(max_size=200))
def test_any_bytes_that_can_be_read_as_a_request_are_answered_or_refused(house: House, name: str, junk: bytes) -> None:
    try:
        message = KINDS[name].FromString(junk)
    except DecodeError:
        return
    outcome(house.ask(message))


@FUZZ
@given(data=st.data(), name=st.sampled_from(sorted(KINDS)))
def test_a_request_with_bytes_changed_on_the_way_is_answered_or_refused(
    house: House, data: st.DataObject, name: str
) -> None:
    wire_bytes = bytearray(data.draw(messages(KINDS[name])).SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        if wire_bytes:
            wire_bytes[data.draw(st.integers(0, len(wire_bytes) - 1))] = data.draw(st.integers(0, 255))
    try:
        message = KINDS[name].FromString(bytes(wire_bytes))
    except DecodeError:
        return
    outcome(house.ask(message))


def of_text(value: str) -> token_pb2.Input:
    return token_pb2.Input(text=value)


def of_ids(*values: int) -> token_pb2.Input:
    return token_pb2.Input(ids=token_pb2.TokenIds(ids=values))


NOTHING = of_ids()
LONG = "the quick brown fox " * 150
LABELS = token_pb2.TokenIds(ids=[1, 2])
EXTREMES: list[tuple[str, Callable[[], Message]]] = [
    ("very many empty inputs", lambda: pb.RollingLogprobRequest(inputs=[of_text("")] * 16_000)),
    ("very many inputs of nothing", lambda: pb.TokenizeRequest(inputs=[token_pb2.Input()] * 100_000)),
    ("very many prompts without tokens under very many variants",
     lambda: pb.NextTokenDistRequest(prompts=[NOTHING] * 1024, variants=[pb.Variant()] * 1024)),
    ("very many items without tokens under very many variants",
     lambda: pb.ScoreRequest(query=NOTHING, items=[NOTHING] * 1024, label_token_ids=LABELS,
                             variants=[pb.Variant()] * 1024)),
    ("very many bad items under very many variants",
     lambda: pb.LogprobRequest(items=[pb.LogprobItem(prompt=NOTHING, completion=NOTHING)] * 1024,
                               variants=[pb.Variant()] * 1024)),
    ("as many refused answers as are allowed",
     lambda: pb.NextTokenDistRequest(prompts=[NOTHING] * 1024, variants=[pb.Variant()] * 8)),
    ("a long query with very many items",
     lambda: pb.ScoreRequest(query=of_text(LONG * 20), items=[of_text("")] * 1000, label_token_ids=LABELS)),
    ("very many labels", lambda: pb.ScoreRequest(query=of_text("a"), items=[of_text("b")] * 1000,
                                                 label_token_ids=token_pb2.TokenIds(ids=range(500)))),
    ("very many views", lambda: pb.PreflightRequest(views=[view_pb2.View(base=view_pb2.BaseView())] * 10_000)),
    ("a stride of one over a long text",
     lambda: pb.RollingLogprobRequest(inputs=[of_text(LONG * 20)], max_tokens=512, stride=1)),
    ("windows of one input", lambda: pb.RollingLogprobRequest(inputs=[of_text(LONG)], max_tokens=1, stride=1)),
    ("every top there is", lambda: pb.RollingLogprobRequest(inputs=[of_text(LONG)], top_k=500)),
    ("an absurd top", lambda: pb.NextTokenDistRequest(prompts=[of_text("a")], top_k=2**31 - 1)),
    ("one very long word", lambda: pb.RollingLogprobRequest(inputs=[of_text("a" * 200_000)])),
    ("very many combining marks", lambda: pb.TokenizeRequest(inputs=[of_text("\u0301" * 60_000)])),
    ("very many joined emoji", lambda: pb.TokenizeRequest(inputs=[of_text("👩‍👩‍👧" * 10_000)])),
    ("very many ids", lambda: pb.RollingLogprobRequest(inputs=[of_ids(*[1] * 500_000)])),
    ("very many different ids below zero", lambda: pb.NextTokenDistRequest(extra_token_ids=range(-100_000, 0))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "build"), EXTREMES, ids=[name for name, _ in EXTREMES])
def test_an_extreme_request_is_answered_or_refused_soon_and_small(
    house: House, name: str, build: Callable[[], Message]
) -> None:
    message = build()
    tracemalloc.start()
    try:
        outcome(house.ask(message))
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MEGABYTES_EACH << 20, f"{name}: {peak >> 20} MiB"


def test_the_scorer_is_still_well_after_all_of_that(house: House) -> None:
    answer = house.ask(pb.NextTokenDistRequest(prompts=[of_text("still here")], top_k=1))
    assert isinstance(answer, list)
    assert house.scorer.scheduler.waiting_rows == 0


def test_a_crash_inside_would_be_caught(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(_message: Any) -> Any:
        raise KeyError("planted")

    monkeypatch.setitem(READERS, "TokenizeRequest", crash)
    with pytest.raises(KeyError, match="planted"):
        house.ask(pb.TokenizeRequest())
