"""The shapes that are measured, as seeded ids and the questions over them.

It knows ids and questions. It must not know engines, peers or clocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dualtrace.arrays import IntArray
from dualtrace.engine import int_array
from dualtrace.masks.spec import Edge, MaskSpec, TokenRange
from dualtrace.questions.asked import (
    Input,
    LogprobItem,
    LogprobQuestion,
    MaskedForwardQuestion,
    NextTokenQuestion,
    RollingQuestion,
    Variant,
)

IDS = (100, 49_000)  # plain tokens of the real model: its special ids stand below


def random_ids(seed: int, count: int) -> IntArray:
    return np.random.default_rng(seed).integers(*IDS, count).astype(np.int32)


@dataclass(frozen=True, eq=False)
class SharedPrompt:
    """32 completions of 8-24 tokens, 512 together, on one prompt of 256."""

    prompt: IntArray
    completions: tuple[IntArray, ...]

    @property
    def rows_needed(self) -> int:
        """The prompt once, each completion but its last token, which predicts nothing that is asked."""
        return int(self.prompt.size) + sum(int(c.size) - 1 for c in self.completions)

    @property
    def naive_tokens(self) -> int:
        return sum(int(self.prompt.size + c.size) for c in self.completions)

    def question(self) -> LogprobQuestion:
        return LogprobQuestion(
            tuple(LogprobItem(Input(ids=self.prompt), Input(ids=completion)) for completion in self.completions)
        )


def shared_prompt(seed: int = 1) -> SharedPrompt:
    shifts = np.random.default_rng(seed).integers(0, 9, 16)
    lengths = [int(length) for shift in shifts for length in (16 - shift, 16 + shift)]
    completions = tuple(random_ids(1000 * seed + number, length) for number, length in enumerate(lengths))
    return SharedPrompt(random_ids(seed, 256), completions)


@dataclass(frozen=True, eq=False)
class ChunkedText:
    """A problem of 32 tokens, 24 chunks of 28, an answer of 32: some rows are cut from each chunk in turn."""

    ids: IntArray  # [736]
    chunks: tuple[tuple[int, int], ...]
    answer: tuple[int, int]
    query_shift: int  # 1: the rows that predict the answer are cut; 0: the rows of the answer themselves
    kl: bool  # measured against the uncut run; without it, the uncut run is one more variant

    @property
    def cut_rows(self) -> tuple[int, int]:
        return self.answer[0] - self.query_shift, self.answer[1] - self.query_shift

    def question(self) -> MaskedForwardQuestion:
        rows = TokenRange(*self.cut_rows)
        cut = [Variant(mask=MaskSpec(edges=(Edge(rows, TokenRange(*chunk)),))) for chunk in self.chunks]
        variants = tuple(cut) if self.kl else (*cut, Variant())
        return MaskedForwardQuestion(
            Input(ids=self.ids), variants, reads=(TokenRange(*self.answer),), kl_base_masked=self.kl
        )


def chunked_text(query_shift: int, *, kl: bool, seed: int = 2) -> ChunkedText:
    starts = [32 + 28 * number for number in range(24)]
    chunks = tuple((start, start + 28) for start in starts)
    return ChunkedText(random_ids(seed, 736), chunks, (704, 736), query_shift, kl)


def rolling(seed: int, texts: int, tokens: int, variants: tuple[Variant, ...] = (Variant(),)) -> RollingQuestion:
    """Texts with nothing in common. A text of n + 1 ids needs n rows and scores n tokens: so every row is read."""
    inputs = tuple(Input(ids=random_ids(seed + number, tokens + 1)) for number in range(texts))
    return RollingQuestion(inputs, variants=variants)


def next_token(seed: int, prompts: int, tokens: int) -> NextTokenQuestion:
    """The body and next to nothing else: one row of each prompt is read."""
    return NextTokenQuestion(tuple(Input(ids=random_ids(seed + n, tokens)) for n in range(prompts)), top_k=1)


def short_requests(seed: int, count: int) -> list[LogprobQuestion]:
    """Requests of 70-130 tokens, the last 16 of each scored."""
    lengths = np.random.default_rng(seed).integers(70, 131, count)
    found = []
    for number, length in enumerate(lengths.tolist()):
        ids = random_ids(10_000 * seed + number, length)
        item = LogprobItem(Input(ids=int_array(ids[:-16])), Input(ids=int_array(ids[-16:])))
        found.append(LogprobQuestion((item,)))
    return found
