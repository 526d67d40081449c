"""A linear layer with an adapter's term. It knows linear layers and factors. It must not know views or batches."""

from __future__ import annotations

import numpy as np

from dualtrace.adapters import Delta
from dualtrace.arrays import FloatArray
from dualtrace.reference.weights import Linear, project


class AdaptedProject:
    """`weights.Project` that adds the delta, and remembers which modules got it."""

    def __init__(self, delta: Delta) -> None:
        self._delta = delta
        self._hit: set[str] = set()

    def __call__(self, layer: Linear, inputs: FloatArray) -> FloatArray:
        output = project(layer, inputs)
        factors = self._delta.factors.get(layer.name)
        if factors is None:
            return output
        self._hit.add(layer.name)
        narrow = inputs @ factors.a.T.astype(np.float64)  # [T, r]
        return output + (self._delta.strength * factors.scaling) * (narrow @ factors.b.T.astype(np.float64))

    def modules(self) -> tuple[str, ...]:
        """The modules that got a delta so far, sorted."""
        return tuple(sorted(self._hit))
