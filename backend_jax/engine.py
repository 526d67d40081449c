"""The engine: checks what it is asked, hands it to a Forest, and says what the model is.

It must not know text, the wire, or how a forward is arranged.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from typing import NoReturn

import numpy as np

from backend_jax.forest import Forest
from backend_jax.programs import Programs
from backend_jax.reader import Reader
from backend_jax.rehearsal import rehearse
from backend_jax.runner import Runner
from backend_jax.warm import plain_batch, usual_batches
from dualtrace.arrays import IntArray
from dualtrace.engine import Batch, Live, Preparation, Read, Reads, Shape, Step
from dualtrace.model_card import ModelCard
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
        """Functions made so far: forward, keep, read, base, contrast."""
        return dict(self._programs.compilations)

    @property
    def late_compilations(self) -> dict[str, int]:
        """Those of them for which a forward had to wait, since nobody had prepared them."""
        return {kind: count for kind, count in self._programs.late.items() if count}

    def prepare(self, shape: Shape) -> None:
        batch, reads = plain_batch(shape.rows, min(shape.tokens, self._card.max_positions))
        for preparation in self.list_missing(batch, reads):
            preparation.run()

    def list_missing(self, batch: Batch, reads: Reads) -> tuple[Preparation, ...]:
        runner, reader = self._parts()
        self._check(batch, reads, runner)
        return self._list([(batch, reads)], runner, reader)

    def list_usual(self) -> tuple[Preparation, ...]:
        runner, reader = self._parts()
        return self._list(usual_batches(self._card.max_positions, self._step_tokens), runner, reader)

    def _list(self, batches: Sequence[tuple[Batch, Reads]], runner: Runner, reader: Reader) -> tuple[Preparation, ...]:
        found: dict[tuple[str, Hashable], Preparation] = {}
        for batch, reads in batches:
            for recipe in rehearse(batch, reads, runner, reader, self._step_tokens):
                if not self._programs.has(recipe):
                    prepare = partial(self._programs.prepare, recipe)
                    found.setdefault((recipe.kind, recipe.key), Preparation(recipe.name, prepare))
        return tuple(found.values())

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
