"""Running one call: arrays in, hidden states, kept keys and values and tallies out, by the compiled function that fits.

It knows parts, weights and compiled functions. It must not know which calls answer a batch, nor reads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from backend_jax.architecture import Architecture
from backend_jax.attention import Keys
from backend_jax.call import Below, Grid, Part, PastRows, lay_rows, outline_rows
from backend_jax.device import house_rules
from backend_jax.lora import Chosen, Factors, Modules, factor_sizes, lora_shape, stack_factors
from backend_jax.masking import Words, build_masks, counts_of, join_counts, mask_shape, outline_masks
from backend_jax.mesh import Spread
from backend_jax.model import (
    Lora,
    Outputs,
    Past,
    append_kept,
    forward,
    forward_above,
    forward_below,
    widen_kept,
)
from backend_jax.programs import Programs, Recipe, jit, outline, shape_of
from backend_jax.shapes import CallShape, LoraShape, Reach, Span, past_bucket
from backend_jax.weights import Weights
from dualtrace.adapters import Delta
from dualtrace.arrays import IntArray
from dualtrace.masks.plan import MaskPlan
from dualtrace.masks.receipt import Counts
from dualtrace.views import View

Size = tuple[int, int]  # rows, tokens a row

FACTORS_KEPT = 4  # stacks of adapters' factors that stay on the device


@dataclass(frozen=True, eq=False)
class Kept:
    """Keys and values of lanes' past rows, and the positions of those rows."""

    store: Keys  # [L,N,G,P,D]; shapes only while a batch is rehearsed
    rows: PastRows

    @property
    def tokens(self) -> int:
        return int(self.store.keys.shape[3])


@dataclass(frozen=True, eq=False)
class RanBelow:
    """What a call below a fork left for the one above it."""

    shape: CallShape
    call: Below
    tallies: Words | None


@dataclass(frozen=True, eq=False)
class Ran:
    shape: CallShape
    hidden: npt.NDArray[Any]  # [N*C*T, hidden]
    fresh: Keys | None  # [L,N,G,T,D]
    tallies: Words | None
    below: RanBelow | None = None

    @property
    def bucket(self) -> str:
        """The padded shapes that ran, the one below a fork first."""
        return f"{self.below.shape.name}|{self.shape.name}" if self.below else self.shape.name

    def count_empty(self, parts: Sequence[Part]) -> int:
        """Token places that held no token; those below a fork are places of their own."""
        below = self.below.shape.size - sum(part.size for part in self.below.call.parts) if self.below else 0
        return self.shape.size - sum(part.size for part in parts) + below

    def counts(self, parts: Sequence[Part], index: int, heads: int) -> Counts | None:
        """Of one of the parts that ran."""
        if self.tallies is None or parts[index].mask is None:
            return None
        own = counts_of(parts[index], self.tallies, heads)
        if self.below is None or self.below.tallies is None:
            return own
        standing = counts_of(self.below.call.standing[index], self.below.tallies, heads)
        return join_counts(standing, own, self.below.call.layer)


