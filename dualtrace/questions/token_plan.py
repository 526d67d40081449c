"""What Logprob, RollingLogprob and MaskedForward have in common: items whose tokens are scored along planned rows.

Pure data and a few pure functions. It must not know queues or the wire.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dualtrace.arrays import IntArray
from dualtrace.engine import Read
from dualtrace.problems import Problem
from dualtrace.questions.answers import ItemHeader
from dualtrace.questions.sight import Sight
from dualtrace.rows import Row, plain_row
from dualtrace.tokens import Tokens


@dataclass(frozen=True, eq=False)
class PlannedItem:
    """One item that could be composed: its tokens (without the prefix) and which of them are scored."""

    tokens: Tokens
    header: ItemHeader
    scored_stop: int  # tokens[header.scored_start : scored_stop] are scored


@dataclass(frozen=True, eq=False)
class PlannedRow:
    """Row r of `row` predicts token `r + token_offset` of its item."""

    row: Row
    item: int
    variant: int
    token_offset: int
    sight: Sight


@dataclass(frozen=True)
class Refused:
    """One item that cannot be answered under one variant."""

    item: int
    variant: int
    problem: Problem


@dataclass(frozen=True, eq=False)
class TokenPlan:
    """Rows of one item and variant stand in ascending order of the tokens they score."""

    items: tuple[PlannedItem | Problem, ...]
    rows: tuple[PlannedRow, ...]
    variants: int
    top_k: int
    prompt_tokens: int  # for usage: as composed, all items and variants
    refused: tuple[Refused, ...] = ()  # beside the items that are a Problem under every variant
    kl_base_masked: bool = False
    kl_masked_base: bool = False

    @property
    def has_offsets(self) -> bool:
        """Whether the answer carries character offsets: all inputs were text."""
        planned = [item for item in self.items if isinstance(item, PlannedItem)]
        return bool(planned) and all(item.tokens.starts is not None for item in planned)

    @property
    def has_pieces(self) -> bool:
        return any(isinstance(item, PlannedItem) and item.tokens.pieces for item in self.items)


def slice_tokens(tokens: Tokens, start: int, stop: int) -> Tokens:
    cut = slice(start, stop)
    starts = None if tokens.starts is None else tokens.starts[cut]
    ends = None if tokens.ends is None else tokens.ends[cut]
    return Tokens(tokens.ids[cut], tokens.pieces[cut], starts, ends)


def scoring_row(sequence: IntArray, feed: slice, score: slice, top_k: int) -> Row:
    """Feed sequence[feed], read the rows that predict sequence[score]."""
    rows = np.arange(score.start - 1 - feed.start, score.stop - 1 - feed.start, dtype=np.int32)
    read = Read(rows=rows, targets=sequence[score], top_k=top_k)
    return plain_row(sequence[feed], read)
