"""What an engine says of its model: everything planning and validation need to know, and nothing that changes.

It knows plain values. It must not know how a model is run or served.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class ModelProvenance:
    """What decides the numbers, constant while an engine lives. Its digest is part of a run's identity."""

    model_id: str
    revision: str
    family: str  # "llama", "gpt2", ...
    weights_digest: str  # "sha256:..." as `checkpoint.weights_digest`
    tokenizer_digest: str  # "sha256:..."; empty when the scorer knows no tokenizer
    framework: str  # "reference", "torch", "jax", "fake", "python"
    framework_version: str
    dtype: str  # "float64", "float32", "bfloat16", ...
    matmul_precision: str  # "float64", "highest", "tf32", ...
    device: str  # "cpu", "cuda:0 NVIDIA ..."
    attention_implementation: str
    adapter_digests: tuple[tuple[str, str], ...] = ()  # (adapter name, digest), sorted by name
    synthetic: bool = False  # True when no model stands behind the numbers (fake engine)

    def digest(self) -> str:
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class EngineCapabilities:
    """What an engine can do. What is not listed as able is refused by name, never served half."""

    steps: bool = False  # a long segment is answered in several Steps
    shares_prefixes: bool = False  # a parent's tokens are computed once for all its children
    deterministic: bool = False  # with `Batch.deterministic` the answer is bit-equal whatever stands beside it
    masks: bool = False  # Segment.mask is obeyed and counted
    views: bool = False  # Segment.view is obeyed
    contrasts: bool = False  # Read.against is obeyed


@dataclass(frozen=True)
class ModelCard:
    """What the model is: everything planning and validation need to know, and nothing that changes."""

    provenance: ModelProvenance
    capabilities: EngineCapabilities
    vocab_size: int  # the logit width: ids 0 .. vocab_size-1 can be scored
    max_positions: int  # the longest sequence of inputs one window may hold
    layers: int
    query_heads: int
    kv_heads: int
    hidden_size: int
    windows: tuple[int | None, ...] = ()  # native sliding window per layer in positions, None = full; () = all full
    buckets: tuple[str, ...] = ()  # sizes to which calls are padded, by what is padded: "rows 1 2 4"; () = no padding
