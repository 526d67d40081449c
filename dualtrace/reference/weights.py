"""Taking a checkpoint's tensors, each by name and shape, until none is left.

It knows names and shapes. It must not know what the tensors do; the families' modules do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dualtrace.arrays import FloatArray
from dualtrace.checkpoint import Checkpoint
from dualtrace.models.harmless import BUFFERS
from dualtrace.problems import InvalidArgument, Reason


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b. The name is the module's, as adapters call it."""

    name: str
    weight: FloatArray  # [out, in] float64
    bias: FloatArray | None = None  # [out]


Project = Callable[[Linear, FloatArray], FloatArray]
"""How a linear layer is applied to [T, in]: `project` below, or one that adds an adapter's term by `Linear.name`."""


def project(layer: Linear, inputs: FloatArray) -> FloatArray:
    output = inputs @ layer.weight.T
    return output if layer.bias is None else output + layer.bias


class TensorTaker:
    """Hands out each tensor once, in float64, and in the end refuses what nobody took."""

    def __init__(self, checkpoint: Checkpoint, prefix: str = "", *, modules: str | None = None) -> None:
        """`prefix` of the tensors' names, and of the modules' names where that is another."""
        self._checkpoint = checkpoint
        self._prefix = prefix
        self._modules = prefix if modules is None else modules
        self._left = {name for name in checkpoint.tensors if not BUFFERS.fullmatch(name)}

    def take(self, name: str, shape: tuple[int, ...], *, prefixed: bool = True) -> FloatArray:
        full = self._prefix + name if prefixed else name
        entry = self._checkpoint.tensors.get(full)
        if entry is None:
            raise InvalidArgument(
                Reason.MODEL_INVALID, f"the checkpoint has no tensor {full!r}, which its config needs."
            )
        if entry.shape != shape:
            raise InvalidArgument(
                Reason.MODEL_INVALID, f"tensor {full!r} has the shape {entry.shape}; its config asks for {shape}."
            )
        self._left.discard(full)
        return self._checkpoint.values(full, np.float64)

    def linear(self, name: str, outputs: int, inputs: int, *, bias: bool, transposed: bool = False) -> Linear:
        """`transposed`: the file holds [in, out], as GPT-2's Conv1D does."""
        weight = self.take(f"{name}.weight", (inputs, outputs) if transposed else (outputs, inputs))
        weight = weight.T if transposed else weight
        return Linear(self._modules + name, weight, self.take(f"{name}.bias", (outputs,)) if bias else None)

    def head(self, name: str, embedding_name: str, embedding: FloatArray, *, tied: bool) -> FloatArray:
        """The output matrix [V, hidden]: the embedding itself when tied, and then a stored copy must equal it."""
        if not tied:
            return self.take(name, embedding.shape, prefixed=False)
        if name in self._left:
            copy, original = self._checkpoint.tensors[name], self._checkpoint.tensors[self._prefix + embedding_name]
            same = (copy.dtype, copy.shape) == (original.dtype, original.shape)
            if not same or not np.array_equal(self._checkpoint.raw(name), self._checkpoint.raw(original.name)):
                raise InvalidArgument(
                    Reason.MODEL_INVALID,
                    f"the config ties the head to the embedding, but {name!r} differs from {original.name!r}; "
                    "set tie_word_embeddings to false or remove the tensor.",
                )
            self._left.discard(name)
        return embedding

    def finish(self) -> None:
        if self._left:
            names = sorted(self._left)
            raise InvalidArgument(
                Reason.MODEL_INVALID,
                f"the checkpoint holds {len(names)} tensors that the model has no use for, first {names[0]!r}; "
                "it is of another architecture than its config says.",
            )
