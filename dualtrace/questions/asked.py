"""The questions, as asked: plain values, checked for their own shape and against nothing else.

It must not know models, tokenizers or the wire.
"""

from __future__ import annotations

from dataclasses import dataclass

from dualtrace.card import QuestionKind
from dualtrace.engine import IntArray
from dualtrace.tokens import Boundary, Prefix


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
    """The face and the mask under which a question is asked. Base and causal until masks and views arrive."""


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

    views: int = 1


StreamQuestion = LogprobQuestion | RollingQuestion
ForwardQuestion = StreamQuestion | NextTokenQuestion | ScoreQuestion
Question = ForwardQuestion | TokenizeQuestion | PreflightQuestion
