"""The answers: what a Scorer yields, event by event. Plain values; it must not know the wire or the engine.

A streamed answer is AnswerHeader, then TokenChunk, ItemDone and ItemProblem in any interleaving of items, then
AnswerSummary once. A unary answer is one event of its own kind. Absent is None, never a number.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dualtrace.arrays import FloatArray, IntArray
from dualtrace.model_card import ModelProvenance
from dualtrace.problems import Problem
from dualtrace.tokens import Tokens


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int  # as composed, all items and variants
    computed_tokens: int  # that the model really ran


@dataclass(frozen=True)
class Execution:
    """How a call was executed; never part of an identity."""

    queue_seconds: float = 0.0
    tokenize_seconds: float = 0.0
    compute_seconds: float = 0.0
    total_seconds: float = 0.0
    batches: int = 0
    computed_tokens: int = 0
    shared_tokens: int = 0
    step_tokens: int = 0
    deterministic: bool = False
    buckets: tuple[str, ...] = ()
    padded_tokens: int = field(default=0, metadata={"later": True})  # documents of 1.0 were written without it
    server_version: str = ""


@dataclass(frozen=True)
class MaskReceipt:
    """What an engine really applied, as `masks.receipt` defines it; counts per layer and head stand in the digest."""

    effective_mask_digest: str
    layers_hit: tuple[int, ...]
    heads_hit: tuple[tuple[int, ...], ...]  # one entry per layer of layers_hit
    layers_applied: tuple[int, ...]
    heads_applied: tuple[tuple[int, ...], ...]
    entries_cut: int
    entries_cut_that_base_allowed: int
    rows_emptied: int


@dataclass(frozen=True)
class MaskMetadata:
    name: str
    digest: str
    shape: str
    sparsity: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Applied:
    """The mask of one item under one variant: what was asked, and the proof that it was done."""

    metadata: MaskMetadata
    receipt: MaskReceipt


@dataclass(frozen=True)
class RollingWindows:
    count: int
    max_tokens: int
    stride: int


@dataclass(frozen=True, eq=False)
class ItemHeader:
    """What one item was composed of; all empty when it could not be. Indices count tokens without the prefix."""

    token_count: int = 0
    prompt_tokens: int = 0
    scored_start: int | None = None
    prefix_token_id: int | None = None
    boundary_token_merged: bool = False
    unscored: Tokens | None = None
    windows: RollingWindows | None = None


@dataclass(frozen=True, eq=False)
class AnswerHeader:
    provenance: ModelProvenance
    items: tuple[ItemHeader, ...]
    variants: int
    top_k: int
    streams: bool
    has_pieces: bool
    has_offsets: bool
    kl_base_masked: bool = False
    kl_masked_base: bool = False


@dataclass(frozen=True, eq=False)
class TokenChunk:
    """Scored tokens first_index, first_index + 1, ...; all columns have length C."""

    item: int
    variant: int
    first_index: int
    tokens: Tokens  # [C]
    logprobs: FloatArray  # [C] nats
    ranks: IntArray  # [C]
    ties: IntArray  # [C]
    top_ids: IntArray | None = None  # [C, k]
    top_logprobs: FloatArray | None = None  # [C, k]
    kl_base_masked: FloatArray | None = None  # [C] nats
    kl_masked_base: FloatArray | None = None  # [C] nats


@dataclass(frozen=True)
class ItemDone:
    item: int
    variant: int
    scored_tokens: int
    total_logprob: float | None = None  # None when nothing was scored
    mean_logprob: float | None = None
    perplexity: float | None = None
    is_greedy: bool | None = None
    applied: Applied | None = None  # None without a mask
    document_starts: tuple[int, ...] = ()  # tokens that the mask leaves unscored
    delta_modules: tuple[str, ...] = ()  # modules that got an adapter's delta


@dataclass(frozen=True)
class ItemProblem:
    item: int
    variant: int
    problem: Problem


@dataclass(frozen=True)
class AnswerSummary:
    usage: Usage
    execution: Execution
    done: int
    failed: int


@dataclass(frozen=True)
class Tail:
    """The mass outside a list of ids. `logprob` is set only when measured."""

    state: str  # FULL_COVERAGE | MEASURED | UNDERFLOW
    logprob: float | None = None


@dataclass(frozen=True, eq=False)
class NextTokens:
    top_ids: IntArray  # [k]
    top_logprobs: FloatArray  # [k]
    top_pieces: tuple[bytes, ...]  # [k], () when the scorer knows no tokenizer
    tail: Tail
    extra_logprobs: FloatArray  # [E]
    tail_beyond_extra: Tail | None
    vocab_size: int
    prompt_tokens: int  # prefix token included
    prefix_token_id: int | None
    applied: Applied | None = None


@dataclass(frozen=True)
class NextTokenResult:
    item: int
    variant: int
    outcome: NextTokens | Problem


@dataclass(frozen=True)
class ViewReceipt:
    """Which modules got an adapter's delta under a variant. Plain views have none."""

    variant: int
    delta_modules: tuple[str, ...]


@dataclass(frozen=True)
class NextTokenAnswer:
    results: tuple[NextTokenResult, ...]
    provenance: ModelProvenance
    usage: Usage
    execution: Execution
    views: tuple[ViewReceipt, ...] = ()


@dataclass(frozen=True)
class ScoreResult:
    item: int
    variant: int
    prompt_tokens: int
    scores: tuple[float, ...] = ()
    label_logprobs: tuple[float, ...] = ()
    problem: Problem | None = None
    applied: Applied | None = None


@dataclass(frozen=True)
class ScoreAnswer:
    results: tuple[ScoreResult, ...]
    provenance: ModelProvenance
    usage: Usage
    execution: Execution
    views: tuple[ViewReceipt, ...] = ()


@dataclass(frozen=True)
class TokenizeAnswer:
    results: tuple[Tokens | Problem, ...]


@dataclass(frozen=True)
class PreflightResult:
    ok: bool
    problem: Problem | None = None


@dataclass(frozen=True)
class PreflightAnswer:
    results: tuple[PreflightResult, ...]


@dataclass(frozen=True)
class MaskAnswer:
    """Whether a row may see a key, and the rule that decided."""

    may_see: bool
    rule: str


@dataclass(frozen=True, eq=False)
class MaskExplanation:
    metadata: MaskMetadata
    tokens: Tokens
    leaking_rows: tuple[int, ...]
    empty_rows: int  # (layer, head, row) that may see nothing
    rows: tuple[tuple[tuple[int, int], ...], ...] | None = None  # per row the runs [start, end) it may see
    npy: bytes | None = None
    png: bytes | None = None
    answers: tuple[MaskAnswer, ...] = ()


@dataclass(frozen=True)
class ArtifactKept:
    digest: str
    size_bytes: int


StreamEvent = AnswerHeader | TokenChunk | ItemDone | ItemProblem | AnswerSummary
UnaryAnswer = NextTokenAnswer | ScoreAnswer | TokenizeAnswer | PreflightAnswer | MaskExplanation | ArtifactKept
AnswerEvent = StreamEvent | UnaryAnswer
