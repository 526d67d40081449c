"""The queue in front of an engine, and the one thread that steps it.

Rows of many calls wait here; the thread takes as many as the token budget holds, runs them as one batch and hands
each readout to the call it belongs to. Between steps it drops what nobody wants any more and lets a small batch
pass a long one. A batch for which the engine must compile stands aside until that is done. It must not know
questions, text or the wire, and it never waits for a reader: a call that reads too slowly is ended.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from dualtrace.batching import Layout, fill, lay_out
from dualtrace.calls import Call, Delivery, Ticket
from dualtrace.engine import Engine, Preparation, Preparing, Readout, Step
from dualtrace.metrics import Metrics
from dualtrace.preparing import Preparer
from dualtrace.problems import Exhausted, Internal, Problem, Reason, Unavailable
from dualtrace.rows import Row

MAX_PASSES = 4
"""So many batches may be led by small calls while a big one waits; then the big one leads."""


@dataclass(frozen=True)
class SchedulerLimits:
    batch_tokens: int = 4096  # unique tokens of one batch
    pass_tokens: int = 512  # a call with no more tokens than this is small: it may pass a long batch
    queue_calls: int = 256  # calls that may wait; one more is refused
    buffer_bytes: int = 64 << 20  # answers held for one slow reader before it is ended


@dataclass(frozen=True)
class _Picked:
    call: Call
    row: int


@dataclass(eq=False)
class _Planned:
    """A batch and whose rows it holds."""

    picked: Sequence[_Picked]
    layout: Layout
    problem: Exception | None = None  # what went wrong when it was made ready

    @cached_property
    def calls(self) -> list[Call]:
        return list(dict.fromkeys(one.call for one in self.picked))

    def is_wanted(self) -> bool:
        return any(not call.is_gone() for call in self.calls)

    @property
    def tokens(self) -> int:
        return sum(segment.ids.size for segment in self.layout.batch.segments)


class Scheduler:
    """Owns the engine's calling thread from `start` to `close`."""

    def __init__(self, engine: Engine, limits: SchedulerLimits, metrics: Metrics) -> None:
        self._engine = engine
        self._preparing = engine if isinstance(engine, Preparing) else None
        self._limits = limits
        self._metrics = metrics
        self._share = engine.card.capabilities.shares_prefixes
        self._changed = threading.Condition()
        self._preparer = Preparer(metrics)
        self._calls: list[Call] = []  # calls with rows still waiting, in order of arrival
        self._aside: list[_Planned] = []  # batches that are being made ready
        self._prepared: list[_Planned] = []  # those that are ready, and run before any other
        self._passes = 0
        self._closing = False
        metrics.waiting_calls.set_function(lambda: self.waiting_calls)
        self._thread = threading.Thread(target=self._work, name="dualtrace-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def waiting_rows(self) -> int:
        with self._changed:
            return sum(len(call.waiting) for call in self._calls)

    @property
    def waiting_calls(self) -> int:
        """Calls of which something has not begun to run: in the queue, or aside while an engine compiles for them."""
        with self._changed:
            aside = (call for planned in (*self._aside, *self._prepared) for call in planned.calls)
            return sum(not call.is_gone() for call in {*self._calls, *aside})

    def submit(self, rows: Sequence[Row], *, deadline: float | None = None, deterministic: bool = False) -> Ticket:
        """Queue rows; must be called from a running event loop. `deadline` is on the clock of time.monotonic."""
        call = Call(rows, deadline=deadline, deterministic=deterministic, dropped=self._forget)
        with self._changed:
            if self._closing:
                raise Unavailable(Reason.DRAINING, "the engine is shutting down; ask elsewhere or later")
            limit = self._limits.queue_calls
            if self.waiting_calls >= limit:
                raise Exhausted(Reason.QUEUE_FULL, f"{limit} calls are waiting, the most allowed; retry later")
            if len(self._calls) >= limit:
                self._drop_expired()  # they no longer count, and must not pile up behind a slow step either
            if rows:
                self._calls.append(call)
            self._changed.notify()
        return Ticket(call)

    def close(self) -> None:
        """Fail what waits, let the running step end, stop the thread."""
        with self._changed:
            self._closing = True
            waiting, self._calls = self._calls, []
            waiting += [call for planned in (*self._aside, *self._prepared) for call in planned.calls]
            self._changed.notify()
        for call in waiting:
            call.fail(Unavailable(Reason.DRAINING, "the sidecar is shutting down; ask elsewhere"))
        if self._thread.is_alive():
            self._thread.join()
        self._preparer.close()

    def _forget(self, call: Call) -> None:
        """A caller left: its waiting rows go at once, not when the thread comes round to them."""
        with self._changed:
            if call in self._calls:
                self._calls.remove(call)
            self._metrics.dropped_segments.labels(reason="cancelled").inc(len(call.waiting))
            call.waiting.clear()

    # --- the engine thread from here on

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._calls and not self._prepared and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
            planned = self._next(small_only=False)
            if planned is not None:
                self._run(planned, may_be_passed=True)

    def _next(self, *, small_only: bool) -> _Planned | None:
        """A batch that is ready, or None. One that is not is put aside: it comes back when it is."""
        with self._changed:
            self._drop_unwanted()
            for index, planned in enumerate(self._prepared):
                if not small_only or planned.tokens <= self._limits.pass_tokens:
                    return self._prepared.pop(index)
        picked = self._take(small_only=small_only) if self._calls else []
        if not picked:
            return None
        rows = [one.call.rows[one.row] for one in picked]
        planned = _Planned(picked, lay_out(rows, share=self._share, deterministic=picked[0].call.deterministic))
        missing = self._list_missing(planned)
        if not missing:
            return planned
        with self._changed:
            self._aside.append(planned)
        self._preparer.start(missing, planned.is_wanted, lambda problem: self._come_back(planned, problem))
        return None

    def _list_missing(self, planned: _Planned) -> Sequence[Preparation]:
        if self._preparing is None:
            return ()
        try:
            return self._preparing.list_missing(planned.layout.batch, planned.layout.reads)
        except Exception as error:  # noqa: BLE001 - the batch fails as if its forward had
            planned.problem = error
            return ()

    def _come_back(self, planned: _Planned, problem: Exception | None) -> None:
        """Called by the thread that made the batch ready."""
        planned.problem = problem
        with self._changed:
            self._aside.remove(planned)
            self._prepared.append(planned)
            self._changed.notify()

    def _drop_unwanted(self) -> None:
        """Batches whose callers all left while they were made ready."""
        for planned in [one for one in self._prepared if not one.is_wanted()]:
            self._prepared.remove(planned)
            for one in planned.picked:
                self._metrics.dropped_segments.labels(reason=one.call.gone_reason).inc()

    def _take(self, *, small_only: bool) -> list[_Picked]:
        """Choose the next batch and remove its rows from the queue."""
        with self._changed:
            self._drop_expired()
            order = self._order(small_only)
            if not order:
                return []
            lead = order[0]
            if lead.waiting[0] in lead.alone:
                candidates = [_Picked(lead, lead.waiting[0])]
            else:
                candidates = list(self._candidates(order, lead.deterministic))
            budget = self._limits.pass_tokens if small_only else self._limits.batch_tokens
            share = self._share and not lead.deterministic
            count = fill((picked.call.rows[picked.row] for picked in candidates), budget, share=share)
            picked = candidates[:count]
            for one in picked:
                one.call.leave_queue(one.row)
            self._calls = [call for call in self._calls if call.waiting]
            return picked

    def _drop_expired(self) -> None:
        for call in list(self._calls):
            if call.is_gone():
                self._calls.remove(call)
                self._metrics.dropped_segments.labels(reason=call.gone_reason).inc(len(call.waiting))
                call.waiting.clear()

    def _order(self, small_only: bool) -> list[Call]:
        small = [call for call in self._calls if call.waiting_tokens <= self._limits.pass_tokens]
        if small_only:
            return small
        big = [call for call in self._calls if call.waiting_tokens > self._limits.pass_tokens]
        if small and big:
            self._passes += 1
            if self._passes > MAX_PASSES:
                self._passes = 0
                return big + small
        return small + big

    def _candidates(self, order: Sequence[Call], deterministic: bool) -> Iterator[_Picked]:
        """Rows in order, lazily bounded: no batch can hold more rows than it has tokens."""
        rows = (
            _Picked(call, row)
            for call in order
            if call.deterministic == deterministic
            for row in call.waiting
            if row not in call.alone
        )
        return itertools.islice(rows, self._limits.batch_tokens)

    def _run(self, planned: _Planned, *, may_be_passed: bool) -> None:
        picked, layout = planned.picked, planned.layout
        for call in planned.calls:
            call.enter_batch()
            self._metrics.queue_seconds.observe(call.queue_seconds)
        for one, shared in zip(picked, layout.shared_tokens, strict=True):
            one.call.shared_tokens += shared
            self._metrics.shared_tokens.inc(shared)
        self._metrics.batch_rows.observe(len(picked))
        self._metrics.batch_tokens.observe(planned.tokens)
        try:
            if planned.problem is not None:
                raise planned.problem
            for step in self._steps(planned):
                self._deliver(step, layout, picked)
                if may_be_passed:
                    self._let_pass()
            self._check_complete(picked)
        except Problem as problem:
            self._fail_batch(picked, problem)
        except MemoryError:
            self._fail_batch(picked, Exhausted(Reason.OUT_OF_MEMORY, "the engine ran out of memory; send less at once"))
        except Exception as error:  # noqa: BLE001 - whatever an engine throws must not kill the thread
            message = f"the engine failed: {type(error).__name__}: {error}"
            self._fail_batch(picked, Internal(Reason.ENGINE_FAILED, message))

    def _steps(self, planned: _Planned) -> Iterator[Step]:
        """The engine's steps, timed, until it is done or nobody wants the batch any more."""
        layout, calls = planned.layout, planned.calls
        live = self._liveness(layout, planned.picked)
        forward = self._engine.forward(layout.batch, layout.reads, live)
        try:
            while not all(call.is_gone() for call in calls):
                begun = time.perf_counter()
                step = next(forward, None)
                seconds = time.perf_counter() - begun
                for call in calls:
                    call.compute_seconds += seconds
                if step is None:
                    return
                self._metrics.step_seconds.observe(seconds)
                yield step
        finally:
            close = getattr(forward, "close", None)
            if close is not None:
                close()

    def _liveness(self, layout: Layout, picked: Sequence[_Picked]) -> Callable[[int], bool]:
        def live(segment: int) -> bool:
            return any(not picked[user].call.is_gone() for user in layout.wanted_by[segment])

        return live

    def _let_pass(self) -> None:
        if self._closing:
            return
        small = self._next(small_only=True)
        if small is not None:
            self._run(small, may_be_passed=False)

    def _deliver(self, step: Step, layout: Layout, picked: Sequence[_Picked]) -> None:
        inboxes: dict[Call, list[Delivery]] = {}
        for readout in step:
            self._metrics.computed_tokens.inc(readout.computed_tokens)
            self._metrics.padded_tokens.inc(readout.padded_tokens)
            row = layout.row_of_segment[readout.segment]
            if readout.bucket:
                for user in layout.wanted_by[readout.segment]:
                    picked[user].call.buckets.add(readout.bucket)
            payer = picked[layout.wanted_by[readout.segment][0] if row is None else row].call
            payer.computed_tokens += readout.computed_tokens
            payer.padded_tokens += readout.padded_tokens
            if row is not None:
                payer.step_tokens = max(payer.step_tokens, _partial_tokens(readout, payer.rows[picked[row].row]))
            # A prefix's mask counts are part of the receipt of every row that stands on it.
            receivers = (row,) if row is not None else layout.children[readout.segment]
            for receiver in receivers:
                one = picked[receiver]
                if not one.call.is_gone() and (readout.rows.size or readout.counts is not None):
                    finished = one.call.note_read(one.row, readout)
                    inboxes.setdefault(one.call, []).append(Delivery(one.row, readout, finished=finished))
        for call, deliveries in inboxes.items():
            # Judged by what was there before: one large step must not end a reader that has kept up.
            is_slow = call.buffered_bytes > self._limits.buffer_bytes
            call.hand_over(deliveries)
            if is_slow:
                self._metrics.slow_readers.inc()
                call.fail(Exhausted(Reason.SLOW_READER, "answers were read too slowly; read faster or ask for less"))

    def _check_complete(self, picked: Sequence[_Picked]) -> None:
        for one in picked:
            if not one.call.is_open(one.row):
                continue
            if not one.call.is_gone():
                raise Internal(Reason.ENGINE_FAILED, "the engine ended without reading all rows it was asked")
            self._metrics.dropped_segments.labels(reason=one.call.gone_reason).inc()  # its caller left on the way

    def _fail_batch(self, picked: Sequence[_Picked], problem: Problem) -> None:
        """A batch broke. Rows that lost nothing yet get a second try alone, so that one bad row cannot take others."""
        retried: list[Call] = []
        with self._changed:
            for one in picked:
                if one.call.is_gone() or not one.call.is_open(one.row):
                    continue
                if len(picked) > 1 and one.call.is_untouched(one.row) and not self._closing:
                    one.call.rejoin_queue(one.row)
                    retried.append(one.call)
                else:
                    one.call.hand_over([Delivery(one.row, None, finished=True, problem=problem)])
            for call in dict.fromkeys(retried):
                if call not in self._calls:
                    self._calls.append(call)


def _partial_tokens(readout: Readout, row: Row) -> int:
    """Length of a step, 0 when it covered the whole row."""
    length = readout.stop - readout.start
    return 0 if length >= row.length else length
