"""The engine: checks what it is asked, hands it to a Forest, and says what the model is.

It must not know text, the wire, or how a forward is arranged.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import NoReturn

import numpy as np

from backend_jax.forest import Forest, warm_parts
from backend_jax.programs import Programs
from backend_jax.reader import Reader
from backend_jax.runner import Runner
from backend_jax.shapes import EXTRA, READ_ROWS, ROWS, SIDE_BY_SIDE, TOP, past_bucket, token_buckets
from dualtrace.engine import Batch, IntArray, Live, ModelCard, Read, Reads, Shape, Step
from dualtrace.problems import Exhausted, FailedPrecondition, InvalidArgument, Problem, Reason


class JaxEngine:
    """`Engine` in JAX. `compilations` counts compiled functions, by kind."""

    def __init__(self, card: ModelCard, runner: Runner, reader: Reader, programs: Programs, step_tokens: int) -> None:
        self._card = card
        self._runner: Runner | None = runner
        self._reader: Reader | None = reader
        self._programs = programs
        self._step_tokens = step_tokens
        self._closing = threading.Lock()

    @property
    def card(self) -> ModelCard:
        return self._card

    @property
    def compilations(self) -> dict[str, int]:
        """Functions made so far: forward, keep, read, diverge."""
        return dict(self._programs.compilations)

    def buckets(self) -> dict[str, tuple[int, ...]]:
        """The sizes to which calls are padded, by what is padded."""
        tokens = token_buckets(self._card.max_positions)
        return {
            "rows": ROWS,
            "row_tokens": tokens,
            "past_tokens": tuple(dict.fromkeys((0, *(past_bucket(size) for size in tokens)))),
            "side_by_side": SIDE_BY_SIDE,
            "read_rows": READ_ROWS,
            "top_k": TOP,
            "extra_ids": EXTRA,
        }

    def prepare(self, shape: Shape) -> None:
        runner, reader = self._parts()
        parts, grid, keep = warm_parts(shape.rows, min(shape.tokens, self._card.max_positions), self._step_tokens)
        runner.warm(parts, grid, keep=keep)
        reader.warm([(min(shape.rows * shape.tokens, READ_ROWS[-1]), 0)])

    def forward(self, batch: Batch, reads: Reads, live: Live) -> Iterator[Step]:
        runner, reader = self._parts()
        self._check(batch, reads, runner)
        forest = Forest(batch, reads, live, runner, reader, self._step_tokens)
        try:
            yield from forest.run()
        except Problem:
            raise
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise Exhausted(
                    Reason.OUT_OF_MEMORY, "the JAX engine ran out of memory; send shorter texts or fewer at once"
                ) from error
            raise

    def close(self) -> None:
        with self._closing:
            self._runner = self._reader = None
            self._programs.clear()

    def _parts(self) -> tuple[Runner, Reader]:
        with self._closing:
            if self._runner is None or self._reader is None:
                raise FailedPrecondition(Reason.NOT_READY, "the JAX engine is closed; load it again")
            return self._runner, self._reader

    def _check(self, batch: Batch, reads: Reads, runner: Runner) -> None:
        if len(reads) != len(batch.segments):
            message = f"{len(reads)} reads for {len(batch.segments)} segments; one for each is needed"
            raise InvalidArgument(Reason.CONFLICT, message)
        starts: list[int] = []
        for index, (segment, read) in enumerate(zip(batch.segments, reads, strict=True)):
            parent = segment.parent
            if parent is not None and not 0 <= parent < index:
                raise InvalidArgument(
                    Reason.OUT_OF_RANGE, f"segment {index} has the parent {parent}; parents come first"
                )
            start = 0 if parent is None else starts[parent] + batch.segments[parent].ids.size
            starts.append(start)
            self._check_tokens(segment.ids, segment.positions, start)
            self._check_read(read, index, start + segment.ids.size)
            if segment.mask is not None and segment.mask.length < start + segment.ids.size:
                message = f"a mask of {segment.mask.length} rows for a segment of {start + segment.ids.size}"
                raise InvalidArgument(Reason.CONFLICT, message, field="mask")
            runner.delta(segment.view)  # an adapter that does not exist is refused before anything runs

    def _check_tokens(self, ids: IntArray, positions: IntArray, start: int) -> None:
        if ids.size != positions.size or start + ids.size == 0:
            message = f"a row of {start + ids.size} ids, {positions.size} positions of its own; give one each"
            raise InvalidArgument(Reason.EMPTY, message)
        limit = self._card.max_positions
        _check_range(ids, self._card.vocab_size, Reason.TOKEN_OUT_OF_RANGE, "token id", "ids")
        _check_range(positions, limit, Reason.INPUT_TOO_LONG, "position", "positions")

    def _check_read(self, read: Read, index: int, length: int) -> None:
        vocabulary = self._card.vocab_size
        rows = read.rows
        if rows.size and (int(rows[0]) < 0 or int(rows[-1]) >= length or bool((np.diff(rows) <= 0).any())):
            allowed = f"0-{length - 1}"
            raise InvalidArgument(Reason.OUT_OF_RANGE, f"rows must ascend and lie in {allowed}", allowed=allowed)
        if read.targets is not None and read.targets.shape != rows.shape:
            message = f"{read.targets.size} targets for {rows.size} rows; give one a row"
            raise InvalidArgument(Reason.CONFLICT, message)
        if not 0 <= read.top_k <= vocabulary:
            message = f"top_k {read.top_k} asked; the logits hold {vocabulary} ids"
            raise InvalidArgument(Reason.OUT_OF_RANGE, message, allowed=f"0-{vocabulary}")
        for what, ids in (("target", read.targets), ("extra id", read.extra_ids)):
            if ids is not None:
                _check_range(ids, vocabulary, Reason.TOKEN_OUT_OF_RANGE, what, "ids")
        if read.against is not None and not 0 <= read.against < index:
            message = f"segment {index} is measured against {read.against}; only earlier segments can be"
            raise InvalidArgument(Reason.OUT_OF_RANGE, message)


def _check_range(values: IntArray, limit: int, reason: Reason, what: str, plural: str) -> None:
    wrong = values[(values < 0) | (values >= limit)]
    if wrong.size:
        _refuse(reason, f"{what} {int(wrong[0])} asked; the model has the {plural} 0-{limit - 1}", f"0-{limit - 1}")


def _refuse(reason: Reason, message: str, allowed: str) -> NoReturn:
    raise InvalidArgument(reason, message, allowed=allowed)
