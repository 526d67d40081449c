"""Who answers a side: a backend by its name or a stored run by its id, and nothing else that a caller may name.

It knows the book of backends and the store. It must not know what is asked, or how answers are compared.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from coordinator.backends import BackendBook
from coordinator.recording import RawBytes
from coordinator.store import Store
from dualtrace.card import Card
from dualtrace.client import Client
from dualtrace.comparing.comparison import LiveSide
from dualtrace.json_text import FloatTexts
from dualtrace.library import RunRecord, SideSpec
from dualtrace.problems import FailedPrecondition, InvalidArgument, Problem, Reason, Unavailable
from dualtrace.questions.answers import AnswerEvent, TokenChunk
from dualtrace.questions.asked import Question, TokenizeQuestion, Variant
from dualtrace.records import to_json
from dualtrace.runs.run import Run
from dualtrace.runs.stored_scorer import StoredScorer
from dualtrace.scorer import Scorer
from dualtrace.tape import Tape

GRAMMAR = "backend:NAME, run:ID"
PLAIN = Variant()


@dataclass(frozen=True, eq=False)
class OpenSide:
    """A side that can be asked."""

    spec: SideSpec
    scorer: Scorer
    raw: RawBytes | None = None  # of a backend; None where they are not kept
    record: RunRecord | None = None  # of a stored run

    def live(self, timeout_seconds: float) -> LiveSide:
        return LiveSide(self.spec.target, self.scorer, self.spec.variant, timeout_seconds)


class AbsentScorer:
    """A backend that cannot be asked now: it says why, so that the other side's answer is kept."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    async def describe(self) -> Card:
        raise self._problem

    def ask(self, question: Question, *, deadline: float | None = None) -> AsyncIterator[AnswerEvent]:
        raise self._problem

    async def close(self) -> None:
        """Nothing is held."""


class TapedScorer:
    """A backend whose raw bytes are written away as soon as it has answered, and whose numbers are spelled before."""

    def __init__(self, client: Client, raw: RawBytes, texts: FloatTexts) -> None:
        self._client = client.taped(raw.tape)
        self._raw = raw
        self._texts = texts

    async def describe(self) -> Card:
        return await self._client.describe()

    async def ask(self, question: Question, *, deadline: float | None = None) -> AsyncGenerator[AnswerEvent, None]:
        asked: Any = self._client.ask(question, deadline=deadline)
        try:
            async with aclosing(asked) as told:
                async for event in told:
                    if isinstance(event, TokenChunk):
                        self._texts.learn(event.logprobs.tolist())
                    yield event
        finally:
            if not isinstance(question, TokenizeQuestion):  # that one only asks for the ids to ask with
                self._raw.begin()

    async def close(self) -> None:
        """The book closes its client."""


def split_target(target: str, field: str) -> tuple[str, str]:
    """Kind and name of a target. A coordinator opens no address and no folder that a caller names."""
    kind, colon, name = target.partition(":")
    if kind not in {"backend", "run"} or not colon or not name:
        message = f"target {target!r:.200} asked; a coordinator asks {GRAMMAR}: name what it knows"
        raise InvalidArgument(Reason.MALFORMED, message, field=field, allowed=GRAMMAR)
    return kind, name


async def check_side(book: BackendBook, store: Store, spec: SideSpec, field: str) -> None:
    """Refuse a side that nobody knows, before anything begins."""
    kind, name = split_target(spec.target, f"{field}.target")
    if kind == "backend":
        book.get(name)
    else:
        await store.require_run(name)


async def open_side(
    book: BackendBook, store: Store, spec: SideSpec, field: str, tape_bytes: int, texts: FloatTexts
) -> OpenSide:
    kind, name = split_target(spec.target, f"{field}.target")
    if kind == "run":
        record = await store.get_run(name)
        stored = StoredScorer(record.run, spec.target, find_variant(record.run, spec, field))
        return OpenSide(spec, stored, record=record)
    try:
        client = book.scorer(name)
    except (Unavailable, FailedPrecondition) as problem:
        return OpenSide(spec, AbsentScorer(problem))
    if not tape_bytes:
        return OpenSide(spec, client)
    raw = RawBytes(store.artifacts, Tape(tape_bytes))
    return OpenSide(spec, TapedScorer(client, raw, texts), raw)


async def open_pair(
    book: BackendBook, store: Store, left: SideSpec, right: SideSpec, tape_bytes: int, texts: FloatTexts
) -> tuple[OpenSide, OpenSide]:
    """Two sides of one backend share a scorer, so that both variants go in one batch, and then a tape."""
    opened = await open_side(book, store, left, "left", tape_bytes, texts)
    if left.target == right.target and opened.record is None:
        return opened, replace(opened, spec=right)
    return opened, await open_side(book, store, right, "right", tape_bytes, texts)


def find_variant(run: Run, spec: SideSpec, field: str) -> int | None:
    """Which of a run's variants a side means; None where it has one and none is named."""
    if isinstance(run.question, TokenizeQuestion):
        return None
    variants = run.question.variants
    if len(variants) == 1 and spec.variant == PLAIN:
        return 0
    wanted = to_json(spec.variant)
    found = next((index for index, one in enumerate(variants) if to_json(one) == wanted), None)
    if found is None:
        message = f"{spec.target} has no such view and mask among its {len(variants)}; name one that it was asked under"
        raise InvalidArgument(Reason.NOT_FOUND, message, field=f"{field}.variant")
    return found


def replay_variant(side: OpenSide, other: OpenSide) -> OpenSide:
    """A stored run is replayed as it was asked: a live side that names no face or mask takes the run's."""
    if side.record is not None or side.spec.variant != PLAIN or not isinstance(other.scorer, StoredScorer):
        return side
    return replace(side, spec=replace(side.spec, variant=other.scorer.question.variants[0]))
