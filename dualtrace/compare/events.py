"""What a comparison tells while it runs, in order: a header, pairs as soon as both sides have them, then the report.

Plain values. They must not know the wire, and nothing in them says who answers a side.
"""

from __future__ import annotations

from dataclasses import dataclass

from dualtrace.compare.pass_rule import TokenStatus
from dualtrace.compare.sides import SideName
from dualtrace.compare.tolerance import Tolerance
from dualtrace.model_card import ModelProvenance
from dualtrace.problems import Problem


@dataclass(frozen=True)
class ProvenanceDifference:
    """One field of ModelProvenance in which the sides differ, as text."""

    field: str
    left: str
    right: str


@dataclass(frozen=True)
class CompareHeader:
    """Both sides have said who they are. Comes before any pair; a second one only where an answer is of another model
    than its side's card had told."""

    left: ModelProvenance
    right: ModelProvenance
    differences: tuple[ProvenanceDifference, ...]
    tolerance: Tolerance


@dataclass(frozen=True)
class TokenPairs:
    """Tokens first_index, first_index + 1, ... of one item on both sides; all columns have length C."""

    item: int
    first_index: int
    token_ids: tuple[int, ...]  # of the left side; of the right too, but where ID_MISMATCH stands
    pieces: tuple[bytes, ...] | None  # None where no side knows a tokenizer
    statuses: tuple[TokenStatus, ...]
    left_logprobs: tuple[float | None, ...]  # nats, None where unscored
    right_logprobs: tuple[float | None, ...]
    left_ranks: tuple[int | None, ...]
    right_ranks: tuple[int | None, ...]


@dataclass(frozen=True)
class FirstDivergence:
    """The first token of an item that is out of tolerance; told once an item, the moment it is known."""

    item: int
    index: int
    left_logprob: float | None
    right_logprob: float | None


@dataclass(frozen=True)
class IdMismatch:
    """The sides read different tokens from here on: nothing after it is compared. Told once an item."""

    item: int
    index: int
    left_id: int | None  # None: the side has no token here
    right_id: int | None
    left_piece: bytes | None
    right_piece: bytes | None


@dataclass(frozen=True)
class SideFailed:
    """A side gave up, wholly or for one item (`problem.detail.item`). The other side's answer goes on."""

    side: SideName
    problem: Problem


CompareEvent = CompareHeader | TokenPairs | FirstDivergence | IdMismatch | SideFailed
