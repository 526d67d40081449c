"""The two sides of a comparison, what each must be called, and what is known of one beside its numbers.

Left is the baseline. It must not know who answers, or how.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from dualtrace.problems import Problem
from dualtrace.questions.asked import Variant
from dualtrace.runs.run import Run


class SideName(StrEnum):
    LEFT = "LEFT"
    RIGHT = "RIGHT"

    @property
    def other(self) -> SideName:
        return SideName.RIGHT if self is SideName.LEFT else SideName.LEFT


SIDES = (SideName.LEFT, SideName.RIGHT)


@dataclass(frozen=True)
class SideFacts:
    """What the comparer knows of a side and the comparator cannot see in its answer."""

    target: str  # as written by whoever asked
    variant: Variant = Variant()  # noqa: RUF009 - frozen
    run: Run | None = None  # as far as it came
    total_seconds: float | None = None  # of the whole call; None for a stored run
    problem: Problem | None = None  # why it gave up; None when it did not
