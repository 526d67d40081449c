"""One call in the queue, from two sides: the engine thread writes a Call, the caller's event loop reads a Ticket.

No lock is shared between the two sides: each field has one writer, and deliveries cross by call_soon_threadsafe.
It must not know batching, engines' insides or questions.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dualtrace.engine import Readout
from dualtrace.problems import Cancelled, DeadlineExceeded, Problem, Reason
from dualtrace.rows import Row, work_in, work_of


@dataclass(frozen=True, eq=False)
class Delivery:
    """Something about one row of a call: a readout, or the problem that ended it."""

    row: int
    readout: Readout | None
    finished: bool
    problem: Problem | None = None

    def nbytes(self) -> int:
        if self.readout is None:
            return 0
        r = self.readout
        columns = (r.logprobs, r.ranks, r.ties, r.top_ids, r.top_logprobs, r.extra_logprobs, r.tail_logprobs)
        return r.rows.nbytes + sum(column.nbytes for column in columns if column is not None)


class Call:
    """Rows that one caller asked for."""

    def __init__(
        self, rows: Sequence[Row], *, deadline: float | None, deterministic: bool, dropped: Callable[[Call], None]
    ) -> None:
        self.rows = rows
        self.deadline = deadline
        self.deterministic = deterministic
        # Guarded by the scheduler's lock.
        self.waiting: deque[int] = deque(range(len(rows)))
        self.waiting_tokens = sum(row.length for row in rows)
        self.alone: set[int] = set()  # rows that get a batch of their own
        # Written by the engine thread only.
        self.queue_seconds = 0.0
        self.compute_seconds = 0.0
        self.computed_tokens = 0
        self.shared_tokens = 0
        self.step_tokens = 0
        self.batches = 0
        self.buckets: set[str] = set()
        self.padded_tokens = 0
        self._left = [work_of(row) for row in rows]  # per row: rows still to be read and to be counted
        self._produced_bytes = 0
        # Written by the event loop only.
        self.consumed_bytes = 0
        self.inbox: deque[Delivery] = deque()
        self.arrived = asyncio.Event()
        self._submitted = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._dropped = dropped
        # Written once, by whoever is first.
        self._failure: Problem | None = None

    # --- either side

    @property
    def failure(self) -> Problem | None:
        return self._failure

    @property
    def gone_reason(self) -> str:
        return self._failure.reason.lower() if self._failure else ""

    def is_gone(self) -> bool:
        """Nobody wants this call any more. Notices a deadline that has passed."""
        if self._failure is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.fail(DeadlineExceeded(Reason.DEADLINE, "the deadline passed before the answer was complete"))
        return self._failure is not None

    def fail(self, problem: Problem) -> None:
        if self._failure is None:
            self._failure = problem
            self._wake()

    def cancel(self) -> None:
        """The caller leaves."""
        if self._failure is None:
            self._failure = Cancelled(Reason.CANCELLED, "the caller left")
        self._dropped(self)

    # --- the engine thread

    def leave_queue(self, row: int) -> None:
        self.waiting.remove(row)
        self.waiting_tokens -= self.rows[row].length

    def rejoin_queue(self, row: int) -> None:
        self.waiting.append(row)
        self.waiting_tokens += self.rows[row].length
        self.alone.add(row)

    def enter_batch(self) -> None:
        self.queue_seconds = max(self.queue_seconds, time.monotonic() - self._submitted)
        self.batches += 1

    def note_read(self, row: int, readout: Readout) -> bool:
        """Count what was read; True when the row is complete."""
        self._left[row] -= work_in(readout)
        return self._left[row] == 0

    def is_open(self, row: int) -> bool:
        return self._left[row] > 0

    def is_untouched(self, row: int) -> bool:
        return self._left[row] == work_of(self.rows[row]) and row not in self.alone

    @property
    def buffered_bytes(self) -> int:
        return self._produced_bytes - self.consumed_bytes

    def hand_over(self, deliveries: list[Delivery]) -> None:
        self._produced_bytes += sum(delivery.nbytes() for delivery in deliveries)
        for delivery in deliveries:
            if delivery.problem is not None:
                self._left[delivery.row] = 0
        self._in_loop(self._receive, deliveries)

    def _wake(self) -> None:
        self._in_loop(self._receive, [])

    def _in_loop(self, function: Callable[[list[Delivery]], None], deliveries: list[Delivery]) -> None:
        try:
            self._loop.call_soon_threadsafe(function, deliveries)
        except RuntimeError:  # the loop is closed: its caller is gone
            self._failure = self._failure or Cancelled(Reason.CANCELLED, "the caller's event loop has ended")

    # --- the event loop

    def _receive(self, deliveries: list[Delivery]) -> None:
        self.inbox.extend(deliveries)
        self.arrived.set()


class Ticket:
    """The caller's end of a call."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._open_rows = sum(1 for row in call.rows if work_of(row))

    @property
    def is_done(self) -> bool:
        return self._open_rows == 0

    @property
    def stats(self) -> Call:
        return self._call

    async def take(self, at_most_seconds: float | None = None) -> list[Delivery]:
        """What has arrived: a delivery or more, or [] when the time is over. Raises when the call failed."""
        call = self._call
        if not call.inbox and not call.is_gone() and not self.is_done:
            wait = at_most_seconds
            if call.deadline is not None:
                left = max(0.0, call.deadline - time.monotonic()) + 0.001
                wait = left if wait is None else min(wait, left)
            await _wait(call.arrived, wait)
        if call.is_gone():
            assert call.failure is not None
            raise call.failure
        call.arrived.clear()
        taken = list(call.inbox)
        call.inbox.clear()
        call.consumed_bytes += sum(delivery.nbytes() for delivery in taken)
        self._open_rows -= sum(1 for delivery in taken if delivery.finished)
        return taken

    def cancel(self) -> None:
        """Leave; harmless when the call is complete."""
        if not self.is_done:
            self._call.cancel()


async def _wait(event: asyncio.Event, seconds: float | None) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
