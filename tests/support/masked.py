"""Asking an engine about one text under masks and views, and putting its steps together.

It knows the waist, the mask language and a list of masks that between them use every part of it. It must not know how
any engine works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dualtrace.arrays import FloatArray, IntArray
from dualtrace.engine import NOTHING, Batch, Engine, Read, Readout, Segment, int_array
from dualtrace.masks import spec as s
from dualtrace.masks.arrays import BoolArray
from dualtrace.masks.plan import MaskPlan, compile_mask
from dualtrace.masks.receipt import Counts, no_counts
from dualtrace.masks.resolve import MaskContext, geometry_of, resolve
from dualtrace.model_card import ModelCard
from dualtrace.views import BASE, View

IDS = int_array([5, 300, 17, 17, 42, 260, 7, 99, 311, 20, 64, 5, 8, 210, 33, 150, 42, 6, 77, 301, 12, 19, 260, 3])
TOKENS = IDS.size
LAYERS, HEADS = 3, 4  # of the tiny models


def _random(*heads: int, seed: int) -> s.Array:
    return s.Array(BoolArray(np.random.default_rng(seed).random((*heads, TOKENS, TOKENS)) < 0.4))


def edge(queries: tuple[int, int], keys: tuple[int, int], **rest: Any) -> s.Edge:
    return s.Edge(s.TokenRange(*queries), s.TokenRange(*keys), **rest)


MASKS: dict[str, s.MaskSpec] = {
    "causal": s.MaskSpec(),
    "sliding": s.MaskSpec(base=s.Sliding(5)),
    "sliding ahead": s.MaskSpec(base=s.Sliding(4, 2)),
    "chunked": s.MaskSpec(base=s.Chunked(7)),
    "documents": s.MaskSpec(base=s.DocIsolation(boundaries=(9, 16))),
    "documents from 0": s.MaskSpec(base=s.DocIsolation(boundaries=(9, 16), reset_positions=True)),
    "bidirectional prefix": s.MaskSpec(base=s.BidirectionalPrefix(n=6)),
    "full": s.MaskSpec(base=s.Full()),
    "combined": s.MaskSpec(base=s.Minus(s.AnyOf((s.Sliding(3), s.Chunked(12))), s.Not(s.Causal()))),
    "array of heads, self": s.MaskSpec(base=_random(HEADS, seed=1), empty_row=s.EmptyRow.SELF),
    "array of layers, zero": s.MaskSpec(
        base=s.All((s.Causal(), _random(LAYERS, HEADS, seed=2))), empty_row=s.EmptyRow.ZERO
    ),
    "edge in one layer and head": s.MaskSpec(edges=(edge((12, 24), (2, 9), layers=(1,), heads=(2,)),)),
    "edges": s.MaskSpec(edges=(edge((10, 24), (0, 4)), edge((16, 20), (5, 11), layers=(0, 2)))),
    "zeroed after the softmax": s.MaskSpec(
        edges=(edge((8, 24), (1, 6), mode=s.CutMode.POST_SOFTMAX_ZERO, heads=(0, 3)), edge((9, 12), (4, 8)))
    ),
    "rows that see nothing": s.MaskSpec(edges=(edge((7, 10), (0, 24), layers=(1,)),), empty_row=s.EmptyRow.ZERO),
}


@dataclass(frozen=True)
class Answer:
    """One segment's readouts of all steps, put together."""

    rows: IntArray
    logprobs: FloatArray
    kl_from_against: FloatArray | None
    kl_to_against: FloatArray | None
    counts: Counts | None
    delta_modules: tuple[str, ...] | None
    bad_rows: tuple[int, ...]


def plan_for(card: ModelCard, spec: s.MaskSpec, length: int = TOKENS, **context: Any) -> MaskPlan:
    return compile_mask(resolve(spec, MaskContext(length, geometry_of(card), **context)))


def whole(
    ids: Sequence[int] | IntArray = IDS, mask: MaskPlan | None = None, view: View = BASE, start: int = 0
) -> Segment:
    """A text without a parent, at the positions that its mask gives or else from `start` on."""
    given = None if mask is None else mask.positions()
    positions = int_array(range(start, start + len(ids))) if given is None else given
    return Segment(int_array(ids), positions, None, view, mask)


def split(segment: Segment, at: int) -> tuple[Segment, Segment]:
    """The same text as a prefix, first in its batch, and the rest of it."""
    first = Segment(segment.ids[:at], segment.positions[:at], None, segment.view, segment.mask)
    return first, Segment(segment.ids[at:], segment.positions[at:], 0, segment.view, segment.mask)


def read_all(ids: Sequence[int] | IntArray = IDS, **rest: Any) -> Read:
    """Every row: for the token after it, and at the last row for token 0."""
    return Read(int_array(range(len(ids))), int_array([*ids[1:], 0]), **rest)


def run(engine: Engine, segments: Sequence[Segment], reads: Sequence[Read]) -> dict[int, Answer]:
    """All steps of one batch, by segment."""
    found: dict[int, list[Readout]] = {}
    for step in engine.forward(Batch(tuple(segments)), tuple(reads), lambda _: True):
        for readout in step:
            found.setdefault(readout.segment, []).append(readout)
    return {index: _join(engine.card, readouts) for index, readouts in found.items()}


def ask(engine: Engine, mask: MaskPlan | None = None, view: View = BASE, ids: IntArray = IDS) -> Answer:
    return run(engine, [whole(ids, mask, view)], [read_all(ids)])[0]


def ask_shared(engine: Engine, at: int, mask: MaskPlan | None = None, view: View = BASE) -> tuple[Answer, Counts]:
    """The same text with its first rows as a parent; and the counts of both together."""
    answers = run(engine, split(whole(IDS, mask, view), at), (NOTHING, read_all()))
    counts = no_counts(engine.card.layers, engine.card.query_heads)
    for answer in answers.values():
        counts = counts if answer.counts is None else counts + answer.counts
    return answers[1], counts


def _join(card: ModelCard, readouts: Sequence[Readout]) -> Answer:
    counts = [readout.counts for readout in readouts if readout.counts is not None]
    return Answer(
        rows=np.concatenate([readout.rows for readout in readouts]),
        logprobs=_concatenate([readout.logprobs for readout in readouts], np.empty(0)),
        kl_from_against=_concatenate([readout.kl_from_against for readout in readouts], None),
        kl_to_against=_concatenate([readout.kl_to_against for readout in readouts], None),
        counts=sum(counts, no_counts(card.layers, card.query_heads)) if counts else None,
        delta_modules=readouts[-1].delta_modules,
        bad_rows=tuple(row for readout in readouts for row in readout.bad_rows),
    )


def _concatenate(parts: Sequence[FloatArray | None], absent: Any) -> Any:
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present else absent
