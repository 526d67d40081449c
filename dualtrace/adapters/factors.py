"""The factors of a delta. It knows arrays; it must not know where they came from or who multiplies them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Factors:
    """One module's low-rank term: delta(x) = strength * scaling * (x @ a.T) @ b.T"""

    a: Matrix  # [r, in] float32, read-only; may hold NaN
    b: Matrix  # [out, r] float32, read-only; may hold NaN
    scaling: float  # alpha / r, or alpha / sqrt(r)


@dataclass(frozen=True, eq=False)
class Delta:
    """What one view adds. A view without a delta has none of these at all: 0 * NaN must not reach its rows."""

    key: str  # identity of the factors, without the strength: equal keys share one copy on a device
    factors: Mapping[str, Factors]  # module name, as "model.layers.0.self_attn.q_proj" -> its factors
    strength: float  # lambda, never 0

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that get a delta, sorted."""
        return tuple(sorted(self.factors))


def read_only(values: Matrix) -> Matrix:
    values.setflags(write=False)
    return values
