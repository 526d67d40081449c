"""From hidden rows of several segments to their Readouts: rows are read together in small blocks, then told apart.

It knows Reads and Readouts. It must not know where hidden rows come from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from backend_jax.device import house_rules
from backend_jax.mesh import Spread
from backend_jax.programs import Programs, Recipe, jit, outline, shape_of
from backend_jax.readout import Asked, Base, base_block, contrast_block, read_block
from backend_jax.shapes import EXTRA, READ_ROWS, TOP, bucket
from dualtrace.arrays import FloatArray, IntArray
from dualtrace.engine import Read, Readout

Values = npt.NDArray[Any]
UNREAD = -1  # in integer columns of bad rows, where no NaN can stand


@dataclass(frozen=True, eq=False)
class Side:
    """Rows that others are measured against. Equal keys, equal rows."""

    key: Hashable
    hidden: Values  # [R, hidden]


@dataclass(frozen=True, eq=False)
class Pending:
    """Some rows of one segment, computed and not yet read. `read` holds just these rows and their targets."""

    readout: Readout  # segment, range, rows, computed tokens, counts; the numbers are still missing
    read: Read
    hidden: Values  # [R, hidden]
    against: Side | None = None  # [R, hidden] of the segment to measure divergence with


@dataclass(frozen=True)
class _Kind:
    """Rows of one kind are read by one compiled function."""

    most: int  # bucket of top_k
    extra: int  # bucket of extra ids
    tails: bool

    def name(self, what: str, rows: int) -> str:
        more = (f"top {self.most}" * (self.most > 0), f"extra {self.extra}" * (self.extra > 0), "tails" * self.tails)
        return ", ".join((f"{what} {rows}", *filter(None, more)))


@dataclass(frozen=True, eq=False)
class _Group:
    """Segments whose rows are read together; where they are measured, against the same rows."""

    members: tuple[Pending, ...]
    kind: _Kind
    fixed: bool

    @property
    def against(self) -> Side | None:
        return self.members[0].against

    @property
    def total(self) -> int:
        return sum(one.hidden.shape[0] for one in self.members)

    @property
    def largest(self) -> int:
        """Rows of a block when they are measured: the same on both sides, so that equal sides stay equal."""
        return READ_ROWS[-1] if self.fixed else bucket(min(self.total, READ_ROWS[-1]), READ_ROWS)


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
        found: dict[int, Readout] = {}
        with house_rules():
            for group in self._groups(pending, fixed):
                columns = self._read_group(group)
                start = 0
                for one in group.members:
                    stop = start + one.hidden.shape[0]
                    part = {name: values[start:stop] for name, values in columns.items()}
                    found[id(one)] = _complete(one, part)
                    start = stop
        return [found[id(one)] for one in pending]

    def recipes(self, pending: Sequence[Pending], *, fixed: bool) -> Iterator[Recipe]:
        """The functions that `read` would call. Hidden states need no columns for this."""
        for group in self._groups(pending, fixed):
            if group.against is None:
                yield from (self._reading(rows, group.kind) for _, rows in blocks(group.total, fixed))
            elif group.total:
                yield from (self._basing(group.largest), self._contrasting(group.largest, group.kind))

    def _groups(self, pending: Sequence[Pending], fixed: bool) -> Iterator[_Group]:
        groups: dict[Hashable, list[Pending]] = {}
        for index, one in enumerate(pending):
            side = None if one.against is None else one.against.key
            groups.setdefault((index if fixed else None, self._kind(one.read), side), []).append(one)
        for members in groups.values():
            yield _Group(tuple(members), self._kind(members[0].read), fixed)

    def _kind(self, read: Read) -> _Kind:
        extra = 0 if read.extra_ids is None else read.extra_ids.size
        return _Kind(self._bucket(read.top_k, TOP), self._bucket(extra, EXTRA), read.tail)

    def _bucket(self, size: int, buckets: tuple[int, ...]) -> int:
        return min(bucket(size, buckets), self._vocabulary) if size <= buckets[-1] else self._vocabulary

    def _read_group(self, group: _Group) -> dict[str, Values]:
        columns: dict[str, Values] = {}
        rows = _stack(group, self._vocabulary)
        answers = self._read_plain(group, rows) if group.against is None else self._measure(group, group.against, rows)
        for chosen, answer in answers:
            for name, values in answer.items():
                if name not in columns:
                    columns[name] = np.empty((group.total, *values.shape[1:]), values.dtype)
                columns[name][chosen] = values[: chosen.size]
        return columns

    def _read_plain(self, group: _Group, stacked: _Stack) -> Iterator[tuple[IntArray, dict[str, Values]]]:
        for start, size in blocks(group.total, group.fixed):
            chosen = np.arange(start, min(start + size, group.total), dtype=np.int32)
            rows = self._made_size(size, lambda rows: (self._reading(rows, group.kind),))
            hidden, asked = stacked.take(chosen, rows)
            yield chosen, _columns(self._programs.find(self._reading(rows, group.kind))(hidden, self._head, asked))

    def _measure(self, group: _Group, side: Side, stacked: _Stack) -> Iterator[tuple[IntArray, dict[str, Values]]]:
        """Block by block of the other side's rows: its logits are made once, whoever is measured against them."""
        size = self._made_size(group.largest, lambda rows: (self._basing(rows), self._contrasting(rows, group.kind)))
        make_base = self._programs.find(self._basing(size))
        measure = self._programs.find(self._contrasting(size, group.kind))
        length = side.hidden.shape[0]
        for start in range(0, length, size):
            stop = min(start + size, length)
            base = make_base(_fill(side.hidden[start:stop], size), self._head)
            of_member = np.arange(start, stop, dtype=np.int32)
            all_chosen = np.concatenate([of_member + number * length for number in range(len(group.members))])
            for at in range(0, all_chosen.size, size):
                chosen = all_chosen[at : at + size]
                hidden, asked = stacked.take(chosen, size)
                which = _fill(chosen % length - start, size).astype(np.int32)
                read, divergence = measure(hidden, self._head, asked, base, which)
                yield chosen, _columns(read) | _columns(divergence)

    def _made_size(self, size: int, recipes: Callable[[int], tuple[Recipe, ...]]) -> int:
        """Callers that left make blocks smaller than they were planned: then a larger function does, there is one."""
        larger = (rows for rows in READ_ROWS if rows >= size)
        return next((rows for rows in larger if all(map(self._programs.has, recipes(rows)))), size)

    def _reading(self, rows: int, kind: _Kind) -> Recipe:
        def lower() -> Any:
            function = partial(read_block, softcap=self._softcap, most=kind.most, tails=kind.tails)
            return self._lower(function, self._hidden(rows), self._head, self._asked(rows, kind))

        return Recipe("read", (rows, kind), kind.name("read", rows), lower)

    def _basing(self, rows: int) -> Recipe:
        function = partial(base_block, softcap=self._softcap)
        return Recipe("base", rows, f"base {rows}", lambda: self._lower(function, self._hidden(rows), self._head))

    def _contrasting(self, rows: int, kind: _Kind) -> Recipe:
        def lower() -> Any:
            function = partial(contrast_block, softcap=self._softcap, most=kind.most, tails=kind.tails)
            wide = np.float64 if self._head.dtype == np.float64 else np.float32
            base = Base(shape_of((rows, self._vocabulary), wide), shape_of((rows,), np.bool_))
            asked, which = self._asked(rows, kind), shape_of((rows,), np.int32)
            return self._lower(function, self._hidden(rows), self._head, asked, base, which)

        return Recipe("contrast", (rows, kind), kind.name("contrast", rows), lower)

    def _lower(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return jit(function, self._spread).lower(*outline(arguments, self._spread))

    def _hidden(self, rows: int) -> Any:
        return shape_of((rows, self._head.shape[1]), self._head.dtype)

    def _asked(self, rows: int, kind: _Kind) -> Asked:
        number = shape_of((rows,), np.int32)
        return Asked(number, number, shape_of((rows, kind.extra), np.int32))


@dataclass(frozen=True, eq=False)
class _Stack:
    """The rows of a group, one under the other, and what is asked of each."""

    hidden: Values  # [R, hidden]
    targets: IntArray  # [R]
    top: IntArray  # [R]
    extra: IntArray  # [R, E]

    def take(self, chosen: IntArray, rows: int) -> tuple[Values, Asked]:
        """The chosen ones, padded to so many."""
        asked = Asked(*(_fill(column[chosen], rows) for column in (self.targets, self.top, self.extra)))  # type: ignore[arg-type]
        return _fill(self.hidden[chosen], rows), asked


def _stack(group: _Group, nobody: int) -> _Stack:
    """`nobody`: an id that is no id."""
    sizes = [one.hidden.shape[0] for one in group.members]
    extra = np.full((group.total, group.kind.extra), nobody, np.int32)
    start = 0
    for one, size in zip(group.members, sizes, strict=True):
        if one.read.extra_ids is not None:
            extra[start : start + size, : one.read.extra_ids.size] = one.read.extra_ids
        start += size
    return _Stack(
        hidden=np.concatenate([one.hidden for one in group.members]),
        targets=np.concatenate([_targets(one) for one in group.members]),
        top=np.repeat(np.array([one.read.top_k for one in group.members], np.int32), sizes),
        extra=extra,
    )


def _columns(answer: Any) -> dict[str, Values]:
    """Of a named tuple of arrays; fields that were not asked are left out."""
    return {name: np.asarray(values) for name, values in answer._asdict().items() if values is not None}


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


def _complete(one: Pending, columns: dict[str, Values]) -> Readout:
    """The readout with its numbers; rows that are not sound are blanked and named."""
    read, size = one.read, one.hidden.shape[0]
    if not columns:
        return dataclasses.replace(one.readout, **_empty(read))
    good = columns["good"] if one.against is None else columns["good"] & columns["both_good"]

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
    if one.against is not None:
        asked |= {"kl_from_against": numbers(columns["of_first"]), "kl_to_against": numbers(columns["of_second"])}
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
