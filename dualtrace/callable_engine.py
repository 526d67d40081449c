"""An engine over any Python function `logits(ids[T]) -> [T, V]`: ten lines make a private port comparable.

The function is called once per row with int32 ids; what it returns is read in float64. It is the caller's own code,
named by the caller on the caller's own machine: nothing that comes over the network ever names one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dualtrace.arrays import FloatArray, IntArray
from dualtrace.engine import Batch, Live, Readout, Reads, Shape, Step
from dualtrace.model_card import EngineCapabilities, ModelCard, ModelProvenance
from dualtrace.problems import Internal, InvalidArgument, Reason
from dualtrace.reference.readout import assemble, read_blocks, read_logits

LogitsFunction = Callable[[IntArray], Any]

DEFAULT_POSITIONS = 1_048_576
"""A function does not say how long a text may be; set `function.max_positions` to say it."""


class CallableEngine:
    """`Engine` over one function. Knows nothing of the model but its logit width, found by one call."""

    def __init__(self, name: str, function: LogitsFunction) -> None:
        self._name = name
        self._function = function
        width = int(self._logits(np.zeros(1, np.int32)).shape[1])
        positions = int(getattr(function, "max_positions", DEFAULT_POSITIONS))
        self._card = _card(name, width, positions)

    @property
    def card(self) -> ModelCard:
        return self._card

    def prepare(self, shape: Shape) -> None:
        """Whatever the function does to get ready it does when called."""

    def close(self) -> None:
        """The function is the caller's."""

    def forward(self, batch: Batch, reads: Reads, live: Live) -> Iterator[Step]:
        for index, read in enumerate(reads):
            if read.rows.size and live(index):
                ids, _positions = batch.expand(index)
                yield (self._answer(index, ids, reads),)

    def _answer(self, index: int, ids: IntArray, reads: Reads) -> Readout:
        logits = self._logits(ids)
        if logits.shape[1] != self._card.vocab_size:
            message = f"{self._name} gave {logits.shape[1]} logits a row, and {self._card.vocab_size} before"
            raise Internal(Reason.ENGINE_FAILED, message)
        blocks = [read_logits(logits[block.rows].astype(np.float64), block) for block in read_blocks(reads[index])]
        return assemble(index, 0, int(ids.size), reads[index], blocks, computed_tokens=int(ids.size))

    def _logits(self, ids: IntArray) -> FloatArray:
        """Whatever array the function gives (numpy, torch on the CPU, JAX), as numpy [T, V]."""
        try:
            given = self._function(ids)
        except Exception as error:
            message = f"{self._name} failed on {ids.size} ids: {type(error).__name__}: {error}"
            raise Internal(Reason.ENGINE_FAILED, message) from error
        detach = getattr(given, "detach", None)
        logits = np.asarray(detach() if detach is not None else given)
        if logits.ndim != 2 or logits.shape[0] != ids.size or not logits.shape[1] or logits.dtype.kind != "f":
            message = (
                f"{self._name} gave {logits.dtype} of shape {list(logits.shape)} for {ids.size} ids;"
                f" it must give floats of shape [{ids.size}, V]"
            )
            raise Internal(Reason.ENGINE_FAILED, message)
        return logits


def load_function(path: str) -> tuple[str, LogitsFunction]:
    """`module:function` as a function; the module is looked for where Python looks and in the current folder."""
    module_name, colon, function_name = path.partition(":")
    if not module_name or not colon or not function_name:
        message = f"py:{path} asked; write py:module:function"
        raise InvalidArgument(Reason.MALFORMED, message, field="target")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module may fail in any way while it is imported
        message = f"cannot import {module_name}: {type(error).__name__}: {error}; run from its folder or install it"
        raise InvalidArgument(Reason.NOT_FOUND, message, field="target") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        message = f"{module_name} has no function {function_name}"
        raise InvalidArgument(Reason.NOT_FOUND, message, field="target")
    return f"py:{path}", function


def _card(name: str, width: int, positions: int) -> ModelCard:
    provenance = ModelProvenance(
        model_id=name,
        revision="",
        family="python",
        weights_digest="",  # a function's weights cannot be known
        tokenizer_digest="",
        framework="python",
        framework_version=".".join(str(part) for part in sys.version_info[:3]),
        dtype="unknown",
        matmul_precision="unknown",
        device="unknown",
        attention_implementation="unknown",
    )
    return ModelCard(
        provenance, EngineCapabilities(), vocab_size=width, max_positions=positions, layers=0, query_heads=0,
        kv_heads=0, hidden_size=0,
    )  # fmt: skip
