"""What a planned Score question is: rows, and where in them each answer stands. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from dualtrace.arrays import IntArray
from dualtrace.problems import Problem
from dualtrace.questions.sight import Sight
from dualtrace.rows import Row


@dataclass(frozen=True, eq=False)
class ScorePlace:
    """Where the answer of one item under one variant stands, or the problem that stands there instead."""

    item: int
    variant: int
    prompt_tokens: int = 0
    row: int = 0  # index into the plan's rows
    read_row: int = 0  # the row's own row after which the labels are read
    columns: IntArray | None = None  # [L] the labels' places among the row's extra ids; None: all, in order
    problem: Problem | None = None


@dataclass(frozen=True, eq=False)
class ScorePlan:
    rows: tuple[Row, ...]
    sights: tuple[Sight, ...]  # one per row
    places: tuple[ScorePlace, ...]  # in the order of the answer: all items of the first variant, then the second, ...
    temperature: float | None  # None: no softmax over the labels
    prompt_tokens: int
