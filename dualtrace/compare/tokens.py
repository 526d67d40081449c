"""One item's tokens on both sides: judged as they pair up, told as events, kept as compact columns.

Every token's numbers are kept for the figures (27 bytes a token); ids and pieces only of the first `keep` tokens, which
the report shows. It must not know sides' provenance, gates or verdicts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dualtrace.compare.align import NO_ID, Aligner, Block, Paired
from dualtrace.compare.columns import Column
from dualtrace.compare.events import CompareEvent, FirstDivergence, IdMismatch, TokenPairs
from dualtrace.compare.figures import ArgmaxFlip, NotFinite, NotFiniteValue, TokenColumns
from dualtrace.compare.pass_rule import CODES, Codes, PassRule, TokenStatus, code_of
from dualtrace.questions.answers import ItemHeader

_MISMATCH = code_of(TokenStatus.MISMATCH)
_UNAVAILABLE = code_of(TokenStatus.UNAVAILABLE)
_ID_MISMATCH = code_of(TokenStatus.ID_MISMATCH)


@dataclass
class WorstKl:
    """The largest difference of one KL column, and where."""

    diff: float
    item: int
    index: int


class ItemPairs:
    """Feed the aligner's timelines, then call `advance`: it says what is newly known of this item."""

    def __init__(self, item: int, left: ItemHeader, right: ItemHeader, rule: PassRule, keep: int) -> None:
        self.item = item
        self.aligner = Aligner(left, right)
        self.keep = keep
        self._rule = rule
        self.codes = Column(np.uint8)
        self.left_logprobs, self.right_logprobs = Column(np.float64), Column(np.float64)
        self.left_scored, self.right_scored = Column(np.bool_), Column(np.bool_)
        self.left_ranks, self.right_ranks = Column(np.int32), Column(np.int32)
        self._ids = Column(np.int32)  # of the kept tokens
        self._pieces: list[bytes] = []  # of the kept tokens, b"" where not known
        self.knows_pieces = False
        self.first_divergence: FirstDivergence | None = None
        self.id_mismatch: IdMismatch | None = None
        self.argmax_flip: ArgmaxFlip | None = None
        self.compared_tops = 0  # tokens whose most likely token is known on both sides
        self.worst_kl: dict[str, WorstKl] = {}

    def advance(self) -> list[CompareEvent]:
        paired = self.aligner.advance()
        events: list[CompareEvent] = [] if paired is None else self._take(paired)
        parting = self.aligner.parting
        if parting is not None and self.id_mismatch is None:
            self.id_mismatch = IdMismatch(
                self.item, parting.index, parting.left_id, parting.right_id, parting.left_piece, parting.right_piece
            )
            self._keep_parting(self.id_mismatch)
            events.append(self.id_mismatch)
        return events

    def _take(self, paired: Paired) -> list[CompareEvent]:
        left, right = paired.left, paired.right
        codes = self._rule.judge_columns(left.logprobs, right.logprobs, left.scored, right.scored)
        codes[paired.unavailable & (left.scored | right.scored)] = _UNAVAILABLE
        ids: npt.NDArray[np.int32] = np.where(left.ids != NO_ID, left.ids, right.ids)
        pieces = left.pieces or right.pieces
        self._store(codes, left, right, ids, pieces)
        self._note_flip(paired)
        self._note_kl(paired)
        events = _pair_events(self.item, paired, codes, ids, pieces)
        divergence = self._find_divergence(paired, codes)
        return events if divergence is None else [*events, divergence]

    def _store(
        self, codes: Codes, left: Block, right: Block, ids: npt.NDArray[np.int32], pieces: tuple[bytes, ...]
    ) -> None:
        room = max(0, self.keep - len(self.codes))
        self._ids.append(ids[:room])
        self._pieces += pieces[:room] if pieces else [b""] * min(room, len(ids))
        self.knows_pieces |= bool(pieces)
        self.codes.append(codes)
        self.left_logprobs.append(left.logprobs)
        self.right_logprobs.append(right.logprobs)
        self.left_scored.append(left.scored)
        self.right_scored.append(right.scored)
        self.left_ranks.append(left.ranks)
        self.right_ranks.append(right.ranks)

    def _find_divergence(self, paired: Paired, codes: Codes) -> FirstDivergence | None:
        if self.first_divergence is not None:
            return None
        wrong = np.flatnonzero(codes == _MISMATCH)
        if not wrong.size:
            return None
        at = int(wrong[0])
        self.first_divergence = FirstDivergence(
            self.item, paired.start + at, _value(paired.left, at), _value(paired.right, at)
        )
        return self.first_divergence

    def _note_flip(self, paired: Paired) -> None:
        left, right = paired.left, paired.right
        known = (left.top_ids != NO_ID) & (right.top_ids != NO_ID)
        self.compared_tops += int(known.sum())
        flips = np.flatnonzero(known & (left.top_ids != right.top_ids)) if self.argmax_flip is None else known[:0]
        if len(flips):
            at = int(flips[0])
            self.argmax_flip = ArgmaxFlip(
                self.item, paired.start + at, int(left.top_ids[at]), int(right.top_ids[at]),
                _finite(left.margins[at]), _finite(right.margins[at]),
            )  # fmt: skip

    def _note_kl(self, paired: Paired) -> None:
        for name in ("kl_base_masked", "kl_masked_base"):
            with np.errstate(invalid="ignore"):
                diffs = np.abs(getattr(paired.left, name) - getattr(paired.right, name))
            known = np.isfinite(diffs)
            if known.any():
                at = int(np.argmax(np.where(known, diffs, -1.0)))
                worst = WorstKl(float(diffs[at]), self.item, paired.start + at)
                old = self.worst_kl.get(name)
                self.worst_kl[name] = worst if old is None or worst.diff > old.diff else old

    def _keep_parting(self, parting: IdMismatch) -> None:
        """The token that the sides read differently is the last row of the columns."""
        if len(self.codes) < self.keep:
            self._ids.append(np.array([NO_ID if parting.left_id is None else parting.left_id], np.int32))
            self._pieces.append(parting.left_piece or b"")
            self.knows_pieces |= parting.left_piece is not None
        self.codes.append(np.array([_ID_MISMATCH], np.uint8))
        for values in (self.left_logprobs, self.right_logprobs):
            values.append(np.array([np.nan]))
        for scored in (self.left_scored, self.right_scored):
            scored.append(np.zeros(1, np.bool_))
        for ranks in (self.left_ranks, self.right_ranks):
            ranks.append(np.zeros(1, np.int32))

    @property
    def mismatches(self) -> int:
        return int((self.codes.values == _MISMATCH).sum())

    @property
    def kept(self) -> int:
        return len(self._ids)

    def columns(self) -> TokenColumns:
        """The kept tokens, as the report shows them."""
        kept = self.kept
        ids = [None if token == NO_ID else token for token in self._ids.values.tolist()]
        known = zip(ids, self._pieces, strict=True)
        pieces = tuple(None if token is None else piece for token, piece in known) if self.knows_pieces else None
        left, left_odd = _written(self.left_logprobs.values[:kept], self.left_scored.values[:kept])
        right, right_odd = _written(self.right_logprobs.values[:kept], self.right_scored.values[:kept])
        return TokenColumns(
            token_ids=tuple(ids),
            tokens=pieces,
            statuses=tuple([CODES[code] for code in self.codes.values[:kept].tolist()]),
            left_logprobs=left,
            right_logprobs=right,
            left_ranks=_ranks(self.left_ranks.values[:kept]),
            right_ranks=_ranks(self.right_ranks.values[:kept]),
            left_not_finite=left_odd,
            right_not_finite=right_odd,
        )


