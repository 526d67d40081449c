"""When one value of two sides agrees. Pure arithmetic; it must not know what the value measures or whose it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from dualtrace.problems import InvalidArgument, Reason


class TokenStatus(StrEnum):
    """What is said of one token's pair of values."""

    MATCH = "MATCH"
    MISMATCH = "MISMATCH"
    UNSCORED = "UNSCORED"  # absent on both sides
    ID_MISMATCH = "ID_MISMATCH"  # the sides read different tokens
    NOT_KEPT = "NOT_KEPT"  # cut by a cap; neither fails nor counts as aligned
    UNAVAILABLE = "UNAVAILABLE"  # a side does not have the field; likewise


@dataclass(frozen=True)
class PassRule:
    """|l - r| <= abs_epsilon + rel_epsilon * max(|l|, |r|), for finite values; printed in every report."""

    abs_epsilon: float
    rel_epsilon: float

    def __post_init__(self) -> None:
        for name, value in (("abs_epsilon", self.abs_epsilon), ("rel_epsilon", self.rel_epsilon)):
            if not math.isfinite(value):
                message = f"{name} {value} asked; it must be a finite number, 0 or above"
                raise InvalidArgument(Reason.NOT_FINITE, message, field=name, allowed=">= 0")
            if value < 0:
                message = f"{name} {value} asked; it must be 0 or above"
                raise InvalidArgument(Reason.OUT_OF_RANGE, message, field=name, allowed=">= 0")

    def judge(self, left: float | None, right: float | None) -> TokenStatus:
        """None is an absent value, which is never a number: it agrees with an absent one only."""
        if left is None and right is None:
            return TokenStatus.UNSCORED
        if left is None or right is None:
            return TokenStatus.MISMATCH
        return TokenStatus.MATCH if self.agrees(left, right) else TokenStatus.MISMATCH

    def agrees(self, left: float, right: float) -> bool:
        """NaN and +inf agree with nothing, not even themselves; -inf agrees with -inf alone."""
        if left == -math.inf or right == -math.inf:
            # Asked first: the rule below would hold inf <= inf for true.
            return left == right
        if not (math.isfinite(left) and math.isfinite(right)):
            return False
        return abs(left - right) <= self.abs_epsilon + self.rel_epsilon * max(abs(left), abs(right))
