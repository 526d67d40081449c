"""Logits of the rows that are read, and the numbers in them.

Rows are gathered first and their logits exist in chunks only; sums are float64 over max-shifted exponentials, because
torch's float32 log_softmax is biased by 2e-5 a token at large vocabularies. It knows hidden states and the head. It
must not know segments, masks or how the hidden states came about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dualtrace.engine import Read

CHUNK_ROWS = 128  # rows of [rows, vocabulary] logits that exist at one time ...
WIDE_CHUNK_ROWS = 256  # ... and so many while they fit in CHUNK_BYTES: a product of 256 costs a fifth less than two
CHUNK_BYTES = 64 * 2**20
BLOCK_ROWS = 64  # rows that are read at a time, and of a contrast's yardstick those that exist at one time
CACHE_ROWS = 32  # rows that elementwise work takes at a time: they stay in the processor's cache
CACHE_COLUMNS = 8192  # columns that a contrast takes at a time, for the same reason
UNREAD = -1  # in integer columns of bad rows, where no NaN can stand
NAN = float("nan")

Longs = npt.NDArray[np.int64]
Head = Callable[[Tensor, Tensor | None], Tensor]
"""Hidden states [n, D] -> logits [n, V] in float32 or better, soft cap applied; written to the second [n, V] if it
can be."""


@dataclass(eq=False)
class Ask:
    """What to read of some hidden states, and the columns found so far, named as the fields of `Readout`."""

    read: Read
    places: Longs  # [R] rows of the source of hidden states
    against: Longs | None  # [R] rows of the source that these are measured against
    columns: dict[str, list[Any]] = field(default_factory=dict)
    bad_rows: list[int] = field(default_factory=list)

    def add(self, name: str, values: Tensor, bad: Tensor | None) -> None:
        """Append a column; rows with broken logits must not pass for numbers."""
        if bad is not None:
            blank = NAN if values.is_floating_point() else UNREAD
            values = values.masked_fill(bad.reshape(-1, *[1] * (values.dim() - 1)), blank)
        kind = np.float64 if values.is_floating_point() else np.int32
        self.columns.setdefault(name, []).append(values.cpu().numpy().astype(kind))

    def column(self, name: str) -> Any:
        parts = self.columns.get(name)
        return None if parts is None else np.concatenate(parts)


@dataclass(frozen=True, eq=False)
class _Task:
    """A few consecutive rows of one ask."""

    ask: Ask
    rows: slice

    @property
    def size(self) -> int:
        size: int = self.rows.stop - self.rows.start
        return size


@dataclass(frozen=True, eq=False)
class _Logits:
    """Logits of a few rows with what every reading needs of them."""

    values: Tensor  # [n,V]; broken rows hold zeros
    log_total: Tensor  # [n] float64, logsumexp of the values
    total: Tensor  # [n] float64, the sum of the weights
    weights: Tensor | None  # [n,V] exponentials of the values less their row's maximum; kept for a contrast only
    bad: Tensor | None  # [n] bool rows that held NaN or infinity; None when none did


class _Space:
    """Memory that logits, or weights, of one call after another share: fresh pages cost more than what is written on
    them."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def compute(self, head: Head, hidden: Tensor) -> Tensor:
        rows = hidden.shape[0]
        if self._kept is not None and self._kept.shape[0] >= rows:
            return head(hidden, self._kept[:rows])
        self._kept = None  # before the larger one is made
        values = self._kept = head(hidden, None)
        return values

    def like(self, values: Tensor) -> Tensor:
        if self._kept is None or self._kept.shape[0] < values.shape[0]:
            self._kept = None
            self._kept = torch.empty_like(values)
        return self._kept[: values.shape[0]]


def chunk_rows(vocabulary: int) -> int:
    return WIDE_CHUNK_ROWS if WIDE_CHUNK_ROWS * vocabulary * 4 <= CHUNK_BYTES else CHUNK_ROWS