class Runner:
    def __init__(
        self,
        architecture: Architecture,
        weights: Weights,
        programs: Programs,
        modules: Modules,
        delta: Callable[[View], Delta | None],
        spread: Spread | None = None,
    ) -> None:
        self.architecture = architecture
        self.programs = programs
        self.delta = delta
        self.spread = spread
        self._weights = weights
        self._modules = modules
        self._factors: OrderedDict[tuple[str, ...], dict[str, Factors]] = OrderedDict()

    @property
    def width(self) -> int:
        """Columns of the hidden states that come back."""
        return self.architecture.outer_size

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = np.dtype(self._weights["embedding"].dtype)
        return dtype

    def span(self, reach: Reach, fork: int = 0) -> Span:
        layers = self.architecture.layers
        first = fork if reach is Reach.ABOVE else 0
        return Span(reach, range(first, fork if reach is Reach.BELOW else layers))

    def known_rows(
        self, past_tokens: int, masks: Sequence[MaskPlan | None], views: Sequence[View], span: Span
    ) -> frozenset[Size]:
        """(rows, tokens) of the compiled calls on such a past that segments of these masks and views fit."""
        mask = mask_shape(self.architecture, masks, span.layers)
        kind = (1, past_tokens, False, mask, self._lora_shape(self._deltas(views)), span.reach)
        shapes = [key for key in self.programs.keys("forward") if isinstance(key, CallShape)]
        return frozenset(
            (shape.rows, shape.tokens)
            for shape in shapes
            if (shape.pasts, shape.past_tokens, shape.keep, shape.mask, shape.lora, shape.reach) == kind
        )

    def run(self, parts: Sequence[Part], grid: Grid, kept: Kept | None, *, keep: bool = False) -> Ran:
        span = self.span(Reach.WHOLE)
        shape = self.shape(parts, grid, span, keep=keep)
        outputs = self._call(shape, span, parts, grid, kept)
        fresh = None if outputs.keys is None or outputs.values is None else Keys(outputs.keys, outputs.values)
        return Ran(shape, np.asarray(outputs.hidden), fresh, _tallies(outputs))

    def run_forked(self, parts: Sequence[Part], grid: Grid, below: Below, kept: Kept | None) -> Ran:
        """Below a fork the parts that stand for all, above it all. The host hands the states on, so that no function
        depends on both sizes."""
        fork = np.int32(below.layer)
        span = self.span(Reach.BELOW, below.layer)
        lower = self.shape(below.parts, below.grid, span)
        reached = self._call(lower, span, below.parts, below.grid, kept, fork)
        span = self.span(Reach.ABOVE, below.layer)
        shape = self.shape(parts, grid, span)
        states = np.asarray(reached.hidden)[below.source(parts, grid)]
        outputs = self._call(shape, span, parts, grid, kept, fork, states)
        ran_below = RanBelow(lower, below, _tallies(reached))
        return Ran(shape, np.asarray(outputs.hidden), None, _tallies(outputs), ran_below)

    def _call(
        self, shape: CallShape, span: Span, parts: Sequence[Part], grid: Grid, kept: Kept | None, *more: Any
    ) -> Outputs:
        program = self.programs.find(self.recipe(shape))
        rows = lay_rows(self.architecture, parts, grid, self.dtype)
        past = masks = None
        if kept is not None:
            past = Past(*kept.store, *kept.rows.arrays(grid.pasts, grid.past_tokens))  # type: ignore[arg-type]
        if shape.mask is not None:
            before = None if kept is None else kept.rows
            masks = build_masks(self.architecture, shape.mask, parts, grid, before, span.layers)
        lora = self._lora(shape.lora, parts, grid)
        with house_rules():
            outputs: Outputs = program(self._weights, rows, past, masks, lora, *more)
        return outputs

    def shape(self, parts: Sequence[Part], grid: Grid, span: Span, *, keep: bool = False) -> CallShape:
        """Which function runs these parts; of the parts it takes the kinds of their masks and views only."""
        mask = mask_shape(self.architecture, [part.mask for part in parts], span.layers)
        lora = self._lora_shape(self._deltas([part.view for part in parts]))
        return CallShape(grid.pasts, grid.rows, grid.tokens, grid.past_tokens, keep, mask, lora, span.reach)

    def recipe(self, shape: CallShape) -> Recipe:
        spread = self.spread

        def lower() -> Any:
            answers = None if spread is None else Outputs(spread.copied, spread.kept, spread.kept, spread.copied)  # type: ignore[arg-type]
            arguments = outline(self._outline_call(shape), spread)
            return jit(self._function(shape), spread, answers).lower(outline(self._weights), *arguments)

        more = {"kept": shape.keep, "masked": shape.mask, "adapted": shape.lora}
        more[shape.reach] = shape.reach is not Reach.WHOLE
        name = ", ".join((f"forward {shape.name}", *(word for word, held in more.items() if held)))
        return Recipe("forward", shape, name, lower)

    def _function(self, shape: CallShape) -> Callable[..., Outputs]:
        match shape.reach:
            case Reach.WHOLE:
                return partial(forward, self.architecture, shape.keep)
            case Reach.BELOW:
                return partial(forward_below, self.architecture)
            case Reach.ABOVE:
                return partial(forward_above, self.architecture)

    def _outline_call(self, shape: CallShape) -> tuple[Any, ...]:
        """The arguments of a call as shapes. Those of keys and values lie over the mesh as they are kept."""
        grid = Grid(shape.pasts, shape.rows, shape.tokens, shape.past_tokens)
        row = (shape.pasts, shape.rows, shape.tokens)
        past = masks = lora = None
        if shape.past_tokens:
            store = self.outline_keys(shape.pasts, shape.past_tokens)
            lengths = shape_of((shape.pasts,), np.int32)
            past = Past(*store, lengths, shape_of((shape.pasts, shape.past_tokens), np.int32))
        if shape.mask is not None:
            masks = outline_masks(self.architecture, shape.mask, grid)
        if shape.lora is not None:
            sizes = {role: factor_sizes(shape.lora, self.architecture, role) for role in shape.lora.roles}
            factors = {role: Factors(*(shape_of(size, self.dtype) for size in pair)) for role, pair in sizes.items()}
            worn = (shape_of(row[:2], kind) for kind in (np.int32, self.dtype, np.bool_))
            lora = Lora(factors, Chosen(*worn))
        fork, states = shape_of((), np.int32), shape_of((*row, self.architecture.hidden_size), self.dtype)
        more = {Reach.WHOLE: (), Reach.BELOW: (fork,), Reach.ABOVE: (fork, states)}[shape.reach]
        return outline_rows(self.architecture, grid, self.dtype), past, masks, lora, *more

    def outline_keys(self, lanes: int, tokens: int) -> Keys:
        a = self.architecture
        lies = None if self.spread is None else self.spread.kept
        one = shape_of((a.layers, lanes, a.kv_heads, tokens, a.head_dim), self.dtype, lies)
        return Keys(one, one)

    def _deltas(self, views: Sequence[View]) -> dict[str, Delta]:
        """The different adapters that views wear, by the identity of their factors, in a fixed order."""
        plain = {view.key: view for view in views}
        deltas = {delta.key: delta for view in plain.values() if (delta := self.delta(view)) is not None}
        return dict(sorted(deltas.items()))

    def _lora_shape(self, deltas: Mapping[str, Delta]) -> LoraShape | None:
        return lora_shape(list(deltas.values()), self._modules, self.architecture) if deltas else None

    def _lora(self, shape: LoraShape | None, parts: Sequence[Part], grid: Grid) -> Lora | None:
        if shape is None:
            return None
        deltas = self._deltas([part.view for part in parts])
        keys = tuple(deltas)
        if keys not in self._factors:
            with house_rules():  # else the factors of a float64 engine would be put as float32
                factors = stack_factors(shape, list(deltas.values()), self._modules, self.architecture, self.dtype)
                if self.spread is not None:
                    factors = jax.device_put(factors, self.spread.copied)
            self._factors[keys] = factors
            if len(self._factors) > FACTORS_KEPT:
                self._factors.popitem(last=False)
        self._factors.move_to_end(keys)
        size = (grid.pasts, grid.rows)
        which, strength, on = np.zeros(size, np.int32), np.zeros(size, self.dtype), np.zeros(size, np.bool_)
        for part in parts:
            if (delta := self.delta(part.view)) is not None:
                place = (part.lane, part.row)
                which[place], strength[place], on[place] = keys.index(delta.key), delta.strength, True
        return Lora(self._factors[keys], Chosen(which, strength, on))  # type: ignore[arg-type]

    def append(self, kept: Kept | None, fresh: Keys, parts: Sequence[Part], *, owned: bool) -> Kept:
        """The past with the parts' rows added. `owned`: nobody else needs `kept`, so its memory is used again."""
        plan = plan_append(kept, fresh, parts)
        store = fresh if kept is None else kept.store
        if plan.room > store.keys.shape[3]:
            with house_rules():
                store, owned = self.programs.find(self.widening(store, plan.room))(store), True
        if kept is None:
            return Kept(store, plan.rows)
        with house_rules():
            program = self.programs.find(self.appending(store, fresh, owned=owned))
            return Kept(program(store, fresh, plan.offsets), plan.rows)

    def is_made(self, stride: Stride) -> bool:
        """Whether all functions of the call, and of what is kept after it, are there. What it stands on is owned."""
        grid = stride.grid
        recipes = [self.recipe(self.shape(stride.parts, grid, self.span(Reach.WHOLE), keep=True))]
        if stride.room:
            fresh = self.outline_keys(grid.pasts, grid.tokens)
            store = self.outline_keys(grid.pasts, grid.past_tokens or grid.tokens)
            if stride.room > store.keys.shape[3]:
                recipes.append(self.widening(store, stride.room))
                store = self.outline_keys(grid.pasts, stride.room)
            if grid.past_tokens:
                recipes.append(self.appending(store, fresh, owned=True))
        return all(map(self.programs.has, recipes))

    def choose(self, kept: Kept | None, chosen: Sequence[int], lanes: int) -> Kept | None:
        """Some lanes of what was kept, in a store of so many. The host picks them: no function is compiled for it."""
        if kept is None:
            return None

        def pick(values: Any) -> Any:
            picked = np.zeros((values.shape[0], lanes, *values.shape[2:]), values.dtype)
            picked[:, : len(chosen)] = np.asarray(values)[:, list(chosen)]
            return jax.device_put(picked, values.sharding)

        with house_rules():
            store = Keys(*map(pick, kept.store))
        return Kept(store, kept.rows.choose(chosen, lanes))

    def appending(self, store: Keys, fresh: Keys, *, owned: bool) -> Recipe:
        size = (*store.keys.shape, int(fresh.keys.shape[3]))
        offsets = shape_of((size[1],), np.int32)

        def lower() -> Any:
            program = self._jit_keep(append_kept, donate_argnums=(0,) if owned else ())
            return program.lower(*outline((store, fresh, offsets), self.spread))

        return Recipe("keep", ("append", owned, *size), f"keep {size[1]}x{size[5]}+{size[3]}", lower)

    def widening(self, store: Keys, tokens: int) -> Recipe:
        size = store.keys.shape

        def lower() -> Any:
            return self._jit_keep(partial(widen_kept, tokens=tokens)).lower(outline(store))

        return Recipe("keep", ("widen", *size, tokens), f"widen {size[1]}x{size[3]} to {tokens}", lower)

    def _jit_keep(self, function: Callable[..., Keys], **options: Any) -> Any:
        return jit(function, self.spread, self.spread and self.spread.kept, **options)


