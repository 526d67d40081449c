"""Both traces as a few lines of blocks: how surprising each token was on either side, and where they part.

Pure: pairs in, lines out. It must not know terminals beyond their width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.text import Text

from dualtrace.cli.pair_book import ItemPairs
from dualtrace.compare.pass_rule import TokenStatus

BLOCKS = "▁▂▃▄▅▆▇█"
LABELS = ("left", "right", "|Δ|")
LABEL_WIDTH = 6
NOTE_WIDTH = 28
FEWEST = 4
"""Fewer tokens than this are seen at a glance in the table."""


def plot_traces(pairs: ItemPairs, width: int) -> list[Text]:
    """A line for each side and one for the difference, which is on a logarithmic scale; [] where there is little."""
    deltas = [None if (value := pairs.delta(place)) is None else abs(value) for place in range(len(pairs))]
    if sum(delta is not None for delta in deltas) < FEWEST:
        return []
    room = max(10, min(width - LABEL_WIDTH - NOTE_WIDTH, len(pairs)))
    left = shrink([_surprise(value) for value in pairs.left_logprobs], room)
    right = shrink([_surprise(value) for value in pairs.right_logprobs], room)
    apart = shrink(deltas, room)
    top = max((value for value in (*left, *right) if value is not None), default=0.0)
    lines = [
        _line(LABELS[0], draw(left, top), f"  0 to {top:.1f} nats"),
        _line(LABELS[1], draw(right, top), "", mark_bad(pairs, len(right))),
        _line(LABELS[2], draw_apart(apart), _range_of(apart)),
    ]
    mark = _mark_divergence(pairs, len(apart))
    return lines if mark is None else [*lines, mark]


def shrink(values: Sequence[float | None], columns: int) -> list[float | None]:
    """At most so many columns, each the largest of its tokens: a spike is never averaged away."""
    count = len(values)
    columns = min(columns, count)
    found: list[float | None] = []
    for column in range(columns):
        part = [one for one in values[column * count // columns : (column + 1) * count // columns] if one is not None]
        found.append(max(part) if part else None)
    return found


def draw(values: Sequence[float | None], top: float) -> str:
    return "".join(" " if value is None else _block(value / top if top > 0 else 0.0) for value in values)


def draw_apart(values: Sequence[float | None]) -> str:
    """From 1e-12 to 100 nats in the eight blocks; a dot is no difference at all."""
    return "".join(
        " " if value is None else "·" if value == 0 else _block((math.log10(max(value, 1e-12)) + 12) / 14)
        for value in values
    )


def _block(share: float) -> str:
    return BLOCKS[min(len(BLOCKS) - 1, max(0, int(share * len(BLOCKS))))]


def _surprise(logprob: float | None) -> float | None:
    """In nats; what is no number is drawn at its limits."""
    if logprob is None or math.isnan(logprob):
        return None
    return min(100.0, max(0.0, -logprob))


def _range_of(apart: Sequence[float | None]) -> str:
    known = [value for value in apart if value is not None and math.isfinite(value)]
    return f"  up to {max(known):.3g} nats, log" if known and max(known) > 0 else "  no difference"


def mark_bad(pairs: ItemPairs, columns: int) -> list[bool]:
    """Columns that hold a token out of tolerance."""
    count = len(pairs)
    bad = [status in {TokenStatus.MISMATCH, TokenStatus.ID_MISMATCH} for status in pairs.statuses]
    return [any(bad[column * count // columns : (column + 1) * count // columns]) for column in range(columns)]


def _line(label: str, drawn: str, note: str, marks: Sequence[bool] = ()) -> Text:
    line = Text(label.ljust(LABEL_WIDTH), "dim", no_wrap=True)
    for place, block in enumerate(drawn):
        line.append(block, "bold red" if place < len(marks) and marks[place] else "cyan")
    line.append(note, "dim")
    return line


def _mark_divergence(pairs: ItemPairs, columns: int) -> Text | None:
    if pairs.divergence is None or pairs.divergence.index not in pairs.indices:
        return None
    place = pairs.indices.index(pairs.divergence.index)
    column = min(columns - 1, place * columns // len(pairs))
    return Text(" " * (LABEL_WIDTH + column) + f"^ token {pairs.divergence.index}", "bold red", no_wrap=True)
