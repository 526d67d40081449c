"""What streamed events and unary answers have in common: columns of numbers, usage, and what was applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dualtrace.arrays import FloatArray, IntArray
from dualtrace.questions.answers import (
    Applied,
    Usage,
)
from dualtrace.v1 import scoring_pb2 as pb
from dualtrace.wire.mask import metadata_from_pb, metadata_to_pb, receipt_from_pb, receipt_to_pb


def ints(values: Sequence[int]) -> IntArray:
    return np.array(values, dtype=np.int32)


def floats(values: Sequence[float]) -> FloatArray:
    return np.array(values, dtype=np.float64)


def applied_to_pb(applied: Applied | None) -> dict[str, Any]:
    if applied is None:
        return {}
    return {"receipt": receipt_to_pb(applied.receipt), "mask": metadata_to_pb(applied.metadata)}


def applied_from_pb(message: pb.ItemDone | pb.ScoreResult | pb.NextTokens) -> Applied | None:
    if not (message.HasField("receipt") and message.HasField("mask")):
        return None
    return Applied(metadata_from_pb(message.mask), receipt_from_pb(message.receipt))


def usage_to_pb(usage: Usage) -> pb.Usage:
    return pb.Usage(prompt_tokens=usage.prompt_tokens, computed_tokens=usage.computed_tokens)


def usage_from_pb(message: pb.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.computed_tokens)
