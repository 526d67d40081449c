"""The batches that callers usually send, so that their functions can be compiled before the first caller comes.

It knows shapes of batches. It must not know how a batch is run.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dualtrace.engine import NOTHING, Batch, Read, Reads, Segment

ALONE = (16, 24, 32, 48, 64, 96, 128, 192, 256)  # tokens of one text in one step
PREFLIGHT = 32
FEW_OF = 64  # tokens of a text of which few rows are read
TOGETHER = ((2, 128), (4, 128), (8, 128))  # texts in one call, tokens each
PROMPTS = ((64, 4, 8), (256, 16, 16))  # tokens of a prompt, completions on it, tokens of each
FEW_ROWS = (1, 16, 32)  # rows read of a text, besides all


def usual_batches(most_tokens: int, step_tokens: int) -> list[tuple[Batch, Reads]]:
    """`most_tokens`: positions of the model."""
    return [
        pair
        for pair in _draw_batches(step_tokens)
        if max(pair[0].expand(index)[0].size for index in range(len(pair[0].segments))) <= most_tokens
    ]


def _draw_batches(step_tokens: int) -> Iterator[tuple[Batch, Reads]]:
    yield plain_batch(1, PREFLIGHT, top_k=1, tail=True)
    for tokens in ALONE:
        yield plain_batch(1, tokens)
    for rows in FEW_ROWS:
        yield Batch((_run_of(FEW_OF),)), (_read(FEW_OF - rows, FEW_OF),)
    yield plain_batch(1, FEW_OF, top_k=5)
    for texts, tokens in TOGETHER:
        yield plain_batch(texts, tokens)
    yield plain_batch(1, 2 * step_tokens)
    for prompt, completions, tokens in PROMPTS:
        yield _shared(prompt, completions, tokens)


def plain_batch(texts: int, tokens: int, *, top_k: int = 0, tail: bool = False) -> tuple[Batch, Reads]:
    """Texts of a length, read at every row."""
    read = _read(0, tokens, top_k=top_k, tail=tail)
    return Batch((_run_of(tokens),) * texts), (read,) * texts


def _shared(prompt: int, completions: int, tokens: int) -> tuple[Batch, Reads]:
    child = _run_of(tokens, start=prompt, parent=0)
    reads = (_read(prompt - 1, prompt + tokens),) * completions
    return Batch((_run_of(prompt), *(child,) * completions)), (NOTHING, *reads)


def _run_of(tokens: int, *, start: int = 0, parent: int | None = None) -> Segment:
    return Segment(np.zeros(tokens, np.int32), np.arange(start, start + tokens, dtype=np.int32), parent)


def _read(start: int, stop: int, *, top_k: int = 0, tail: bool = False) -> Read:
    rows = np.arange(start, stop, dtype=np.int32)
    return Read(rows, np.zeros(rows.size, np.int32), top_k, tail=tail)
