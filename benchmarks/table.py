"""The table that every benchmark fills: what was measured, in which shape, and the figure.

It knows rows of text and how figures of several rounds become one. It must not know what is measured.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


class Missing(Exception):  # noqa: N818 - it is told in the table, and the run goes on
    """Something that a row compares with is not there; says what and why."""


@dataclass(frozen=True)
class Row:
    what: str
    shape: str
    seen: str
    target: str = ""
    note: str = ""


def spread(values: Sequence[float], unit: str = "ms", scale: float = 1e3) -> str:
    """`median (min-max)`."""
    low, high = min(values) * scale, max(values) * scale
    digits = 2 if high < 100 and scale == 1 else 1 if high < 1000 else 0
    return f"{statistics.median(values) * scale:.{digits}f} {unit} ({low:.{digits}f}-{high:.{digits}f})"


def ratio(left: Sequence[float], right: Sequence[float]) -> str:
    """How many times `right` `left` is: of each round by itself, for both sides of a round met the same machine."""
    return spread([one / other for one, other in zip(left, right, strict=True)], "×", 1)


def largest_difference(left: Sequence[float], right: Sequence[float]) -> str:
    return f"max |difference| {max(abs(a - b) for a, b in zip(left, right, strict=True)):.1e}"


def print_rows(rows: Sequence[Row], load_before: float) -> None:
    load = os.getloadavg()[0]
    cores = len(os.sched_getaffinity(0))
    table = Table(
        title=f"{time.strftime('%Y-%m-%d %H:%M')}, {cores} cores, load {load_before:.1f} before and {load:.1f} after "
        "(our own work counts); median (min-max) of alternating runs"
    )
    for name in ("what", "shape", "seen", "target", "note"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(row.what, row.shape, row.seen, row.target, row.note)
    console = Console()
    console.print(table) if console.is_terminal else Console(width=180).print(table)
