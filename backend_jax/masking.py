"""Masks of a call: the plans' blocks put where their rows and keys stand, and the tallies taken back apart.

Segments without a mask that share a call with masked ones get the model's own attention as booleans too; they are
not tallied. It knows plans and numpy. It must not know how booleans are applied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from backend_jax.architecture import Architecture
from backend_jax.attention import Mixes
from backend_jax.call import Grid, Part, PastRows
from backend_jax.model import Masks
from backend_jax.programs import shape_of
from backend_jax.shapes import MaskShape, bucket
from dualtrace.masks.plan import MaskPlan
from dualtrace.masks.receipt import Counts, mix

Bools = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint32]
DISTINCT = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, eq=False)
class _Sheets:
    """The booleans of a call while they are filled in: own [M,N,1|G,C,1|R,T,T] and past [M,N,1|G,C,1|R,T,P]."""

    own: Bools
    past: Bools | None

    def put(self, index: int, part: Part, block: Bools) -> None:
        """`block` [H or 1, n, K]: rows of the part, keys from root-to-leaf row 0."""
        groups, shares = self.own.shape[2], self.own.shape[4]
        spread = np.broadcast_to(block, (groups * shares, *block.shape[1:]))
        by_head = spread.reshape(groups, shares, *block.shape[1:])
        self.own[index, part.lane, :, part.row, :, part.span, part.span] = by_head[..., part.start : part.stop]
        if self.past is not None:
            self.past[index, part.lane, :, part.row, :, part.span, : part.start] = by_head[..., : part.start]


def mask_shape(architecture: Architecture, plans: Sequence[MaskPlan | None], layers: range) -> MaskShape | None:
    """Of a call of these layers whose parts have these masks; None when no part has one."""
    given = [plan for plan in plans if plan is not None]
    if not given:
        return None
    count = len(set(_number_layers(architecture, plans, layers).values()))
    distinct = min(bucket(count, DISTINCT), architecture.layers)
    rules_of = [(plan.rules, plan.rule_of[layers.start : layers.stop]) for plan in given]
    by_head = any((rule_of != rule_of[:, :1]).any() for _, rule_of in rules_of)
    zeroed = any(rules[i].zeroed is not None for rules, rule_of in rules_of for i in np.unique(rule_of))
    return MaskShape(distinct, by_head, zeroed)


def outline_masks(architecture: Architecture, shape: MaskShape, grid: Grid) -> Masks:
    """What `build_masks` makes, as shapes."""
    front = _front(architecture, shape, grid)
    own = shape_of((*front, grid.tokens), np.bool_)
    past = shape_of((*front, grid.past_tokens), np.bool_) if grid.past_tokens else None
    rows = shape_of((2, grid.pasts, grid.rows, grid.tokens), np.uint32)
    mixes = Mixes(rows, rows, shape_of((2, grid.pasts, grid.past_tokens), np.uint32) if grid.past_tokens else None)
    zeroed_own, zeroed_past = (own, past) if shape.zeroed else (None, None)
    return Masks(own, past, zeroed_own, zeroed_past, shape_of((architecture.layers,), np.int32), mixes)


def build_masks(
    architecture: Architecture,
    shape: MaskShape,
    parts: Sequence[Part],
    grid: Grid,
    past: PastRows | None,
    layers: range,
) -> Masks:
    numbers = _number_layers(architecture, [part.mask for part in parts], layers)
    first = {index: layer for layer, index in reversed(numbers.items())}
    allowed = _empty_sheets(architecture, shape, grid)
    removed = _empty_sheets(architecture, shape, grid) if shape.zeroed else None
    for index, layer in first.items():
        for part in parts:
            allowed.put(index, part, _allowed_block(architecture, part, layer, past))
            zero = None if part.mask is None else part.mask.zero_block(layer, part.start, part.stop)
            if removed is not None and zero is not None:
                removed.put(index, part, zero)
    arrays = (allowed.own, allowed.past, removed and removed.own, removed and removed.past)
    number_of = np.array([numbers.get(layer, 0) for layer in range(architecture.layers)], np.int32)
    return Masks(*arrays, number_of, _mixes(parts, grid))  # type: ignore[arg-type]


def _number_layers(architecture: Architecture, plans: Sequence[MaskPlan | None], layers: range) -> dict[int, int]:
    """The number of each layer's booleans: layers in which every part has the same rules share theirs."""
    numbers: dict[tuple[object, ...], int] = {}
    found = {}
    for layer in layers:
        native = architecture.window(layer)
        rules = tuple(native if plan is None else plan.rule_of[layer].tobytes() for plan in plans)
        found[layer] = numbers.setdefault(rules, len(numbers))
    return found