def read_all(head: Head, source: Tensor, asks: Sequence[Ask], chunk: int = CHUNK_ROWS) -> None:
    """Fill the columns of every ask from the hidden states `source` [S,D]."""
    yardsticks: dict[bytes, _Logits] = {}
    space, weights, other_space, other_weights = _Space(), _Space(), _Space(), _Space()

    def rows_of(places: Longs) -> Tensor:
        return source[torch.from_numpy(places).to(source.device)]

    for tasks in _chunks(asks, chunk):
        values = space.compute(head, rows_of(np.concatenate([task.ask.places[task.rows] for task in tasks])))
        start = 0
        for task in tasks:
            contrast = task.ask.against is not None
            mine = _normalise(values[start : start + task.size], weights, keep=contrast)
            start += task.size
            _read_task(mine, task)
            if task.ask.against is not None:
                wanted = task.ask.against[task.rows]
                key = wanted.tobytes()
                if key not in yardsticks:  # variants come in lockstep: the last yardstick serves them all
                    theirs = other_space.compute(head, rows_of(wanted))
                    yardsticks = {key: _normalise(theirs, other_weights, keep=True)}
                _read_contrast(mine, yardsticks[key], task)


def _chunks(asks: Sequence[Ask], size: int) -> Iterator[list[_Task]]:
    """Tasks of at most `size` rows in all; asks with one yardstick go through it block by block together."""
    groups: dict[bytes, list[Ask]] = {}
    for number, ask in enumerate(asks):
        key = str(number).encode() if ask.against is None else b"against" + ask.against.tobytes()
        groups.setdefault(key, []).append(ask)
    chunk: list[_Task] = []
    filled = 0
    for group in groups.values():
        rows = len(group[0].places)
        for start in range(0, rows, BLOCK_ROWS):
            for ask in group:
                task = _Task(ask, slice(start, min(start + BLOCK_ROWS, rows)))
                if chunk and filled + task.size > size:
                    yield chunk
                    chunk, filled = [], 0
                chunk.append(task)
                filled += task.size
    if chunk:
        yield chunk


def _normalise(values: Tensor, space: _Space, *, keep: bool) -> _Logits:
    """With `keep` the weights too, which a contrast needs."""
    peak = torch.cat([part.amax(dim=1, keepdim=True) for part in _cut(values)])
    bad = None
    if not bool(torch.isfinite(peak).all()) or not bool(torch.isfinite(values.amin())):
        bad = ~torch.isfinite(values).all(dim=1)
        values = values.masked_fill(bad[:, None], 0.0)
        peak = values.amax(dim=1, keepdim=True)
    weights = space.like(values if keep else values[:CACHE_ROWS])
    totals = []
    for number, (part, top) in enumerate(zip(_cut(values), _cut(peak), strict=True)):
        first = number * CACHE_ROWS if keep else 0
        here = torch.sub(part, top, out=weights[first : first + part.shape[0]]).exp_()
        totals.append(here.sum(dim=1, dtype=torch.float64))
    total = torch.cat(totals)
    return _Logits(values, peak[:, 0].double() + total.log(), total, weights if keep else None, bad)


def _cut(values: Tensor) -> list[Tensor]:
    return [values[start : start + CACHE_ROWS] for start in range(0, values.shape[0], CACHE_ROWS)]


def _read_targets(logits: _Logits, targets: Tensor, task: _Task) -> None:
    """Logprob, rank and ties. Ranks are counted, never sorted."""
    own = logits.values.gather(1, targets[:, None])
    task.ask.add("logprobs", own[:, 0].double() - logits.log_total, logits.bad)
    above, equal = [], []
    counter = torch.empty_like(logits.values[:CACHE_ROWS])  # as numbers: summing booleans is four times slower
    for part, mark in zip(_cut(logits.values), _cut(own), strict=True):
        here = counter[: part.shape[0]]
        above.append(torch.gt(part, mark, out=here).sum(dim=1))  # exact: below 2**24
        equal.append(torch.eq(part, mark, out=here).sum(dim=1))
    task.ask.add("ranks", torch.cat(above).int() + 1, logits.bad)
    task.ask.add("ties", torch.cat(equal).int() - 1, logits.bad)


