"""Views as blocks of code: inside `with model.as_finetuned("x") as tuned:` every question is asked of that face.

One view of a model is open at a time, and a view ends with its block; what is asked against either rule is refused. So
no line of a notebook can quietly be answered by weights that its reader does not think of. It knows views and
questions. It must not know the wire, or how a view is worn.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from enum import Enum
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from dualtrace.problems import FailedPrecondition, InvalidArgument, Reason
from dualtrace.questions.answers import AnswerEvent, NextTokenAnswer, PreflightAnswer, ScoreAnswer, StreamEvent
from dualtrace.questions.asked import (
    ForwardQuestion,
    LogprobQuestion,
    MaskedForwardQuestion,
    NextTokenQuestion,
    PreflightQuestion,
    RollingQuestion,
    ScoreQuestion,
    StreamQuestion,
)
from dualtrace.scorer import Scorer, ask_one
from dualtrace.views import BASE, DEFAULT_INIT_SCALE, DEFAULT_RANK_SCALE, Noise, View, finetuned, null, scaled

Q = TypeVar("Q", bound=ForwardQuestion)
V = TypeVar("V", bound="OpenableView")
Event = TypeVar("Event", bound=AnswerEvent)


class Doorway:
    """Which view of a model is open; at most one. Thread-safe."""

    def __init__(self) -> None:
        self._open: View | None = None
        self._lock = threading.Lock()

    def enter(self, view: View) -> None:
        with self._lock:
            if self._open is not None:
                message = f"view {view} was entered while {self._open} is open; leave that block first"
                raise FailedPrecondition(Reason.CONFLICT, message, field="view")
            self._open = view

    def leave(self) -> None:
        with self._lock:
            self._open = None


class _State(Enum):
    NEW = "has not been entered yet; ask inside its block"
    OPEN = "is open"
    ENDED = "has ended with its block; enter a new one"


class OpenableView:
    """One block's view: entered once, used inside the block, of no use after it."""

    def __init__(self, door: Doorway, view: View) -> None:
        self.view = view
        self._door = door
        self._state = _State.NEW

    def __repr__(self) -> str:
        return f"<view {self.view}: {self._state.name.lower()}>"

    def _enter(self) -> None:
        if self._state is not _State.NEW:
            message = f"view {self.view} was entered before; make a new one for each block"
            raise FailedPrecondition(Reason.CONFLICT, message, field="view")
        self._door.enter(self.view)
        self._state = _State.OPEN

    def _leave(self) -> None:
        self._state = _State.ENDED
        self._door.leave()

    def _require_open(self) -> None:
        if self._state is not _State.OPEN:
            raise FailedPrecondition(Reason.NOT_READY, f"view {self.view} {self._state.value}", field="view")

    def _worn(self, question: Q) -> Q:
        """The question with this view in each of its variants; one that names a view of its own is refused."""
        self._require_open()
        for index, variant in enumerate(question.variants):
            if variant.view not in {BASE, self.view}:
                message = f"the question asks for view {variant.view} inside the block of {self.view}; leave it out"
                raise InvalidArgument(Reason.CONFLICT, message, field=f"variants[{index}].view")
        return replace(question, variants=tuple(replace(variant, view=self.view) for variant in question.variants))


