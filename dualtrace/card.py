"""What a scorer says of itself: its model, what it can do, and up to which size.

It knows the engine's card and the tokenizer's facts. It must not know how either is served.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from dualtrace.model_card import ModelCard, ModelProvenance


class QuestionKind(Enum):
    """The questions of the service; values are the names of the proto enum without their prefix."""

    TOKENIZE = "TOKENIZE"
    LOGPROB = "LOGPROB"
    ROLLING_LOGPROB = "ROLLING_LOGPROB"
    NEXT_TOKEN_DIST = "NEXT_TOKEN_DIST"  # noqa: S105 - not a password
    SCORE = "SCORE"
    MASKED_FORWARD = "MASKED_FORWARD"
    EXPLAIN_MASK = "EXPLAIN_MASK"


@dataclass(frozen=True)
class Limits:
    """Above these a request is refused with the limit in its message. All but max_positions are settings."""

    max_positions: int
    max_items: int = 1024
    max_top_k: int = 1000
    max_request_tokens: int = 131_072  # a text counts once for each variant that it is asked under
    max_request_chars: int = 4_000_000
    max_work_tokens: int = 8_388_608  # forward tokens one request may cause before sharing (overlapping windows)
    max_inline_array_bytes: int = 1_048_576


@dataclass(frozen=True)
class Capabilities:
    """What can be asked. What is not listed is refused by name."""

    questions: tuple[QuestionKind, ...]
    text: bool  # False: token ids only
    streams: bool = False
    shares_prefixes: bool = False
    deterministic: bool = False
    masks: bool = False
    views: bool = False
    ranks: bool = True
    distributions: bool = True


@dataclass(frozen=True)
class Card:
    """The answer to Describe."""

    provenance: ModelProvenance
    capabilities: Capabilities
    limits: Limits
    vocab_size: int
    layers: int
    query_heads: int
    kv_heads: int
    hidden_size: int
    windows: tuple[int | None, ...] = ()
    buckets: tuple[str, ...] = ()
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    tokenizer_prefix_ids: tuple[int, ...] = ()
    adapters: tuple[str, ...] = field(default=())
    server_version: str = ""


def limits_for(model: ModelCard, configured: Limits) -> Limits:
    """The configured limits, cut down to what this model has."""
    return Limits(
        max_positions=model.max_positions,
        max_items=configured.max_items,
        max_top_k=min(configured.max_top_k, model.vocab_size),
        max_request_tokens=configured.max_request_tokens,
        max_request_chars=configured.max_request_chars,
        max_work_tokens=configured.max_work_tokens,
        max_inline_array_bytes=configured.max_inline_array_bytes,
    )
