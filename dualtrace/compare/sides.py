"""The two sides of a comparison, and what each must be called. Left is the baseline; it must not know who answers."""

from __future__ import annotations

from enum import StrEnum


class SideName(StrEnum):
    LEFT = "LEFT"
    RIGHT = "RIGHT"

    @property
    def other(self) -> SideName:
        return SideName.RIGHT if self is SideName.LEFT else SideName.LEFT


SIDES = (SideName.LEFT, SideName.RIGHT)
