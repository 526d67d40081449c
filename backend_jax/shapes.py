"""Padded buckets: the sizes that compiled functions exist for, and the key of one such function.

It knows numbers. It must not know arrays, models or masks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, lru_cache

MOST_TOKENS = 2048  # of one call, unless a single row is longer
ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 128)
READ_ROWS = (8, 16, 32, 64)  # rows whose logits exist at one time
SIDE_BY_SIDE = (1, 2, 4, 8)  # long segments that advance together
TOP = (0, 1, 8, 32, 128, 512, 2048)
EXTRA = (0, 8, 32, 128, 512, 2048)
DEAR_KEYS = 2048  # so many more keys cost a token as much again; measured on 135M parameters


@cache
def token_buckets(most: int) -> tuple[int, ...]:
    """16, 24, 32, 48, 64, ... up to the first that holds `most`."""
    sizes = [16]
    while sizes[-1] < most:
        last = sizes[-1]
        sizes.append(last * 3 // 2 if last & (last - 1) == 0 else last * 4 // 3)
    return tuple(sizes)


def bucket(size: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds `size`; beyond the last one the next multiple of it."""
    place = bisect_left(buckets, size)
    return buckets[place] if place < len(buckets) else -(-size // buckets[-1]) * buckets[-1]


def token_bucket(size: int) -> int:
    return bucket(size, token_buckets(max(size, 1)))


def past_bucket(size: int) -> int:
    """Keys and values kept: 0, or at least 64, so that short prefixes do not each have a size of their own."""
    return 0 if size == 0 else token_bucket(max(size, 64))


def describe_buckets(most_tokens: int) -> tuple[str, ...]:
    """The sizes to which calls are padded, by what is padded, for the card."""
    tokens = token_buckets(most_tokens)
    sizes = {
        "rows": ROWS,
        "row_tokens": tokens,
        "past_tokens": tuple(dict.fromkeys((0, *(past_bucket(size) for size in tokens)))),
        "side_by_side": SIDE_BY_SIDE,
        "read_rows": READ_ROWS,
        "top_k": TOP,
        "extra_ids": EXTRA,
    }
    return tuple(f"{name} {' '.join(map(str, values))}" for name, values in sizes.items())


@dataclass(frozen=True)
class MaskShape:
    """Of the masks given to a call: how many distinct layers there are, whether heads differ, what is zeroed."""

    distinct: int
    by_head: bool
    zeroed: bool


@dataclass(frozen=True)
class LoraShape:
    adapters: int
    rank: int
    roles: tuple[str, ...]  # of the linear layers that any of the adapters changes


class Reach(StrEnum):
    """Which layers a call runs. Where a fork is, comes with the call: one function serves every layer of it."""

    WHOLE = "whole"
    BELOW = "below a fork"  # hands out states instead of what the head reads
    ABOVE = "above a fork"  # begins with such states


@dataclass(frozen=True)
class Span:
    """A reach in a model of so many layers, and the very layers."""

    reach: Reach
    layers: range


@dataclass(frozen=True)
class CallShape:
    """Key of a compiled forward: `pasts` kept pasts, `rows` rows behind each of them, `tokens` a row."""

    pasts: int
    rows: int
    tokens: int
    past_tokens: int  # bucket of the kept past; 0 = there is none
    keep: bool = False  # hand out the rows' keys and values (rows is 1 then)
    mask: MaskShape | None = None
    lora: LoraShape | None = None
    reach: Reach = Reach.WHOLE

    @property
    def size(self) -> int:
        """Token places."""
        return self.pasts * self.rows * self.tokens

    @property
    def name(self) -> str:
        """For records and people: rows x tokens + kept past, the same for every mask and adapter."""
        past = f"+{self.past_tokens}" if self.past_tokens else ""
        return f"{self.pasts * self.rows}x{self.tokens}{past}"


@dataclass(frozen=True)
class RowPlan:
    """Which segments share a row: `places[i]` = (row, first token) of segment i."""

    rows: int
    tokens: int
    places: tuple[tuple[int, int], ...]

    @property
    def cost(self) -> float:
        """Padded tokens; a row's own attention makes long rows a little dearer."""
        return self.rows * self.tokens * (1 + self.tokens / DEAR_KEYS)


@lru_cache(maxsize=64)  # a batch is planned twice: when it is made ready, and when it runs
def pack(lengths: tuple[int, ...], kinds: tuple[Hashable, ...], liked: frozenset[tuple[int, int]]) -> RowPlan:
    """Pack segments into equal rows so that little is padding: first fit, longest first, at every bucket. Only
    segments of one kind share a row.

    `liked` are (rows, tokens) that are compiled already: the smallest of them is taken when it costs at most a fifth
    more than the best, since a compilation costs more than that.
    """
    longest = max(lengths)
    widest = max(token_bucket(longest), min(256, token_bucket(sum(lengths))))
    plans = [_first_fit(lengths, kinds, width) for width in token_buckets(widest) if width >= longest]
    best = min(plans, key=lambda plan: plan.cost)
    for plan in sorted(plans, key=lambda plan: plan.cost):
        for rows in (rows for rows in ROWS if rows >= plan.rows):
            grown = RowPlan(rows, plan.tokens, plan.places)
            if (rows, plan.tokens) in liked and grown.cost <= 1.2 * best.cost:
                return grown
    return best


def _first_fit(lengths: Sequence[int], kinds: Sequence[Hashable], width: int) -> RowPlan:
    filled: list[tuple[int, Hashable]] = []
    places: dict[int, tuple[int, int]] = {}
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        size, kind = lengths[index], kinds[index]
        fits = (row for row, (used, other) in enumerate(filled) if used + size <= width and other == kind)
        row = next(fits, len(filled))
        if row == len(filled):
            filled.append((0, kind))
        used = filled[row][0]
        places[index] = (row, used)
        filled[row] = (used + size, kind)
    return RowPlan(bucket(len(filled), ROWS), width, tuple(places[i] for i in range(len(lengths))))
