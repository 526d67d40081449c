"""When one value of two sides agrees. Pure arithmetic; it must not know what the value measures or whose it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from dualtrace.arrays import FloatArray
from dualtrace.problems import InvalidArgument, Reason


class TokenStatus(StrEnum):
    """What is said of one token's pair of values."""

    MATCH = "MATCH"
    MISMATCH = "MISMATCH"
    UNSCORED = "UNSCORED"  # absent on both sides
    ID_MISMATCH = "ID_MISMATCH"  # the sides read different tokens
    NOT_KEPT = "NOT_KEPT"  # cut by a cap; neither fails nor counts as aligned
    UNAVAILABLE = "UNAVAILABLE"  # a side does not have the field; likewise


CODES: tuple[TokenStatus, ...] = tuple(TokenStatus)
"""A status as a small number: its place here."""

Bools = npt.NDArray[np.bool_]
Codes = npt.NDArray[np.uint8]


def code_of(status: TokenStatus) -> int:
    return CODES.index(status)


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

    def judge_columns(self, left: FloatArray, right: FloatArray, left_there: Bools, right_there: Bools) -> Codes:
        """`judge` for columns of equal length; a value that is not there is not looked at."""
        both = left_there & right_there
        agree = both & self.agree_columns(left, right)
        codes = np.where(agree, code_of(TokenStatus.MATCH), code_of(TokenStatus.MISMATCH))
        codes[~left_there & ~right_there] = code_of(TokenStatus.UNSCORED)
        return codes.astype(np.uint8)

    def agree_columns(self, left: FloatArray, right: FloatArray) -> Bools:
        with np.errstate(invalid="ignore", over="ignore"):  # inf - inf, which is decided below
            room = self.abs_epsilon + self.rel_epsilon * np.maximum(np.abs(left), np.abs(right))
            near = np.abs(left - right) <= room
        near &= np.isfinite(left) & np.isfinite(right)
        agreed: Bools = near | ((left == -math.inf) & (right == -math.inf))
        return agreed
