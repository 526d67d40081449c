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
from backend_jax.call import Grid, Part, PastRows, lay_rows
from backend_jax.device import house_rules
from backend_jax.lora import Chosen, Factors, stack_factors
from backend_jax.masking import Words, build_masks
from backend_jax.mesh import Spread
from backend_jax.model import Lora, Outputs, Past, append_kept, forward, widen_kept
from backend_jax.programs import Programs, jit, outline
from backend_jax.shapes import CallShape, LoraShape, past_bucket
from backend_jax.weights import Weights
from dualtrace.adapters import Delta
from dualtrace.views import View

FACTORS_KEPT = 4  # stacks of adapters' factors that stay on the device


@dataclass(frozen=True, eq=False)
class Kept:
    """Keys and values of lanes' past rows, and the positions of those rows."""

    store: Keys  # [L,N,G,P,D]
    rows: PastRows

    @property
    def tokens(self) -> int:
        return int(self.store.keys.shape[3])


@dataclass(frozen=True, eq=False)
class Ran:
    hidden: npt.NDArray[Any]  # [N*C*T, hidden]
    fresh: Keys | None  # [L,N,G,T,D]
    tallies: Words | None


class Runner:
    def __init__(
        self,
        architecture: Architecture,
        weights: Weights,
        programs: Programs,
        modules: Mapping[str, tuple[str, int]],
        delta: Callable[[View], Delta | None],
        spread: Spread | None = None,
    ) -> None:
        self.architecture = architecture
        self.programs = programs
        self.delta = delta
        self._weights = weights
        self._modules = modules
        self._spread = spread
        self._factors: OrderedDict[tuple[str, ...], tuple[LoraShape, dict[str, Factors]]] = OrderedDict()

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = np.dtype(self._weights["embedding"].dtype)
        return dtype

    def known_rows(self, past_tokens: int) -> list[tuple[int, int]]:
        """(rows, tokens) of compiled plain calls on such a past, for packing."""
        shapes = [key for key in self.programs.keys("forward") if isinstance(key, CallShape)]
        return [
            (shape.rows, shape.tokens)
            for shape in shapes
            if (shape.pasts, shape.past_tokens, shape.keep, shape.mask, shape.lora)
            == (1, past_tokens, False, None, None)
        ]

    def run(self, parts: Sequence[Part], grid: Grid, kept: Kept | None, *, keep: bool = False) -> Ran:
        program, arguments = self._prepare(parts, grid, kept, keep)
        with house_rules():
            outputs: Outputs = program(self._weights, *arguments)
        fresh = None if outputs.keys is None or outputs.values is None else Keys(outputs.keys, outputs.values)
        tallies = None if outputs.counts is None else np.asarray(outputs.counts)
        return Ran(np.asarray(outputs.hidden), fresh, tallies)

    def warm(self, parts: Sequence[Part], grid: Grid, *, keep: bool = False) -> None:
        """Compile what `run` would, without running it."""
        self._prepare(parts, grid, None, keep)

    def _prepare(
        self, parts: Sequence[Part], grid: Grid, kept: Kept | None, keep: bool
    ) -> tuple[Callable[..., Outputs], tuple[Any, ...]]:
        rows = lay_rows(self.architecture, parts, grid, self.dtype)
        past = None
        if kept is not None:
            past = Past(*kept.store, *kept.rows.arrays(grid.pasts, grid.past_tokens))  # type: ignore[arg-type]
        masks = build_masks(self.architecture, parts, grid, None if kept is None else kept.rows)
        lora = self._lora(parts, grid)
        shape = CallShape(
            grid.pasts, grid.rows, grid.tokens, grid.past_tokens, keep, masks and masks[0], lora and lora[0]
        )
        arguments = (rows, past, masks and masks[1], lora and lora[1])
        spread = self._spread

        def lower() -> Any:
            function = partial(forward, self.architecture, keep)
            answers = None if spread is None else Outputs(spread.copied, spread.kept, spread.kept, spread.copied)  # type: ignore[arg-type]
            return jit(function, spread, answers).lower(outline(self._weights), *outline(arguments, spread))

        return self.programs.find("forward", shape, lower), arguments

    def _lora(self, parts: Sequence[Part], grid: Grid) -> tuple[LoraShape, Lora] | None:
        worn = {part.view.key: delta for part in parts if (delta := self.delta(part.view)) is not None}
        if not worn:
            return None
        deltas = {delta.key: delta for delta in worn.values()}
        keys = tuple(sorted(deltas))
        if keys not in self._factors:
            with house_rules():  # else the factors of a float64 engine would be put as float32
                shape, factors = stack_factors(
                    [deltas[key] for key in keys], self._modules, self.architecture, self.dtype
                )
                if self._spread is not None:
                    factors = jax.device_put(factors, self._spread.copied)
            self._factors[keys] = (shape, factors)
            if len(self._factors) > FACTORS_KEPT:
                self._factors.popitem(last=False)
        self._factors.move_to_end(keys)
        shape, factors = self._factors[keys]
        size = (grid.pasts, grid.rows)
        which, strength, on = np.zeros(size, np.int32), np.zeros(size, self.dtype), np.zeros(size, np.bool_)
        for part in parts:
            if (delta := worn.get(part.view.key)) is not None:
                place = (part.lane, part.row)
                which[place], strength[place], on[place] = keys.index(delta.key), delta.strength, True
        return shape, Lora(factors, Chosen(which, strength, on))  # type: ignore[arg-type]

    def append(self, kept: Kept | None, fresh: Keys, parts: Sequence[Part], *, owned: bool) -> Kept:
        """The past with the parts' rows added. `owned`: nobody else needs `kept`, so its memory is used again."""
        lanes, tokens = int(fresh.keys.shape[1]), int(fresh.keys.shape[3])
        before = kept.rows.positions if kept else tuple(np.empty(0, np.int32) for _ in range(lanes))
        offsets = np.array([positions.size for positions in before], np.int32)
        after = list(before)
        for part in parts:
            after[part.lane] = np.concatenate([before[part.lane], part.positions])
        room = past_bucket(int(offsets.max()) + tokens)
        if kept is None:
            return Kept(self._widen(fresh, room), PastRows(tuple(after)))
        store = self._widen(kept.store, room)
        owned = owned or store is not kept.store
        shape = ("append", owned, *store.keys.shape, tokens)
        give = (0,) if owned else ()
        program = self.programs.find(
            "keep",
            shape,
            lambda: self._jit_keep(append_kept, donate_argnums=give).lower(
                *outline((store, fresh, offsets), self._spread)
            ),
        )
        with house_rules():
            return Kept(program(store, fresh, offsets), PastRows(tuple(after)))

    def _jit_keep(self, function: Callable[..., Keys], **options: Any) -> Any:
        return jit(function, self._spread, self._spread and self._spread.kept, **options)

    def _widen(self, store: Keys, tokens: int) -> Keys:
        if store.keys.shape[3] >= tokens:
            return store
        program = self.programs.find(
            "keep",
            ("widen", *store.keys.shape, tokens),
            lambda: self._jit_keep(partial(widen_kept, tokens=tokens)).lower(outline(store)),
        )
        with house_rules():
            widened: Keys = program(store)
        return widened
