"""Pieces that are the same computation up to some layer are computed once up to there.

Two pieces with the same tokens, positions, view and past have equal hidden states at the input of a layer when they
saw the same in every layer below. So the rows of a pass form stages: at each layer where more pieces part, the rows
of the parting ones are copied from those that stood for them. It knows pieces, and the rows
of tensors. It must not know what a layer computes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from backend_torch.strands import Piece

Longs = npt.NDArray[np.int64]
Signature = Callable[[Piece, int], bytes]
"""What a piece sees in a layer, as bytes: equal bytes, equal sight."""


@dataclass(frozen=True, eq=False)
class Placed:
    """A piece on the flat axis of rows, and all pieces it stands for (itself among them)."""

    piece: Piece
    members: tuple[Piece, ...]
    rows: slice


@dataclass(frozen=True, eq=False)
class Stage:
    """The flat rows from `first_layer` on, until the next stage begins."""

    first_layer: int
    placed: tuple[Placed, ...]
    size: int
    from_input: Longs | None  # [size] the row of the input that each row repeats; None: the input as it is
    from_before: Longs | None  # [size] the row of the stage before (of the input for the first); None: as it is


def build_stages(pieces: Sequence[Piece], layers: int, signature: Signature) -> tuple[Stage, ...]:
    """The stages of a pass. The input of the model holds the rows of the last one."""
    partition = _alike(pieces)
    partitions: list[tuple[int, list[list[int]]]] = []
    for layer in range(layers):
        refined = _refine(partition, pieces, layer, signature)
        if not partitions or len(refined) != len(partition):
            partitions.append((layer, refined))
        partition = refined
    last = _place(pieces, partition)
    stages: list[Stage] = []
    for first_layer, classes in partitions:
        placed = _place(pieces, classes)
        if len(classes) == len(partition) and not stages:
            stages.append(Stage(first_layer, placed, _size(placed), None, None))
            continue
        before = stages[-1].placed if stages else last
        stages.append(Stage(first_layer, placed, _size(placed), _origin(placed, last), _origin(placed, before)))
    return tuple(stages)


def _alike(pieces: Sequence[Piece]) -> list[list[int]]:
    """Indices of pieces that begin alike: the same tokens at the same places behind the same past under one view."""
    classes: dict[object, list[int]] = {}
    for index, piece in enumerate(pieces):
        strand = piece.strand
        key: object = index
        if piece.is_whole and piece.rows:
            past = -1 if strand.parent is None else strand.parent.index
            key = (past, strand.start, strand.ids.tobytes(), strand.positions.tobytes(), strand.view.key)
        classes.setdefault(key, []).append(index)
    return list(classes.values())


def _refine(partition: list[list[int]], pieces: Sequence[Piece], layer: int, signature: Signature) -> list[list[int]]:
    refined: list[list[int]] = []
    for group in partition:
        if len(group) == 1:
            refined.append(group)
            continue
        parts: dict[bytes, list[int]] = {}
        for index in group:
            parts.setdefault(signature(pieces[index], layer), []).append(index)
        refined += parts.values()
    return sorted(refined)


def _place(pieces: Sequence[Piece], classes: list[list[int]]) -> tuple[Placed, ...]:
    placed: list[Placed] = []
    at = 0
    for group in sorted(classes):
        piece = pieces[group[0]]
        placed.append(Placed(piece, tuple(pieces[i] for i in group), slice(at, at + piece.rows)))
        at += piece.rows
    return tuple(placed)


def _size(placed: Sequence[Placed]) -> int:
    return placed[-1].rows.stop if placed else 0


def _origin(placed: Sequence[Placed], before: Sequence[Placed]) -> Longs:
    """For each row, the row among `before` that stands for it."""
    home = {member.strand.index: there.rows for there in before for member in there.members}
    parts = [np.arange(home[one.piece.strand.index].start, home[one.piece.strand.index].stop) for one in placed]
    return np.concatenate(parts).astype(np.int64)


def sight_digest(*blocks: npt.NDArray[np.bool_] | None) -> bytes:
    """The signature of boolean blocks [H or 1, ...]: heads that are all alike count as one head."""
    digest = hashlib.blake2b(digest_size=16)
    for block in blocks:
        if block is None or not block.any():
            digest.update(b"-")
            continue
        if (block == block[:1]).all():
            block = block[:1]
        digest.update(repr(block.shape).encode())
        digest.update(np.packbits(block).tobytes())
    return digest.digest()


@contextmanager
def fork_hooks(blocks: Sequence[nn.Module], stages: Sequence[Stage], device: torch.device) -> Iterator[None]:
    """For the time of one call of the body: before each layer its rows are those of the layer's stage."""
    handles = []
    try:
        for number, stage in enumerate(stages):
            end = stages[number + 1].first_layer if number + 1 < len(stages) else len(blocks)
            from_before = _index(stage.from_before, device)
            from_input = _index(stage.from_input, device)
            for layer in range(stage.first_layer, end):
                first = from_before if layer == stage.first_layer else None
                hook = _rows_hook(first, from_input)
                handles.append(blocks[layer].register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _index(rows: Longs | None, device: torch.device) -> Tensor | None:
    return None if rows is None else torch.from_numpy(rows).to(device)


def _rows_hook(hidden_rows: Tensor | None, input_rows: Tensor | None) -> Callable[..., Any]:
    """Hidden states come from the layer before; positions come from the model's input, at every layer."""

    def choose_rows(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        if hidden_rows is not None:
            if arguments:
                arguments = (arguments[0][:, hidden_rows], *arguments[1:])
            else:
                named = {**named, "hidden_states": named["hidden_states"][:, hidden_rows]}
        if input_rows is not None:
            for name in ("position_ids", "position_embeddings"):
                if named.get(name) is not None:
                    named = {**named, name: _take(named[name], input_rows)}
        return arguments, named

    return choose_rows


def _take(value: Any, rows: Tensor) -> Any:
    return tuple(_take(one, rows) for one in value) if isinstance(value, tuple) else value[:, rows]
