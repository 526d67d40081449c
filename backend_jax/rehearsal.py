"""A batch walked through without computing: which compiled functions its forward will call.

The very code that arranges a forward runs here over a runner that has shapes where the real one has arrays, so the
two cannot disagree. It knows recipes. It must not know how anything is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from backend_jax.architecture import Architecture
from backend_jax.attention import Keys
from backend_jax.call import Below, Grid, Part
from backend_jax.forest import Forest
from backend_jax.programs import Recipe
from backend_jax.reader import Pending, Reader
from backend_jax.runner import Kept, Ran, RanBelow, Runner, Size, Stride, plan_append
from backend_jax.shapes import CallShape, Reach, Span
from dualtrace.adapters import Delta
from dualtrace.engine import Batch, Readout, Reads
from dualtrace.masks.plan import MaskPlan
from dualtrace.views import View

Recipes = dict[tuple[str, Hashable], Recipe]


def rehearse(batch: Batch, reads: Reads, runner: Runner, reader: Reader, step_tokens: int) -> list[Recipe]:
    """All functions that a forward of the batch calls, each once, in the order in which it first calls them."""
    found: Recipes = {}
    forest = Forest(batch, reads, lambda _segment: True, _Runner(runner, found), _Reader(reader, found), step_tokens)
    for _step in forest.run():
        pass
    return list(found.values())


class _Runner:
    width = 0  # hidden states without columns: they cost nothing, and have the right number of rows

    def __init__(self, runner: Runner, found: Recipes) -> None:
        self._runner = runner
        self._found = found

    @property
    def architecture(self) -> Architecture:
        return self._runner.architecture

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._runner.dtype

    @property
    def delta(self) -> Callable[[View], Delta | None]:
        return self._runner.delta

    def span(self, reach: Reach, fork: int = 0) -> Span:
        return self._runner.span(reach, fork)

    def known_rows(
        self, past_tokens: int, masks: Sequence[MaskPlan | None], views: Sequence[View], span: Span
    ) -> frozenset[Size]:
        return self._runner.known_rows(past_tokens, masks, views, span)

    def run(self, parts: Sequence[Part], grid: Grid, kept: Kept | None, *, keep: bool = False) -> Ran:
        shape = self._note_call(parts, grid, self.span(Reach.WHOLE), keep=keep)
        fresh = self._runner.outline_keys(grid.pasts, grid.tokens) if keep else None
        return Ran(shape, np.empty((shape.size, 0), self.dtype), fresh, None)

    def run_forked(self, parts: Sequence[Part], grid: Grid, below: Below, kept: Kept | None) -> Ran:
        lower = self._note_call(below.parts, below.grid, self.span(Reach.BELOW, below.layer))
        shape = self._note_call(parts, grid, self.span(Reach.ABOVE, below.layer))
        return Ran(shape, np.empty((shape.size, 0), self.dtype), None, None, RanBelow(lower, below, None))

    def _note_call(self, parts: Sequence[Part], grid: Grid, span: Span, *, keep: bool = False) -> CallShape:
        shape = self._runner.shape(parts, grid, span, keep=keep)
        _note(self._found, self._runner.recipe(shape))
        return shape

    def append(self, kept: Kept | None, fresh: Keys, parts: Sequence[Part], *, owned: bool) -> Kept:
        plan = plan_append(kept, fresh, parts)
        store = fresh if kept is None else kept.store
        if plan.room > store.keys.shape[3]:
            _note(self._found, self._runner.widening(store, plan.room))
            store, owned = self._runner.outline_keys(store.keys.shape[1], plan.room), True
        if kept is not None:
            _note(self._found, self._runner.appending(store, fresh, owned=owned))
        return Kept(store, plan.rows)

    def is_made(self, stride: Stride) -> bool:
        return False  # nobody leaves a rehearsal, so no lane is left behind in it

    def choose(self, kept: Kept | None, chosen: Sequence[int], lanes: int) -> Kept | None:
        return kept and Kept(self._runner.outline_keys(lanes, kept.tokens), kept.rows.choose(chosen, lanes))


class _Reader:
    def __init__(self, reader: Reader, found: Recipes) -> None:
        self._reader = reader
        self._found = found

    def read(self, pending: Sequence[Pending], *, fixed: bool) -> list[Readout]:
        for recipe in self._reader.recipes(pending, fixed=fixed):
            _note(self._found, recipe)
        return [one.readout for one in pending]


def _note(found: Recipes, recipe: Recipe) -> None:
    found.setdefault((recipe.kind, recipe.key), recipe)
