"""Who may see whom in a group of pieces, as the tensor that is applied, and the count of what it allowed.

It knows plans, windows, flat rows and keys. It must not know queries, keys or values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from backend_torch.families import Windows
from backend_torch.forks import Placed, sight_digest
from backend_torch.strands import Piece
from dualtrace.masks.receipt import mix
from dualtrace.problems import Internal, Reason

Bools = npt.NDArray[np.bool_]
Tallies = npt.NDArray[np.int64]  # [8, H or 1, pieces] in the order of the fields of `receipt.Counts`
WORD = 0xFFFFFFFF


@dataclass(eq=False)
class Sight:
    """What the rows of one group may see of its keys, in one layer."""

    # [1, H or 1, N, K] zero where a row may see, -inf elsewhere; what is added to the scores. The keys are the past and
    # then those of all rows; or, where siblings stand `apart`, those of the row's own piece alone.
    bias: Tensor
    zeroed: Tensor | None  # [1, H or 1, N, K] True: the weight is set to zero after the softmax
    blind: Tensor | None  # [1, H or 1, N, 1] True: the row sees nothing, its output is zero; None: every row sees
    apart: Apart | None = None
    tallies: Tallies | None = None  # the count of `bias` and `zeroed`, once somebody asked


@dataclass(frozen=True, eq=False)
class Apart:
    """How pieces behind one past go through attention as a batch: side by side or, unequally long, padded."""

    past: int
    lengths: tuple[int, ...]  # rows of each piece
    blind_before: Tensor  # [1, H or 1, N] True: the row sees no key of the past
    blind_after: Tensor  # [1, H or 1, N] True: it sees no key of its piece
    padded: Tensor | None  # [pieces * longest] the row that stands in each place of the batch; None: all as long
    places: Tensor | None  # [N] where each row stands in the batch

    def split(self, rows: Tensor) -> Tensor:
        """[1,H,N,X] -> [pieces,H,longest,X]"""
        rows = rows if self.padded is None else rows[:, :, self.padded]
        heads, columns = rows.shape[1], rows.shape[3]
        return rows.view(heads, len(self.lengths), -1, columns).transpose(0, 1)

    def join(self, batch: Tensor) -> Tensor:
        """[pieces,H,longest,X] -> [1,H,N,X]"""
        rows = batch.transpose(0, 1).reshape(1, batch.shape[1], -1, batch.shape[3])
        return rows if self.places is None else rows[:, :, self.places]


class Sights:
    """The sights of a pass: made once for all layers with the same rules, dropped when no later layer has them."""

    def __init__(self, windows: Windows, heads: int, dtype: torch.dtype, device: torch.device) -> None:
        self._windows = windows
        self._heads = heads
        self._dtype = dtype
        self._device = device
        self._groups: dict[int, dict[int, int]] = {}  # id of a plan -> layer -> group of layers
        self._kept: dict[object, tuple[Sight, int]] = {}  # key -> sight, the last layer that needs it

    def is_native(self, piece: Piece, layer: int) -> bool:
        """Whether plain causal attention is all that this piece needs here."""
        return piece.strand.plan is None and self._window(piece, layer) is None

    def signature(self, piece: Piece, layer: int) -> bytes:
        return sight_digest(*see(piece, layer, self._window(piece, layer)))

    def find(self, placed: tuple[Placed, ...], past: int, layer: int, *, apart: bool = False) -> Sight:
        """The sight of a group of pieces that share `past` keys and see nothing of each other.

        With `apart`, keys of siblings are left out where that can be."""
        rules = self._rules(placed, layer)
        key = (id(placed), rules)
        if key not in self._kept:
            later = range(layer + 1, len(self._windows))
            last = max((n for n in later if self._rules(placed, n) == rules), default=layer)
            self._kept[key] = self._make(placed, past, layer, apart), last
        sight, last = self._kept[key]
        if layer >= last:
            del self._kept[key]
        return sight

    def _rules(self, placed: Sequence[Placed], layer: int) -> tuple[tuple[int, int | None], ...]:
        return tuple(self._rule(one.piece, layer) for one in placed)

    def _rule(self, piece: Piece, layer: int) -> tuple[int, int | None]:
        """Equal in layers in which the piece sees the same."""
        plan = piece.strand.plan
        if plan is None:
            return -1, self._window(piece, layer)
        if id(plan) not in self._groups:
            self._groups[id(plan)] = {i: n for n, group in enumerate(plan.layer_groups()) for i in group}
        return id(plan), self._groups[id(plan)][layer]

    def _window(self, piece: Piece, layer: int) -> int | None:
        """The native window, None where it is wider than the text."""
        window = self._windows[layer]
        positions = piece.strand.positions[: piece.stop]
        if window is None or positions.size == 0 or int(positions.max()) - int(positions.min()) < window:
            return None
        return window

    def _make(self, placed: tuple[Placed, ...], past: int, layer: int, apart: bool) -> Sight:
        blocks = [see(one.piece, layer, self._window(one.piece, layer)) for one in placed]
        heads = max(allowed.shape[0] for allowed, _ in blocks)
        lengths = tuple(one.piece.rows for one in placed)
        zeroes = any(zero is not None for _, zero in blocks)
        apart = apart and past > 0 and len(placed) > 1 and not zeroes
        allowed = np.zeros((heads, sum(lengths), past + (max(lengths) if apart else sum(lengths))), np.bool_)
        zeroed = np.zeros_like(allowed) if zeroes else None
        at = 0
        for rows, (block, zero) in zip(lengths, blocks, strict=True):
            first = past if apart else past + at
            for target, source in ((allowed, block), (zeroed, zero)):
                if target is not None and source is not None:
                    target[:, at : at + rows, :past] = source[:, :, :past]
                    target[:, at : at + rows, first : first + rows] = source[:, :, past:]
            at += rows
        blind: Bools = np.logical_not(allowed.any(axis=2, keepdims=True))
        bias = torch.zeros((1, *allowed.shape), dtype=self._dtype, device=self._device)
        bias.masked_fill_(~self._tensor(allowed), float("-inf"))
        return Sight(
            bias,
            None if zeroed is None else self._tensor(zeroed)[None],
            self._tensor(blind)[None] if blind.any() else None,
            self._set_apart(allowed, past, lengths) if apart else None,
        )

    def _set_apart(self, allowed: Bools, past: int, lengths: tuple[int, ...]) -> Apart:
        padded = places = None
        longest = max(lengths)
        if min(lengths) < longest:
            starts = np.cumsum((0, *lengths[:-1]))
            inside = np.minimum(np.arange(longest)[None, :], np.array(lengths)[:, None] - 1)
            padded = self._tensor((starts[:, None] + inside).reshape(-1))
            places = self._tensor(np.concatenate([n * longest + np.arange(rows) for n, rows in enumerate(lengths)]))
        blind = [
            self._tensor(np.logical_not(part.any(axis=2)))[None]
            for part in (allowed[:, :, :past], allowed[:, :, past:])
        ]
        return Apart(past, lengths, blind[0], blind[1], padded, places)

    def _tensor(self, array: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def see(piece: Piece, layer: int, window: int | None) -> tuple[Bools, Bools | None]:
    """[H or 1, rows, piece.stop] what a piece's rows may see before the softmax, and what is zeroed after it."""
    strand, stop = piece.strand, piece.stop
    if strand.plan is None:
        rows = np.arange(piece.start, stop)[:, None]
        allowed = np.arange(stop)[None, :] <= rows
        if window is not None:
            distance = strand.positions[piece.start : stop, None].astype(np.int64) - strand.positions[None, :stop]
            allowed &= np.abs(distance) < window
        return allowed[None], None
    allowed = strand.plan.block(layer, piece.start, stop)
    if allowed[:, :, stop:].any():
        raise Internal(Reason.BUG, f"segment {strand.index}: a row below {stop} sees a key that is not computed yet")
    zeroed = strand.plan.zero_block(layer, piece.start, stop)
    return allowed[:, :, :stop], None if zeroed is None else zeroed[:, :, :stop]


