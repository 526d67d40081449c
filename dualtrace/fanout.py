"""One question to N Scorers at once: deadlines, cancellation, partial failure. Each side ends for itself.

It knows Scorers and time. It must not know what is compared, targets or the wire.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from dualtrace.problems import Cancelled, DeadlineExceeded, Internal, Problem, Reason
from dualtrace.questions.answers import AnswerEvent, AnswerSummary
from dualtrace.questions.asked import Question, StreamQuestion
from dualtrace.scorer import Scorer

log = logging.getLogger(__name__)

GRACE_SECONDS = 0.25
"""A scorer's own deadline speaks first, because it knows more; one that does not keep it is left so much later."""


@dataclass(frozen=True, eq=False)
class Asked:
    """One side: whom, what, and until when."""

    scorer: Scorer
    question: Question
    deadline: float | None = None  # on the clock of time.monotonic; None waits for ever
    name: str = ""  # of the side, for messages


@dataclass(frozen=True, eq=False)
class SideEvent:
    index: int
    event: AnswerEvent


@dataclass(frozen=True, eq=False)
class SideEnded:
    """The last word of a side; it comes once for each, whatever happens."""

    index: int
    problem: Problem | None  # None: the answer is complete
    seconds: float  # from the asking to the last event, without the time that our own reader took


Told = SideEvent | SideEnded


async def fan_out(asked: Sequence[Asked], *, buffer_events: int = 64) -> AsyncGenerator[Told, None]:
    """What all sides tell, in the order of arrival. Leaving the iterator leaves every side.

    Each side has a buffer of its own, so that a fast one neither fills the memory of a slow reader nor takes the room
    of a slow side.
    """
    inbox: asyncio.Queue[Told] = asyncio.Queue()  # bounded by the sides' rooms
    rooms = [asyncio.Semaphore(buffer_events) for _ in asked]
    pumps = [asyncio.create_task(_pump(index, one, rooms[index], inbox)) for index, one in enumerate(asked)]
    open_sides = len(asked)
    try:
        while open_sides:
            told = await inbox.get()
            if isinstance(told, SideEnded):
                open_sides -= 1
            else:
                rooms[told.index].release()
            yield told
    finally:
        for pump in pumps:
            pump.cancel()
            asyncio.get_running_loop().call_later(GRACE_SECONDS, pump.cancel)  # harmless where it has ended by then
        # Shielded: whoever leaves twice must not break off what the sides do to end their calls.
        await asyncio.shield(asyncio.gather(*pumps, return_exceptions=True))


async def _pump(index: int, asked: Asked, room: asyncio.Semaphore, inbox: asyncio.Queue[Told]) -> None:
    """Ask one side to its end and say how it ended; only our own cancellation goes unsaid."""
    begun, clock = time.monotonic(), _Clock()
    problem: Problem | None = None
    try:
        # The second cancels what a scorer still does about the first.
        async with asyncio.timeout_at(None) as last, asyncio.timeout_at(None) as first:
            clock.guard = _Guard(asked.deadline, first, last)
            await _read(index, asked, room, inbox, clock)
    except Problem as error:
        problem = _blame_reader(name_deadline(error, asked.name), asked, clock)
    except asyncio.CancelledError:
        if is_cancelled():
            raise
        problem = Cancelled(Reason.CANCELLED, f"{asked.name or 'the scorer'} ended the call of its own accord")
    except Exception as error:  # noqa: BLE001 - a bug of this side must not take the other one with it
        problem = _too_late(asked, begun) if _is_too_late(asked, error) else tell_bug(error, asked.name)
    inbox.put_nowait(SideEnded(index, problem, time.monotonic() - begun - clock.blocked_seconds))