class AsyncView(OpenableView):
    """A view of a Scorer, for `async with`."""

    def __init__(self, scorer: Scorer, door: Doorway, view: View) -> None:
        super().__init__(door, view)
        self._scorer = scorer

    async def __aenter__(self) -> Self:
        self._enter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def ask(self, question: ForwardQuestion, *, deadline: float | None = None) -> AsyncIterator[AnswerEvent]:
        return self._watched(self._scorer.ask(self._worn(question), deadline=deadline))

    def logprob(self, question: LogprobQuestion, *, deadline: float | None = None) -> AsyncIterator[StreamEvent]:
        return self._stream(question, deadline)

    def rolling(self, question: RollingQuestion, *, deadline: float | None = None) -> AsyncIterator[StreamEvent]:
        return self._stream(question, deadline)

    def masked_forward(
        self, question: MaskedForwardQuestion, *, deadline: float | None = None
    ) -> AsyncIterator[StreamEvent]:
        return self._stream(question, deadline)

    async def next_token(self, question: NextTokenQuestion, *, deadline: float | None = None) -> NextTokenAnswer:
        return await ask_one(self._scorer, self._worn(question), deadline=deadline)

    async def score(self, question: ScoreQuestion, *, deadline: float | None = None) -> ScoreAnswer:
        return await ask_one(self._scorer, self._worn(question), deadline=deadline)

    async def preflight(self, *, deadline: float | None = None) -> PreflightAnswer:
        self._require_open()
        return await ask_one(self._scorer, PreflightQuestion((self.view,)), deadline=deadline)

    def _stream(self, question: StreamQuestion, deadline: float | None) -> AsyncIterator[StreamEvent]:
        events = self._scorer.ask(self._worn(question), deadline=deadline)
        return self._watched(events)  # type: ignore[arg-type]  # a streamed question has streamed events only

    async def _watched(self, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
        try:
            async for event in events:
                self._require_open()
                yield event
        finally:
            if (close := getattr(events, "aclose", None)) is not None:
                await close()


class BlockingAsker(Protocol):
    """The part of `BlockingClient` that a view needs."""

    def logprob(self, question: LogprobQuestion, *, timeout: float | None = None) -> Iterator[StreamEvent]: ...

    def rolling(self, question: RollingQuestion, *, timeout: float | None = None) -> Iterator[StreamEvent]: ...

    def masked_forward(
        self, question: MaskedForwardQuestion, *, timeout: float | None = None
    ) -> Iterator[StreamEvent]: ...

    def next_token(self, question: NextTokenQuestion, *, timeout: float | None = None) -> NextTokenAnswer: ...

    def score(self, question: ScoreQuestion, *, timeout: float | None = None) -> ScoreAnswer: ...

    def preflight(
        self, question: PreflightQuestion | None = None, *, timeout: float | None = None
    ) -> PreflightAnswer: ...


class BlockingView(OpenableView):
    """A view of a blocking client, for `with`."""

    def __init__(self, asker: BlockingAsker, door: Doorway, view: View) -> None:
        super().__init__(door, view)
        self._asker = asker

    def __enter__(self) -> Self:
        self._enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def logprob(self, question: LogprobQuestion, *, timeout: float | None = None) -> Iterator[StreamEvent]:
        return self._watched(self._asker.logprob(self._worn(question), timeout=timeout))

    def rolling(self, question: RollingQuestion, *, timeout: float | None = None) -> Iterator[StreamEvent]:
        return self._watched(self._asker.rolling(self._worn(question), timeout=timeout))

    def masked_forward(self, question: MaskedForwardQuestion, *, timeout: float | None = None) -> Iterator[StreamEvent]:
        return self._watched(self._asker.masked_forward(self._worn(question), timeout=timeout))

    def next_token(self, question: NextTokenQuestion, *, timeout: float | None = None) -> NextTokenAnswer:
        return self._asker.next_token(self._worn(question), timeout=timeout)

    def score(self, question: ScoreQuestion, *, timeout: float | None = None) -> ScoreAnswer:
        return self._asker.score(self._worn(question), timeout=timeout)

    def preflight(self, *, timeout: float | None = None) -> PreflightAnswer:
        self._require_open()
        return self._asker.preflight(PreflightQuestion((self.view,)), timeout=timeout)

    def _watched(self, events: Iterator[StreamEvent]) -> Iterator[StreamEvent]:
        try:
            for event in events:
                self._require_open()
                yield event
        finally:
            if (close := getattr(events, "close", None)) is not None:
                close()


class Model(Generic[V]):
    """A model by its views. Each `as_...` gives a view to be entered, once."""

    def __init__(self, make: Callable[[Doorway, View], V]) -> None:
        self._door = Doorway()
        self._make = make

    def as_base(self) -> V:
        return self._make(self._door, BASE)

    def as_finetuned(self, adapter: str) -> V:
        return self._make(self._door, finetuned(adapter))

    def as_scaled(self, adapter: str, strength: float) -> V:
        """The adapter's delta times `strength`: 0 is the base exactly, 1 is finetuned, 1.25 overshoots."""
        return self._make(self._door, scaled(adapter, strength))

    def as_null(
        self,
        adapter: str,
        seed: int,
        *,
        init_scale: float = DEFAULT_INIT_SCALE,
        rank_scale: float = DEFAULT_RANK_SCALE,
        variance_faithful: bool = False,
    ) -> V:
        """The adapter's factors replaced by noise of this seed."""
        return self._make(self._door, null(adapter, Noise(seed, init_scale, rank_scale, variance_faithful)))
