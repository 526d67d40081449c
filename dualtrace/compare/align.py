"""Tokens of two sides put on one axis, while they arrive: index by index, as far as both have told.

It knows indices, ids and who has ended. It must not know tolerances, and it judges no value.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from dualtrace.arrays import FloatArray, IntArray
from dualtrace.compare.pass_rule import Bools
from dualtrace.problems import Internal, Reason
from dualtrace.questions.answers import ItemHeader, TokenChunk
from dualtrace.runs.collector import MAX_GAP
from dualtrace.tokens import Tokens

NO_ID = -1
"""Stands for an id that was not told; no id is negative."""


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive tokens of one side; every column has length C. What was not told is NO_ID, 0, NaN or False."""

    ids: IntArray  # [C]
    logprobs: FloatArray  # [C] nats
    scored: Bools  # [C] whether the logprob was told
    ranks: IntArray  # [C] 1 is the most likely
    top_ids: IntArray  # [C] the most likely token
    margins: FloatArray  # [C] top-1 minus top-2 logprob
    kl_base_masked: FloatArray  # [C] nats
    kl_masked_base: FloatArray  # [C] nats
    pieces: tuple[bytes, ...]  # [C], () where none is known

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, start: int, stop: int) -> Block:
        columns = {name: getattr(self, name)[start:stop] for name in _COLUMNS}
        return Block(**columns, pieces=self.pieces[start:stop])


_COLUMNS = tuple(field.name for field in fields(Block) if field.name != "pieces")


def unscored_block(tokens: Tokens) -> Block:
    """Tokens whose ids are known and whose numbers are not."""
    blank = blank_block(len(tokens))
    columns = {name: getattr(blank, name) for name in _COLUMNS if name != "ids"}
    return Block(ids=np.asarray(tokens.ids, np.int32), **columns, pieces=_pieces(tokens))


def blank_block(count: int) -> Block:
    """Tokens of which nothing was told."""
    none = np.full(count, NO_ID, np.int32)
    absent = np.full(count, np.nan)
    return Block(
        none, absent, np.zeros(count, np.bool_), np.zeros(count, np.int32), none, absent, absent, absent, ()
    )  # fmt: skip


def chunk_block(chunk: TokenChunk) -> Block:
    count = len(chunk.tokens)
    top_ids, margins = _tops(chunk, count)
    return Block(
        ids=np.asarray(chunk.tokens.ids, np.int32),
        logprobs=_floats(chunk.logprobs, count, "logprobs"),
        scored=np.ones(count, np.bool_),
        # A scorer without ranks sends none; no rank is below 1.
        ranks=np.maximum(_sized(chunk.ranks, count, "ranks"), 0) if len(chunk.ranks) else np.zeros(count, np.int32),
        top_ids=top_ids,
        margins=margins,
        kl_base_masked=_floats(chunk.kl_base_masked, count, "kl_base_masked"),
        kl_masked_base=_floats(chunk.kl_masked_base, count, "kl_masked_base"),
        pieces=_pieces(chunk.tokens),
    )


def _floats(column: FloatArray | None, count: int, name: str) -> FloatArray:
    if column is None:
        return np.full(count, np.nan)
    return np.asarray(_sized(column, count, name), np.float64)


def _sized(column: npt.NDArray[np.generic], count: int, name: str) -> npt.NDArray[np.generic]:
    if len(column) != count:
        raise broken(f"{count} tokens came with {len(column)} {name}")
    return column


def _tops(chunk: TokenChunk, count: int) -> tuple[IntArray, FloatArray]:
    ids, logprobs = chunk.top_ids, chunk.top_logprobs
    if ids is None or logprobs is None or ids.shape[1] == 0:
        return np.full(count, NO_ID, np.int32), np.full(count, np.nan)
    if ids.shape != logprobs.shape or len(ids) != count:
        raise broken(f"{count} tokens came with top-k columns of shapes {ids.shape} and {logprobs.shape}")
    with np.errstate(invalid="ignore"):  # -inf - -inf
        margins = logprobs[:, 0] - logprobs[:, 1] if ids.shape[1] > 1 else np.full(count, np.nan)
    return np.asarray(ids[:, 0], np.int32), np.asarray(margins, np.float64)


def _pieces(tokens: Tokens) -> tuple[bytes, ...]:
    return tuple(tokens.pieces) if len(tokens.pieces) == len(tokens.ids) else ()


def join(blocks: list[Block]) -> Block:
    if len(blocks) == 1:
        return blocks[0]
    columns = {name: np.concatenate([getattr(block, name) for block in blocks]) for name in _COLUMNS}
    pieces: tuple[bytes, ...] = ()
    if any(block.pieces for block in blocks):
        pieces = tuple(piece for block in blocks for piece in block.pieces or (b"",) * len(block))
    return Block(**columns, pieces=pieces)


def broken(what: str) -> Internal:
    return Internal(Reason.INCOMPLETE_STREAM, f"the answer is broken: {what}")


