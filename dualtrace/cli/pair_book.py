"""Every token pair of a comparison, collected while it streams: the report itself may hold only the first of them.

It knows what a comparison tells. It must not know how pairs are shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dualtrace.compare.events import CompareEvent, CompareHeader, FirstDivergence, IdMismatch, TokenPairs
from dualtrace.compare.pass_rule import TokenStatus
from dualtrace.compare.report import CompareReport


@dataclass
class ItemPairs:
    """One item's pairs, in order; all lists are equally long."""

    indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    pieces: list[bytes | None] = field(default_factory=list)
    statuses: list[TokenStatus] = field(default_factory=list)
    left_logprobs: list[float | None] = field(default_factory=list)
    right_logprobs: list[float | None] = field(default_factory=list)
    left_ranks: list[int | None] = field(default_factory=list)
    right_ranks: list[int | None] = field(default_factory=list)
    divergence: FirstDivergence | None = None
    id_mismatch: IdMismatch | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def delta(self, place: int) -> float | None:
        """Right minus left, in nats."""
        left, right = self.left_logprobs[place], self.right_logprobs[place]
        return None if left is None or right is None else right - left

    def add(self, pairs: TokenPairs) -> None:
        count = len(pairs.token_ids)
        self.indices += range(pairs.first_index, pairs.first_index + count)
        self.token_ids += pairs.token_ids
        self.pieces += pairs.pieces if pairs.pieces is not None else [None] * count
        self.statuses += pairs.statuses
        self.left_logprobs += pairs.left_logprobs
        self.right_logprobs += pairs.right_logprobs
        self.left_ranks += pairs.left_ranks
        self.right_ranks += pairs.right_ranks


@dataclass
class PairBook:
    """Feed it every event."""

    header: CompareHeader | None = None
    items: dict[int, ItemPairs] = field(default_factory=dict)
    tokens: int = 0

    def push(self, event: CompareEvent) -> None:
        match event:
            case CompareHeader():
                self.header = event
            case TokenPairs():
                self.item(event.item).add(event)
                self.tokens += len(event.token_ids)
            case FirstDivergence():
                self.item(event.item).divergence = event
            case IdMismatch():
                self.item(event.item).id_mismatch = event

    def fill(self, report: CompareReport) -> None:
        """Items that never streamed, because a side failed before it said who it is, stand in the report alone."""
        for item in report.items:
            if item.item in self.items or not item.columns.token_ids:
                continue
            columns = item.columns
            self.item(item.item).add(
                TokenPairs(
                    item.item, 0, tuple(-1 if one is None else one for one in columns.token_ids), None,
                    columns.statuses, columns.left_logprobs, columns.right_logprobs, columns.left_ranks,
                    columns.right_ranks,
                )
            )  # fmt: skip
            self.item(item.item).pieces = list(columns.tokens or [None] * len(columns.token_ids))

    def item(self, index: int) -> ItemPairs:
        return self.items.setdefault(index, ItemPairs())

    def progress(self) -> str:
        """What a waiting person wants to know."""
        found = sorted((item, pairs.divergence.index) for item, pairs in self.items.items() if pairs.divergence)
        if not found:
            return f"{self.tokens} tokens on both sides; no divergence yet"
        item, index = found[0]
        where = f"item {item}, token {index}" if len(self.items) > 1 else f"token {index}"
        return f"{self.tokens} tokens on both sides; first divergence at {where}"