def _tallies(outputs: Outputs) -> Words | None:
    return None if outputs.counts is None else np.asarray(outputs.counts)


@dataclass(frozen=True, eq=False)
class Stride:
    """One call of segments side by side."""

    parts: tuple[Part, ...]
    grid: Grid
    room: int  # tokens that the store holds afterwards; 0: nothing is kept


def past_after(before: int, longest: int, fresh: int) -> int:
    """Tokens of a store of `before`, `longest` of them taken, to which `fresh` are added."""
    return max(before or fresh, past_bucket(longest + fresh))


@dataclass(frozen=True, eq=False)
class AppendPlan:
    offsets: IntArray  # [N] int32 where each lane's new rows begin
    rows: PastRows  # afterwards
    room: int  # tokens that the store must have


def plan_append(kept: Kept | None, fresh: Keys, parts: Sequence[Part]) -> AppendPlan:
    lanes, tokens = int(fresh.keys.shape[1]), int(fresh.keys.shape[3])
    before = kept.rows.positions if kept else tuple(np.empty(0, np.int32) for _ in range(lanes))
    offsets = np.array([positions.size for positions in before], np.int32)
    after = list(before)
    for part in parts:
        after[part.lane] = np.concatenate([before[part.lane], part.positions])
    return AppendPlan(offsets, PastRows(tuple(after)), past_bucket(int(offsets.max()) + tokens))
