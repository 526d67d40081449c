"""Who answers a side: a backend by its name or a stored run by its id, and nothing else that a caller may name.

It knows the book of backends and the store. It must not know what is asked, or how answers are compared.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from coordinator.backends import BackendBook
from coordinator.store import Store
from dualtrace.card import Card
from dualtrace.comparing.comparison import LiveSide
from dualtrace.library import RunRecord, SideSpec
from dualtrace.problems import FailedPrecondition, InvalidArgument, Problem, Reason, Unavailable
from dualtrace.questions.answers import AnswerEvent
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
    tape: Tape | None = None  # of a backend; None where raw bytes are not kept
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
        await store.get_run_text(name)


async def open_side(book: BackendBook, store: Store, spec: SideSpec, field: str, tape: Tape | None) -> OpenSide:
    kind, name = split_target(spec.target, f"{field}.target")
    if kind == "run":
        record = await store.get_run(name)
        stored = StoredScorer(record.run, spec.target, find_variant(record.run, spec, field))
        return OpenSide(spec, stored, record=record)
    try:
        client = book.scorer(name)
    except (Unavailable, FailedPrecondition) as problem:
        return OpenSide(spec, AbsentScorer(problem))
    return OpenSide(spec, client if tape is None else client.taped(tape), tape)


async def open_pair(
    book: BackendBook, store: Store, left: SideSpec, right: SideSpec, tape_bytes: int
) -> tuple[OpenSide, OpenSide]:
    """Two sides of one backend share a scorer, so that both variants go in one batch, and then a tape."""
    tapes = [Tape(tape_bytes) if tape_bytes else None for _ in range(2)]
    opened = await open_side(book, store, left, "left", tapes[0])
    if left.target == right.target and opened.record is None:
        return opened, replace(opened, spec=right)
    return opened, await open_side(book, store, right, "right", tapes[1])


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