def count_sight(sight: Sight, placed: Sequence[Placed], past: int) -> Tallies:
    """What the applied tensor allowed, per head and piece, in root-to-leaf rows and keys."""
    device = sight.bias.device
    rows = np.concatenate([np.arange(one.piece.start, one.piece.stop) for one in placed])
    # siblings apart all begin behind the same past, so a column is the same key for each of them
    keys = np.concatenate([np.arange(past), rows]) if sight.apart is None else np.arange(sight.bias.shape[3])
    tables = mix(int(keys.max()) + 1)
    own = np.concatenate(
        [np.arange(one.piece.start, one.piece.stop) >= one.piece.strand.counted_from for one in placed]
    )
    # 32-bit factors in halves: a float64 product sums them exactly, on every device
    factors = [
        np.ones(keys.size),
        *(half for g in (tables.g_a, tables.g_b) for half in (g[keys] & 0xFFFF, g[keys] >> 16)),
    ]
    halves = torch.from_numpy(np.stack(factors, axis=1).astype(np.float64)).to(device)
    turns = torch.from_numpy(np.stack([tables.f_a[rows], tables.f_b[rows]]).astype(np.int64)).to(device)
    piece_of_row = torch.from_numpy(np.repeat(np.arange(len(placed)), [one.piece.rows for one in placed])).to(device)
    counted = torch.from_numpy(own.astype(np.int64)).to(device)

    allowed = (sight.bias == 0)[0]  # [H or 1, N, K]
    taken = None if sight.zeroed is None else allowed & sight.zeroed[0]
    entries, sum_a, sum_b = _mixed(allowed, halves, turns)
    nothing = torch.zeros_like(entries)
    zeroed = (nothing, nothing, nothing) if taken is None else _mixed(taken.expand_as(allowed), halves, turns)
    columns = torch.stack([torch.ones_like(entries), (entries == 0).long(), entries, sum_a, sum_b, *zeroed]) * counted
    tallies = torch.zeros((*columns.shape[:2], len(placed)), dtype=torch.int64, device=device)
    tallies.index_add_(2, piece_of_row, columns)
    counted_tallies: Tallies = tallies.cpu().numpy()
    return counted_tallies


def _mixed(seen: Tensor, halves: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per head and row [H,N]: entries, and both mixes modulo 2**32."""
    sums = torch.stack([(one.double() @ halves).long() for one in seen])  # [H,N,5], a head at a time
    mixed = [
        (((sums[..., low] + (sums[..., low + 1] << 16)) & WORD) * turn) & WORD
        for low, turn in ((1, turns[0]), (3, turns[1]))
    ]
    return sums[..., 0], mixed[0], mixed[1]