def _read_task(logits: _Logits, task: _Task) -> None:
    """Targets, top ids, extra ids, tails, and which rows are broken."""
    ask, read = task.ask, task.ask.read
    if read.targets is not None:
        targets = torch.from_numpy(read.targets[task.rows].astype(np.int64)).to(logits.values.device)
        _read_targets(logits, targets, task)
    top = _top_ids(logits.values, read.top_k) if read.top_k or read.tail else None
    if top is not None and read.top_k:
        ask.add("top_ids", top, logits.bad)
        ask.add("top_logprobs", logits.values.gather(1, top).double() - logits.log_total[:, None], logits.bad)
    extra = None
    if read.extra_ids is not None:
        extra = torch.from_numpy(read.extra_ids.astype(np.int64)).to(logits.values.device)
        ask.add("extra_logprobs", logits.values[:, extra].double() - logits.log_total[:, None], logits.bad)
    if read.tail and top is not None:
        _read_tails(logits, top, extra, ask)
    if logits.bad is not None:
        ask.bad_rows += read.rows[task.rows][logits.bad.cpu().numpy()].tolist()


def _top_ids(values: Tensor, k: int) -> Tensor:
    """[n,k] the best ids, best first, ties by the lower id. torch.topk promises no order among equals."""
    if k == 0:
        return torch.empty((values.shape[0], 0), dtype=torch.int64, device=values.device)
    best, ids = torch.topk(values, k, dim=1)
    floor = best[:, -1:]
    crowded = torch.nonzero((values >= floor).sum(dim=1) > k)[:, 0].tolist()
    for row in crowded:  # more ids reach the k-th value than fit: the lower ids among its equals are in
        above = torch.nonzero(values[row] > floor[row])[:, 0]
        equal = torch.nonzero(values[row] == floor[row])[: k - above.shape[0], 0]
        ids[row] = torch.cat([above, equal])
    ids, _ = ids.sort(dim=1)
    order = values.gather(1, ids).argsort(dim=1, descending=True, stable=True)
    return ids.gather(1, order)


def _read_tails(logits: _Logits, top: Tensor, extra: Tensor | None, ask: Ask) -> None:
    """The mass outside the top ids, and outside top and extra ids, summed over what remains (never 1 - sum)."""
    remaining = logits.values.double().scatter_(1, top, float("-inf"))
    ask.add("tail_logprobs", _log_sum(remaining) - logits.log_total, logits.bad)
    if extra is not None:
        remaining[:, extra] = float("-inf")
        ask.add("rest_logprobs", _log_sum(remaining) - logits.log_total, logits.bad)


def _log_sum(values: Tensor) -> Tensor:
    """logsumexp of each row; -inf where nothing is left."""
    return torch.logsumexp(values, dim=1)


def _read_contrast(mine: _Logits, yardstick: _Logits, task: _Task) -> None:
    """Exact KL both ways over the full vocabulary.

    With d = own - yardstick, KL(own || yardstick) = sum(w d) / sum(w) - (logsumexp - theirs): elementwise work stays
    in the logits' own precision and in the cache, sums are float64, so equal rows give exactly 0.
    """
    assert mine.weights is not None
    assert yardstick.weights is not None
    shift = mine.log_total - yardstick.log_total
    to_against, from_against = torch.zeros_like(shift), torch.zeros_like(shift)
    for start in range(0, mine.values.shape[1], CACHE_COLUMNS):
        here = slice(start, start + CACHE_COLUMNS)
        difference = mine.values[:, here] - yardstick.values[:, here]
        to_against += (mine.weights[:, here] * difference).sum(dim=1, dtype=torch.float64)
        from_against += difference.mul_(yardstick.weights[:, here]).sum(dim=1, dtype=torch.float64)
    bad = mine.bad
    if yardstick.bad is not None:
        bad = yardstick.bad if bad is None else bad | yardstick.bad
        only_theirs = yardstick.bad if mine.bad is None else yardstick.bad & ~mine.bad
        task.ask.bad_rows += task.ask.read.rows[task.rows][only_theirs.cpu().numpy()].tolist()
    task.ask.add("kl_from_against", (shift - from_against / yardstick.total).clamp_(min=0.0), bad)
    task.ask.add("kl_to_against", (to_against / mine.total - shift).clamp_(min=0.0), bad)
