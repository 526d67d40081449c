"""Writing a safetensors file tensor by tensor, so that a model is never held in memory as a whole.

It knows the file format. It must not know what the tensors are for.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dualtrace.problems import Internal, Reason

Pieces = Iterable[npt.NDArray[Any]]


@dataclass(frozen=True)
class FloatTensor:
    """A float32 tensor that is still to be made: `pieces()` gives its values in order, in parts of any shape."""

    name: str
    shape: tuple[int, ...]
    pieces: Callable[[], Pieces]


def write_weights(
    file: Path, tensors: Sequence[FloatTensor], written: Callable[[int, int], None] | None = None
) -> None:
    """Write float32 tensors in the order given and flush them to the disk. `written(bytes so far, all bytes)`."""
    sizes = [4 * math.prod(tensor.shape) for tensor in tensors]
    header = _header(tensors, sizes)
    total, done = sum(sizes), 0
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for tensor, size in zip(tensors, sizes, strict=True):
            expected = done + size
            for piece in tensor.pieces():
                part = np.ascontiguousarray(piece, dtype="<f4")
                stream.write(part.data)
                done += part.nbytes
                if written is not None:
                    written(done, total)
            if done != expected:
                raise Internal(Reason.BUG, f"tensor {tensor.name!r} came to {done - expected + size} of {size} bytes.")
        stream.flush()
        os.fsync(stream.fileno())


def _header(tensors: Sequence[FloatTensor], sizes: list[int]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # readers of the field insist on this mark
    at = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        entries[tensor.name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":"))
    return (text + " " * (-len(text) % 8)).encode()  # the data starts at a multiple of eight, so maps are aligned