def _front(architecture: Architecture, shape: MaskShape, grid: Grid) -> tuple[int, ...]:
    groups, shares = (architecture.kv_heads, architecture.share) if shape.by_head else (1, 1)
    return shape.distinct, grid.pasts, groups, grid.rows, shares, grid.tokens


def _empty_sheets(architecture: Architecture, shape: MaskShape, grid: Grid) -> _Sheets:
    front = _front(architecture, shape, grid)
    past = np.zeros((*front, grid.past_tokens), np.bool_) if grid.past_tokens else None
    return _Sheets(np.zeros((*front, grid.tokens), np.bool_), past)


def _allowed_block(architecture: Architecture, part: Part, layer: int, past: PastRows | None) -> Bools:
    if part.mask is not None:
        return part.mask.block(layer, part.start, part.stop)
    rows, keys = np.arange(part.start, part.stop), np.arange(part.stop)
    block: Bools = rows[:, None] >= keys[None, :]
    window = architecture.window(layer)
    if window is not None:
        before = np.empty(0, np.int32) if past is None else past.positions[part.lane]
        places = np.concatenate([before, part.positions]).astype(np.int64)
        block &= np.abs(places[part.start :, None] - places[None, :]) < window
    return block[None]


def _mixes(parts: Sequence[Part], grid: Grid) -> Mixes:
    tables = mix(max(part.stop for part in parts))
    rows = np.zeros((2, grid.pasts, grid.rows, grid.tokens), np.uint32)
    own = np.zeros_like(rows)
    past = np.zeros((2, grid.pasts, grid.past_tokens), np.uint32) if grid.past_tokens else None
    for part in parts:
        here = slice(part.start, part.stop)
        for which, (f, g) in enumerate(((tables.f_a, tables.g_a), (tables.f_b, tables.g_b))):
            rows[which, part.lane, part.row, part.span] = f[here]
            own[which, part.lane, part.row, part.span] = g[here]
            if past is not None:
                past[which, part.lane, : part.start] = g[: part.start]
    return Mixes(rows, own, past)  # type: ignore[arg-type]


def counts_of(part: Part, tallies: Words, heads: int) -> Counts:
    """The part's own rows out of a call's tallies [L, 3|6, N, 1|G, C, 1|R, T], summed over its rows."""
    skipped = max(0, part.own_start - part.start)
    span = slice(part.offset + min(skipped, part.size), part.offset + part.size)
    mine = tallies[:, :, part.lane, :, part.row, :, span]  # [L, 3|6, 1|G, 1|R, n]
    layers, kinds, rows = mine.shape[0], mine.shape[1], mine.shape[4]
    by_head = np.broadcast_to(
        mine.reshape(layers, kinds, mine.shape[2] * mine.shape[3], rows), (layers, kinds, heads, rows)
    )

    def total(kind: int) -> npt.NDArray[np.int64]:
        sums: npt.NDArray[np.int64] = by_head[:, kind].sum(axis=-1, dtype=np.int64)
        return sums

    def wrapped(kind: int) -> Words:
        sums: Words = by_head[:, kind].sum(axis=-1, dtype=np.uint32)
        return sums

    none, no_words = np.zeros((layers, heads), np.int64), np.zeros((layers, heads), np.uint32)
    zeroed = kinds == 6
    return Counts(
        rows=none + rows,
        empty_rows=(by_head[:, 0] == 0).sum(axis=-1, dtype=np.int64),
        allowed=total(0),
        sum_a=wrapped(1),
        sum_b=wrapped(2),
        zeroed=total(3) if zeroed else none,
        zeroed_sum_a=wrapped(4) if zeroed else no_words,
        zeroed_sum_b=wrapped(5) if zeroed else no_words,
    )


def join_counts(below: Counts, above: Counts, layer: int) -> Counts:
    """Of rows whose layers below `layer` another call ran."""
    joined = {
        field.name: np.concatenate([getattr(below, field.name)[:layer], getattr(above, field.name)[layer:]])
        for field in dataclasses.fields(Counts)
    }
    return Counts(**joined)
