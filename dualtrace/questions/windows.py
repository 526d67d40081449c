"""Where the windows of a rolling score lie. Pure arithmetic; it must not know tokens or models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Indices into s = prefix (if any) + ids: feed s[feed_start:feed_stop], score s[score_start:score_stop]."""

    feed_start: int
    feed_stop: int
    score_start: int
    score_stop: int


def window_count(length: int, max_tokens: int, stride: int) -> int:
    """How many windows `windows` yields, without making them."""
    if length < 2:
        return 0
    rest = max(0, length - 1 - max_tokens)
    return 1 + -(-rest // stride)


def windows(length: int, max_tokens: int, stride: int) -> Iterator[Window]:
    """Windows over s of `length` tokens, so that s[1:] is scored, every token exactly once.

    The first window scores as much as it can hold; each later one scores `stride` new tokens and is back-filled
    to `max_tokens` inputs. `stride == max_tokens` is lm-evaluation-harness's disjoint rolling.
    """
    assert 1 <= stride <= max_tokens
    start, stop = 1, min(length, 1 + max_tokens)
    while start < stop:
        yield Window(max(0, stop - 1 - max_tokens), stop - 1, start, stop)
        start, stop = stop, min(length, stop + stride)