class _Guard:
    """Leaves a side that does not keep its deadline, and some time later whatever it still does."""

    def __init__(self, deadline: float | None, first: asyncio.Timeout, last: asyncio.Timeout) -> None:
        self._deadline = deadline
        self._limits = {first: GRACE_SECONDS, last: 2 * GRACE_SECONDS}
        self.watch(0.0)

    def watch(self, blocked_seconds: float) -> None:
        """`blocked_seconds` were our own reader's, and are not the side's."""
        if self._deadline is None:
            return
        left = max(0.0, self._deadline + blocked_seconds - time.monotonic())
        for limit, grace in self._limits.items():
            if not limit.expired():
                limit.reschedule(asyncio.get_running_loop().time() + left + grace)

    def rest(self) -> None:
        for limit in self._limits:
            if not limit.expired():
                limit.reschedule(None)


@dataclass
class _Clock:
    blocked_seconds: float = 0.0  # spent waiting for our own reader
    guard: _Guard | None = None

    async def wait_for(self, room: asyncio.Semaphore) -> None:
        """Wait until our reader has room. Its time is not the side's, so the guard rests."""
        if not room.locked():
            await room.acquire()
            return
        assert self.guard is not None
        begun = time.monotonic()
        self.guard.rest()
        await room.acquire()
        self.blocked_seconds += time.monotonic() - begun
        self.guard.watch(self.blocked_seconds)


async def _read(index: int, asked: Asked, room: asyncio.Semaphore, inbox: asyncio.Queue[Told], clock: _Clock) -> None:
    events = asked.scorer.ask(asked.question, deadline=asked.deadline)
    ended = False
    try:
        async for event in events:
            await clock.wait_for(room)
            inbox.put_nowait(SideEvent(index, event))
            ended = isinstance(event, AnswerSummary) or not isinstance(asked.question, StreamQuestion)
    finally:
        # An iterator that is only dropped ends when the garbage collector comes; the engine's queue must hear now.
        close = getattr(events, "aclose", None)
        if close is not None:
            with suppress(TimeoutError):  # one that does not end is left to itself
                async with asyncio.timeout(GRACE_SECONDS):
                    await close()
    if not ended:
        what = "its Summary" if isinstance(asked.question, StreamQuestion) else "an answer"
        raise Internal(Reason.INCOMPLETE_STREAM, f"{asked.name or 'the scorer'} ended without {what}")


def _blame_reader(problem: Problem, asked: Asked, clock: _Clock) -> Problem:
    """A side that was late only because our own reader held it up says so."""
    blocked = clock.blocked_seconds
    if not isinstance(problem, DeadlineExceeded) or asked.deadline is None:
        return problem
    if time.monotonic() - blocked >= asked.deadline:
        return problem
    named = problem.at()
    why = f"{blocked:.3g} s of it went by while its answer waited to be read: read faster, or allow more time"
    named.detail = replace(problem.detail, message=f"{problem.detail.message}; {why}")
    return named


def name_deadline(problem: Problem, name: str) -> Problem:
    """A deadline of one side among several says whose it is."""
    if not name or not isinstance(problem, DeadlineExceeded) or name in problem.detail.message:
        return problem
    named = problem.at()
    named.detail = replace(problem.detail, message=f"{name}: {problem.detail.message}")
    return named


def tell_bug(error: Exception, name: str) -> Internal:
    """Whatever is no Problem is nobody's answer. What it says may name files and values that are no caller's."""
    log.error("a bug while %s was asked", name or "a side", exc_info=error)
    kind = type(error).__name__
    return Internal(Reason.BUG, f"a bug while {name or 'a side'} was asked: {kind}; the log has the details")


def _is_too_late(asked: Asked, error: Exception) -> bool:
    return isinstance(error, TimeoutError) and asked.deadline is not None and time.monotonic() >= asked.deadline


def _too_late(asked: Asked, begun: float) -> DeadlineExceeded:
    assert asked.deadline is not None
    allowed = max(0.0, asked.deadline - begun)
    message = f"{asked.name or 'the scorer'} did not answer within {allowed:.3g} s; allow more time"
    return DeadlineExceeded(Reason.DEADLINE, message)


def is_cancelled() -> bool:
    """Whether somebody cancelled this very task, rather than the scorer raising CancelledError of its own."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
