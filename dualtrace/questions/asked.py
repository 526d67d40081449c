"""The questions, as asked: plain values, checked for their own shape and against nothing else.

It must not know models, tokenizers or the wire.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dualtrace.arrays import IntArray
from dualtrace.card import QuestionKind
from dualtrace.masks.packing import Convention
from dualtrace.masks.spec import MaskSpec, SegmentName, Span
from dualtrace.tokens import Boundary, Prefix
from dualtrace.views import BASE, View


@dataclass(frozen=True, eq=False)
class Input:
    """Text or ids, exactly one. Empty ids are not the same as no ids."""

    text: str | None = None
    ids: IntArray | None = None  # [T] int32

    def __post_init__(self) -> None:
        assert (self.text is None) != (self.ids is None), "an Input is text or ids"


DEFAULT_PREFIX = Prefix()


@dataclass(frozen=True)
class Variant:
    """The face and the mask under which a question is asked."""

    view: View = BASE
    mask: MaskSpec | None = None  # None: the model's own attention, without a receipt
    allow_leak: bool = False  # answer rows that see the token they predict

    @property
    def is_plain(self) -> bool:
        return self.view.is_plain and self.mask is None


PLAIN = (Variant(),)


@dataclass(frozen=True)
class LogprobItem:
    prompt: Input
    completion: Input


@dataclass(frozen=True)
class LogprobQuestion:
    """log p(completion | prompt), token by token."""

    items: tuple[LogprobItem, ...]
    boundary: Boundary | None = None  # None: JOINT
    prefix: Prefix = DEFAULT_PREFIX
    top_k: int = 0
    variants: tuple[Variant, ...] = PLAIN
    deterministic: bool = False
    kind = QuestionKind.LOGPROB


@dataclass(frozen=True)
class RollingQuestion:
    """Per-token logprobs of whole texts, in windows where they are longer than the model."""

    inputs: tuple[Input, ...]
    prefix: Prefix = DEFAULT_PREFIX
    max_tokens: int | None = None  # inputs in one window; None: the model's positions
    stride: int | None = None  # None: max_tokens
    top_k: int = 0
    variants: tuple[Variant, ...] = PLAIN
    deterministic: bool = False
    kind = QuestionKind.ROLLING_LOGPROB


@dataclass(frozen=True)
class NextTokenQuestion:
    """The most likely tokens at the position after each prompt."""

    prompts: tuple[Input, ...]
    top_k: int = 0
    extra_token_ids: tuple[int, ...] = ()
    prefix: Prefix = DEFAULT_PREFIX
    variants: tuple[Variant, ...] = PLAIN
    deterministic: bool = False
    kind = QuestionKind.NEXT_TOKEN_DIST


@dataclass(frozen=True)
class ScoreQuestion:
    """The Score API: probabilities of label tokens after query + item."""

    query: Input
    items: tuple[Input, ...]
    labels: tuple[int, ...] | None = None  # the same for each item ...
    item_labels: tuple[tuple[int, ...], ...] | None = None  # ... or one list per item
    apply_softmax: bool = False
    temperature: float | None = None  # None: 1, and only with apply_softmax
    item_first: bool = False
    packing: Convention | None = None  # None: each item is its own sequence
    delimiter_token_id: int | None = None  # only with packing
    variants: tuple[Variant, ...] = PLAIN
    deterministic: bool = False
    kind = QuestionKind.SCORE


@dataclass(frozen=True)
class TokenizeQuestion:
    inputs: tuple[Input, ...]
    special_tokens: bool = False
    kind = QuestionKind.TOKENIZE


@dataclass(frozen=True)
class PreflightQuestion:
    """Are the numbers sane? One forward per view on a sentinel text; no views means base alone."""

    views: tuple[View, ...] = (BASE,)


@dataclass(frozen=True)
class MaskedForwardQuestion:
    """One sequence under many masks and views, each read as Logprob, with receipts and exact KL."""

    input: Input
    variants: tuple[Variant, ...]
    segments: tuple[tuple[SegmentName, tuple[int, int]], ...] = ()  # named token ranges
    reads: tuple[Span, ...] = ()  # (): every token that can be scored
    prefix: Prefix = DEFAULT_PREFIX
    top_k: int = 0
    kl_base_masked: bool = False  # KL(base || masked) at every token read
    kl_masked_base: bool = False
    deterministic: bool = False
    kind = QuestionKind.MASKED_FORWARD


class MaskForm(Enum):
    RUNS = "RUNS"
    NPY = "NPY"
    PNG = "PNG"


@dataclass(frozen=True)
class MaskWhy:
    """Why may, or may not, this row see this key?"""

    layer: int
    head: int
    query: int
    key: int


@dataclass(frozen=True)
class ExplainMaskQuestion:
    """What a mask allows over one sequence, without a forward."""

    input: Input
    mask: MaskSpec
    segments: tuple[tuple[SegmentName, tuple[int, int]], ...] = ()
    prefix: Prefix = DEFAULT_PREFIX
    layer: int | None = None  # None together with head: the union over all
    head: int | None = None
    forms: tuple[MaskForm, ...] = ()
    allow_large: bool = False
    why: tuple[MaskWhy, ...] = ()
    kind = QuestionKind.EXPLAIN_MASK


@dataclass(frozen=True)
class ArtifactQuestion:
    """Keep these bytes: they will be named by their digest."""

    data: bytes
    digest: str  # "sha256:...", as announced by the sender


StreamQuestion = LogprobQuestion | RollingQuestion | MaskedForwardQuestion
ForwardQuestion = StreamQuestion | NextTokenQuestion | ScoreQuestion
Question = ForwardQuestion | TokenizeQuestion | PreflightQuestion | ExplainMaskQuestion | ArtifactQuestion
