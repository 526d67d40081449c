"""Deltas added to the rows that wear them, while one pass runs.

A hook stands on each module that some row's delta names, for the time of one pass only: rows without a delta are not
touched, and a pass without deltas has no hooks at all. It knows modules, factors and flat rows. It must not know views.
"""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backend_torch.attention import Work
from backend_torch.forks import Stage
from dualtrace.adapters import Delta, Factors
from dualtrace.adapters.factors import Matrix

KEPT_ADAPTERS = 8  # adapters whose factors stay on the device
MANY_RUNS = 16  # a call for each run of rows costs less than gathering them, while they are fewer
LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, eq=False)
class Worn:
    """Flat rows of one stage that wear one adapter, and how strongly."""

    rows: slice | Tensor  # a run of neighbours, or [n] int64
    strengths: Tensor  # [n, 1]


class Wardrobe:
    """The factors of adapters as tensors of the model's dtype, kept on its device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._kept: OrderedDict[str, dict[str, tuple[Tensor, Tensor]]] = OrderedDict()

    def find(self, delta: Delta) -> dict[str, tuple[Tensor, Tensor]]:
        """Per module: A [r, in] and B [out, r]."""
        if delta.key not in self._kept:
            self._kept[delta.key] = {name: self._move(factors) for name, factors in delta.factors.items()}
        self._kept.move_to_end(delta.key)
        while len(self._kept) > KEPT_ADAPTERS:
            self._kept.popitem(last=False)
        return self._kept[delta.key]

    def _move(self, factors: Factors) -> tuple[Tensor, Tensor]:
        a, b = (_as_tensor(matrix).to(self._device, self._dtype) for matrix in (factors.a, factors.b))
        return a, b


@contextmanager
def wear(
    linears: Mapping[str, nn.Module], work: Work, deltas: Mapping[int, Delta], wardrobe: Wardrobe
) -> Iterator[dict[int, set[str]]]:
    """Hooks for the time of the block. Yields per strand the modules that really added its delta."""
    hit: dict[int, set[str]] = {strand: set() for strand in deltas}
    by_key: dict[str, dict[int, Delta]] = {}
    for strand, delta in deltas.items():
        by_key.setdefault(delta.key, {})[strand] = delta
    handles = []
    try:
        for wearers in by_key.values():
            one = next(iter(wearers.values()))
            tensors = wardrobe.find(one)
            worn = [_worn(stage, wearers, linears) for stage in work.stages]
            for name, (a, b) in tensors.items():
                layer = LAYER.search(name)
                here = worn[work.stage_at(int(layer.group(1))) if layer else -1]  # outside the layers: all rows
                if here:
                    hook = _hook(name, a, b, one.factors[name].scaling, here, [hit[strand] for strand in wearers])
                    handles.append(linears[name].register_forward_hook(hook))
        yield hit
    finally:
        for handle in handles:
            handle.remove()


def _worn(stage: Stage, wearers: Mapping[int, Delta], linears: Mapping[str, nn.Module]) -> tuple[Worn, ...]:
    weight = next(iter(linears.values())).weight
    assert isinstance(weight, Tensor)
    runs: list[slice] = []
    strengths: list[float] = []
    for one in stage.placed:
        delta = wearers.get(one.piece.strand.index)
        if delta is None or not one.piece.rows:
            continue
        if runs and runs[-1].stop == one.rows.start:
            runs[-1] = slice(runs[-1].start, one.rows.stop)
        else:
            runs.append(one.rows)
        strengths += [delta.strength] * one.piece.rows
    column = torch.tensor(strengths, dtype=weight.dtype, device=weight.device)[:, None]
    if len(runs) > MANY_RUNS:
        rows = torch.cat([torch.arange(run.start, run.stop) for run in runs])
        return (Worn(rows.to(weight.device), column),)
    ends = np.cumsum([run.stop - run.start for run in runs]).tolist()
    return tuple(Worn(run, column[end - run.stop + run.start : end]) for run, end in zip(runs, ends, strict=True))


def _hook(
    name: str, a: Tensor, b: Tensor, scaling: float, worn: Sequence[Worn], hit: Sequence[set[str]]
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    scales = [one.strengths * scaling for one in worn]

    def add_delta(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        inputs = arguments[0].reshape(-1, a.shape[1])
        flat = output.view(-1, b.shape[0])
        for one, scale in zip(worn, scales, strict=True):
            narrow = (inputs[one.rows] @ a.T).mul_(scale)
            if isinstance(one.rows, slice):
                flat[one.rows].addmm_(narrow, b.T)  # in place: copies of wide rows cost more than the products
            else:
                flat.index_add_(0, one.rows, narrow @ b.T)
        for modules in hit:
            modules.add(name)

    return add_delta


def _as_tensor(matrix: Matrix) -> Tensor:
    """The same memory. torch warns of read-only arrays; nothing here writes to factors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(matrix)