def _pair_events(
    item: int, paired: Paired, codes: Codes, ids: npt.NDArray[np.int32], pieces: tuple[bytes, ...]
) -> list[CompareEvent]:
    """One event a run of tokens whose ids are known: of the others nothing was told, and so nothing is passed on."""
    known = ids != NO_ID
    if known.all():
        return [_pair_event(item, paired, codes, ids, pieces, 0, len(ids))]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], known, [False]]).astype(np.int8)))
    runs = edges.reshape(-1, 2).tolist()
    return [_pair_event(item, paired, codes, ids, pieces, start, stop) for start, stop in runs]


def _pair_event(
    item: int,
    paired: Paired,
    codes: Codes,
    ids: npt.NDArray[np.int32],
    pieces: tuple[bytes, ...],
    start: int,
    stop: int,
) -> TokenPairs:
    left, right = paired.left, paired.right
    return TokenPairs(
        item=item,
        first_index=paired.start + start,
        token_ids=tuple(ids[start:stop].tolist()),
        pieces=pieces[start:stop] if pieces else None,
        statuses=tuple([CODES[code] for code in codes[start:stop].tolist()]),
        left_logprobs=_values(left.logprobs[start:stop], left.scored[start:stop]),
        right_logprobs=_values(right.logprobs[start:stop], right.scored[start:stop]),
        left_ranks=_ranks(left.ranks[start:stop]),
        right_ranks=_ranks(right.ranks[start:stop]),
    )


def _values(values: npt.NDArray[np.float64], there: npt.NDArray[np.bool_]) -> tuple[float | None, ...]:
    if there.all():
        return tuple(values.tolist())
    pairs = zip(values.tolist(), there.tolist(), strict=True)
    return tuple([value if known else None for value, known in pairs])


def _ranks(ranks: npt.NDArray[np.int32]) -> tuple[int | None, ...]:
    return tuple([rank or None for rank in ranks.tolist()])


def _value(block: Block, at: int) -> float | None:
    return float(block.logprobs[at]) if block.scored[at] else None


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _written(
    values: npt.NDArray[np.float64], there: npt.NDArray[np.bool_]
) -> tuple[tuple[float | None, ...], tuple[NotFinite, ...]]:
    """Values as a document can hold them: one that is not finite stands beside the column, by name."""
    odd = np.flatnonzero(there & ~np.isfinite(values)).tolist()
    return (
        _values(values, there & np.isfinite(values)),
        tuple(NotFinite(index, NotFiniteValue.of(float(values[index]))) for index in odd),
    )
