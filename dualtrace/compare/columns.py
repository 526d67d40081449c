"""A column of numbers that grows while it is filled. It must not know what the numbers mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


class Column:
    """Appending costs little on average, and a number takes no more than its own bytes twice."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._values: npt.NDArray[Any] = np.empty(0, dtype)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, values: npt.NDArray[Any]) -> None:
        needed = self._size + len(values)
        if needed > len(self._values):
            grown = np.empty(max(needed, 2 * len(self._values), 64), self._values.dtype)
            grown[: self._size] = self._values[: self._size]
            self._values = grown
        self._values[self._size : needed] = values
        self._size = needed

    @property
    def values(self) -> npt.NDArray[Any]:
        return self._values[: self._size]
