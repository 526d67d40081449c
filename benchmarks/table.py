"""The table that every benchmark fills: what was measured, in which shape, and the figure.

It knows rows of text. It must not know what is measured.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    what: str
    shape: str
    seen: str
    target: str = ""
    note: str = ""


def medians(functions: dict[str, Callable[[], float]], repeats: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Run the functions in turn, A B A B ..., so that a drifting machine hurts all alike; sorted figures by name."""
    figures: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warm_up + repeats):
        for name, function in functions.items():
            value = function()
            if number >= warm_up:
                figures[name].append(value)
    return {name: sorted(values) for name, values in figures.items()}


def spread(values: list[float], unit: str = "ms", scale: float = 1e3) -> str:
    """`median (min-max)`."""
    return f"{statistics.median(values) * scale:.1f} {unit} ({values[0] * scale:.1f}-{values[-1] * scale:.1f})"


def print_rows(rows: list[Row]) -> None:
    load = os.getloadavg()[0]
    cores = len(os.sched_getaffinity(0))
    table = Table(title=f"{time.strftime('%Y-%m-%d')}, {cores} cores, load {load:.1f} at the end; median (min-max)")
    for name in ("what", "shape", "seen", "target", "note"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(row.what, row.shape, row.seen, row.target, row.note)
    Console().print(table)
