"""From hidden rows of several segments to their Readouts: rows are read together in small blocks, then told apart.

It knows Reads and Readouts. It must not know where hidden rows come from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from backend_jax.device import house_rules
from backend_jax.mesh import Spread
from backend_jax.programs import Programs, jit, outline, shape_of
from backend_jax.readout import Asked, diverge_block, read_block
from backend_jax.shapes import EXTRA, READ_ROWS, TOP, bucket
from dualtrace.engine import FloatArray, IntArray, Read, Readout

Values = npt.NDArray[Any]
UNREAD = -1  # in integer columns of bad rows, where no NaN can stand


@dataclass(frozen=True, eq=False)
class Pending:
    """Some rows of one segment, computed and not yet read. `read` holds just these rows and their targets."""

    readout: Readout  # segment, range, rows, computed tokens, counts; the numbers are still missing
    read: Read
    hidden: Values  # [R, hidden]
    against: Values | None = None  # [R, hidden] of the segment to measure divergence with


@dataclass(frozen=True)
class _Kind:
    """Rows of one kind are read by one compiled function."""

    most: int  # bucket of top_k
    extra: int  # bucket of extra ids
    tails: bool


class Reader:
    def __init__(
        self, programs: Programs, head: jax.Array, softcap: float | None, spread: Spread | None = None
    ) -> None:
        self._programs = programs
        self._head = head
        self._softcap = softcap
        self._spread = spread
        self._vocabulary = int(head.shape[0])

    def read(self, pending: Sequence[Pending], *, fixed: bool) -> list[Readout]:
        """`fixed`: every segment alone, in blocks of one size, so that no neighbour can move a bit."""
        with house_rules():
            return self._read(pending, fixed)

    def _read(self, pending: Sequence[Pending], fixed: bool) -> list[Readout]:
        found: dict[int, Readout] = {}
        for group in self._groups(pending, fixed):
            kind = self._kind(pending[group[0]].read)
            columns = self._read_rows([pending[i] for i in group], kind, fixed)
            start = 0
            for i in group:
                stop = start + pending[i].hidden.shape[0]
                part = {name: values[start:stop] for name, values in columns.items()}
                found[i] = _complete(pending[i], part, self._diverge(pending[i], fixed))
                start = stop
        return [found[i] for i in range(len(pending))]

    def warm(self, kinds: Sequence[tuple[int, int]]) -> None:
        """Compile what reads (rows, top_k)."""
        for rows, most in kinds:
            self._program(bucket(rows, READ_ROWS), _Kind(self._bucket(most, TOP), 0, False))

    def _groups(self, pending: Sequence[Pending], fixed: bool) -> Iterator[list[int]]:
        groups: dict[object, list[int]] = {}
        for index, one in enumerate(pending):
            groups.setdefault(index if fixed else self._kind(one.read), []).append(index)
        yield from groups.values()

    def _kind(self, read: Read) -> _Kind:
        extra = 0 if read.extra_ids is None else read.extra_ids.size
        return _Kind(self._bucket(read.top_k, TOP), self._bucket(extra, EXTRA), read.tail)

    def _bucket(self, size: int, buckets: tuple[int, ...]) -> int:
        return min(bucket(size, buckets), self._vocabulary) if size <= buckets[-1] else self._vocabulary

    def _read_rows(self, members: Sequence[Pending], kind: _Kind, fixed: bool) -> dict[str, Values]:
        hidden = np.concatenate([one.hidden for one in members])
        total = hidden.shape[0]
        targets = np.concatenate([_targets(one) for one in members])
        top = np.concatenate([np.full(one.hidden.shape[0], one.read.top_k, np.int32) for one in members])
        extra = np.concatenate([self._extra(one, kind.extra) for one in members])
        parts: list[dict[str, Values]] = []
        for start, rows in blocks(total, fixed):
            part = slice(start, start + rows)
            asked = Asked(*(_fill(column[part], rows) for column in (targets, top, extra)))  # type: ignore[arg-type]
            answer = self._program(rows, kind)(_fill(hidden[part], rows), self._head, asked)
            used = min(rows, total - start)
            parts.append({k: np.asarray(v)[:used] for k, v in answer._asdict().items() if v is not None})
        if not parts:
            return {}
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _extra(self, one: Pending, size: int) -> IntArray:
        ids = np.full((one.hidden.shape[0], size), self._vocabulary, np.int32)
        if one.read.extra_ids is not None:
            ids[:, : one.read.extra_ids.size] = one.read.extra_ids
        return ids

    def _program(self, rows: int, kind: _Kind) -> Any:
        def lower() -> Any:
            hidden = shape_of((rows, self._head.shape[1]), self._head.dtype)
            number = shape_of((rows,), np.int32)
            asked = Asked(number, number, shape_of((rows, kind.extra), np.int32))
            function = partial(read_block, softcap=self._softcap, most=kind.most, tails=kind.tails)
            return jit(function, self._spread).lower(*outline((hidden, self._head, asked), self._spread))

        return self._programs.find("read", (rows, kind), lower)

    def _diverge(self, one: Pending, fixed: bool) -> tuple[Values, Values, Values] | None:
        """(good, KL(against || this), KL(this || against)), [R] each."""
        if one.against is None:
            return None
        parts: list[tuple[Values, ...]] = []
        for start, rows in blocks(one.hidden.shape[0], fixed):
            part = slice(start, start + rows)
            used = min(rows, one.hidden.shape[0] - start)
            program = self._divergence_program(rows)
            answer = program(_fill(one.against[part], rows), _fill(one.hidden[part], rows), self._head)
            parts.append(tuple(np.asarray(values)[:used] for values in answer))
        if not parts:
            return np.ones(0, np.bool_), np.zeros(0), np.zeros(0)
        good, of_first, of_second = (np.concatenate(column) for column in zip(*parts, strict=True))
        return good, of_first, of_second

    def _divergence_program(self, rows: int) -> Any:
        def lower() -> Any:
            hidden = shape_of((rows, self._head.shape[1]), self._head.dtype)
            function = partial(diverge_block, softcap=self._softcap)
            return jit(function, self._spread).lower(*outline((hidden, hidden, self._head), self._spread))

        return self._programs.find("diverge", rows, lower)


def blocks(total: int, fixed: bool) -> Iterator[tuple[int, int]]:
    """(start, padded rows) of blocks that cover `total` rows."""
    largest = READ_ROWS[-1]
    for start in range(0, total, largest):
        yield start, largest if fixed else bucket(min(largest, total - start), READ_ROWS)


def _targets(one: Pending) -> IntArray:
    return np.zeros(one.hidden.shape[0], np.int32) if one.read.targets is None else one.read.targets


def _fill(values: Values, rows: int) -> Values:
    """Padded with zeros at the end."""
    missing = rows - values.shape[0]
    if missing == 0:
        return values
    return np.concatenate([values, np.zeros((missing, *values.shape[1:]), values.dtype)])


def _complete(one: Pending, columns: dict[str, Values], divergence: tuple[Values, Values, Values] | None) -> Readout:
    """The readout with its numbers; rows that are not sound are blanked and named."""
    read, size = one.read, one.hidden.shape[0]
    if not columns:
        return dataclasses.replace(one.readout, **_empty(read))
    good = columns["good"] if divergence is None else columns["good"] & divergence[0]

    def numbers(values: Values) -> FloatArray:
        return np.where(good.reshape(size, *[1] * (values.ndim - 1)), values, np.nan)

    def ids(values: Values) -> IntArray:
        return np.where(good.reshape(size, *[1] * (values.ndim - 1)), values, np.int32(UNREAD))

    asked: dict[str, Any] = {"bad_rows": tuple(int(row) for row in one.readout.rows[~good])}
    if read.targets is not None:
        asked |= {"logprobs": numbers(columns["logprobs"])}
        asked |= {"ranks": ids(columns["ranks"]), "ties": ids(columns["ties"])}
    if read.top_k:
        asked |= {"top_ids": ids(columns["top_ids"][:, : read.top_k])}
        asked |= {"top_logprobs": numbers(columns["top_logprobs"][:, : read.top_k])}
    if read.extra_ids is not None:
        asked |= {"extra_logprobs": numbers(columns["extra_logprobs"][:, : read.extra_ids.size])}
    if read.tail:
        asked |= {"tail_logprobs": numbers(columns["tails"])}
        asked |= {"rest_logprobs": None if read.extra_ids is None else numbers(columns["rests"])}
    if divergence is not None:
        asked |= {"kl_from_against": numbers(divergence[1]), "kl_to_against": numbers(divergence[2])}
    return dataclasses.replace(one.readout, **asked)


def _empty(read: Read) -> dict[str, Any]:
    """Columns of no rows for what was asked."""
    numbers, ids = np.zeros(0), np.zeros(0, np.int32)
    asked: dict[str, Any] = {}
    if read.targets is not None:
        asked |= {"logprobs": numbers, "ranks": ids, "ties": ids}
    if read.top_k:
        asked |= {"top_ids": ids.reshape(0, read.top_k), "top_logprobs": numbers.reshape(0, read.top_k)}
    if read.extra_ids is not None:
        asked |= {"extra_logprobs": numbers.reshape(0, read.extra_ids.size)}
    if read.tail:
        asked |= {"tail_logprobs": numbers, "rest_logprobs": None if read.extra_ids is None else numbers}
    if read.against is not None:
        asked |= {"kl_from_against": numbers, "kl_to_against": numbers}
    return asked