class Timeline:
    """One side of one item: tokens 0 .. told - 1, of which the first `taken` have left."""

    def __init__(self, header: ItemHeader) -> None:
        self.header = header
        self.told = 0
        self.taken = 0
        self.scored = 0  # tokens that came with their numbers
        self.done = False  # every token that will be told was told
        self.failed = False  # it ended before its time
        self._blocks: deque[Block] = deque()
        if header.unscored is not None and len(header.unscored):
            self._append(unscored_block(header.unscored))

    def add(self, chunk: TokenChunk) -> Block:
        """Take a chunk. Tokens between it and the last one have no numbers."""
        gap, count = chunk.first_index - self.told, len(chunk.tokens)
        if self.done or self.failed or not 0 <= gap <= MAX_GAP or self.told + gap + count > self.header.token_count:
            last = chunk.first_index + count - 1
            raise broken(
                f"tokens {chunk.first_index} to {last} of item {chunk.item} came after {self.told} of "
                f"{self.header.token_count}"
            )
        block = chunk_block(chunk)
        if gap:
            self._append(blank_block(gap))
        if count:
            self._append(block)
        self.scored += count
        return block

    def end(self, scored: int) -> None:
        """Everything was told, as the answer's own count says too."""
        if scored != self.scored:
            raise broken(f"an item ended with {scored} scored tokens; {self.scored} came")
        self.done = True

    def _append(self, block: Block) -> None:
        self._blocks.append(block)
        self.told += len(block)

    def horizon(self, other: Timeline) -> int:
        """How far tokens of this side may be paired: an ended side has nothing to say of the tokens that are left."""
        if self.failed:
            return max(self.told, other.told)
        if self.done:
            return max(self.told, min(other.told, self.header.token_count))
        return self.told

    def take(self, count: int) -> Block:
        """The next `count` tokens; those that this side never told are blank."""
        parts: list[Block] = []
        missing = count
        while missing and self._blocks:
            block = self._blocks.popleft()
            if len(block) > missing:
                self._blocks.appendleft(block.cut(missing, len(block)))
                block = block.cut(0, missing)
            parts.append(block)
            missing -= len(block)
        if missing:
            parts.append(blank_block(missing))
        self.taken += count
        return join(parts)

    def first(self) -> tuple[int | None, bytes | None]:
        """Id and piece of the next token; None where it has none."""
        if not self._blocks:
            return None, None
        return first_token(self._blocks[0])

    def drop(self) -> None:
        """Let go of what will not be paired."""
        self._blocks.clear()
        self.taken = self.told


def first_token(block: Block) -> tuple[int | None, bytes | None]:
    token = int(block.ids[0])
    return (None if token == NO_ID else token), (block.pieces[0] if block.pieces else None)


@dataclass(frozen=True, eq=False)
class Paired:
    """Tokens start .. start + C - 1 of one item on both sides, ids agreeing wherever both are known."""

    start: int
    left: Block
    right: Block
    unavailable: Bools  # [C] a side gave up before it told this token


@dataclass(frozen=True)
class Parting:
    """The first token that the sides read differently."""

    index: int
    left_id: int | None
    right_id: int | None
    left_piece: bytes | None
    right_piece: bytes | None


class Aligner:
    """Both sides of one item."""

    def __init__(self, left: ItemHeader, right: ItemHeader) -> None:
        self.left = Timeline(left)
        self.right = Timeline(right)
        self.parting: Parting | None = None

    def advance(self) -> Paired | None:
        """What both sides have by now and that was not given yet. Sets `parting` where they part."""
        if self.parting is not None:
            self.left.drop()
            self.right.drop()
            return None
        start = self.left.taken
        count = min(self.left.horizon(self.right), self.right.horizon(self.left)) - start
        paired = self._pair(start, count) if count > 0 else None
        if self.parting is None:
            self._find_end(start + max(count, 0))
        return paired

    def _pair(self, start: int, count: int) -> Paired | None:
        places = np.arange(start, start + count)
        unavailable: Bools = np.zeros(count, np.bool_)
        for side in (self.left, self.right):
            if side.failed:
                unavailable |= places >= side.told
        left, right = self.left.take(count), self.right.take(count)
        wrong = np.flatnonzero((left.ids != right.ids) & (left.ids != NO_ID) & (right.ids != NO_ID))
        if wrong.size:
            cut = int(wrong[0])
            (left_id, left_piece), (right_id, right_piece) = (
                first_token(block.cut(cut, cut + 1)) for block in (left, right)
            )
            self.parting = Parting(start + cut, left_id, right_id, left_piece, right_piece)
            left, right, unavailable = left.cut(0, cut), right.cut(0, cut), unavailable[:cut]
        return Paired(start, left, right, unavailable) if len(left) else None

    def _find_end(self, cursor: int) -> None:
        """One side has no token where the other has one."""
        for side, other in ((self.left, self.right), (self.right, self.left)):
            if side.done and not side.failed and side.header.token_count <= cursor < other.told:
                left_id, left_piece = self.left.first()
                right_id, right_piece = self.right.first()
                self.parting = Parting(cursor, left_id, right_id, left_piece, right_piece)
                return
