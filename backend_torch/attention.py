"""The one attention function of all families, and what it is told of a pass.

It receives queries, keys and values after rotary positions. The rows of a pass stand flat on one axis, [1, N]; a
`Work` says which rows belong together, what past they see and how. It comes as an argument of the model's call, so
there is no global state. It knows tensors and sights. It must not know models, reads or the wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from backend_torch.forks import Placed, Stage
from backend_torch.sight import Apart, Sight, Sights, Tallies, count_sight
from backend_torch.strands import Piece
from dualtrace.masks.receipt import Counts
from dualtrace.problems import Internal, Reason, Unsupported

ATTENTION = "dualtrace"
PACK_ROWS = 128
"""Texts are packed while they have no more rows: past that, keys that nobody sees cost more than another call does."""
UNIT_ROWS = 256  # rows of one call behind a shared past: a bound on its table of who sees whom
HAND_ROWS = 256  # rows of scores that exist at one time where attention is done by hand


@dataclass(frozen=True, eq=False)
class Unit:
    """Pieces whose attention is one call. Their rows stand side by side."""

    placed: tuple[Placed, ...]
    rows: slice
    past: int  # keys before the pieces: rows [0, past) of their text
    own: slice  # the pieces' own keys among those of the family
    counted: bool  # some piece here has a mask whose receipt is wanted


@dataclass(frozen=True, eq=False)
class Family:
    """Units behind one past. They read one tensor of keys: the past, then every row of the family."""

    lead: Piece
    units: tuple[Unit, ...]
    rows: slice


class Work:
    """One pass: its stages and units, where keys and values go, and what was counted."""

    def __init__(
        self, stages: Sequence[Stage], sights: Sights, *, layers: int, heads: int, softcap: float | None, isolate: bool
    ) -> None:
        self.stages = tuple(stages)
        self._families = tuple(_families(stage.placed, isolate) for stage in stages)
        self._sights = sights
        self._layers = layers
        self._heads = heads
        self._softcap = softcap
        self._isolate = isolate
        self._tallies: dict[int, Tallies] = {}  # strand -> [8, layers, heads]
        self.keeping: frozenset[int] = frozenset()  # strands whose keys and values outlive the pass

    def stage_at(self, layer: int) -> int:
        return sum(stage.first_layer <= layer for stage in self.stages) - 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[1,H,N,D] queries, [1,G,N,D] keys and values -> [1,N,H,D]."""
        place = self.stage_at(layer)
        self._keep(self.stages[place], layer, key, value)
        home = {one.piece.strand.index: one.rows for one in self.stages[place].placed}
        home |= {m.strand.index: one.rows for one in self.stages[place].placed for m in one.members}
        outputs = []
        for family in self._families[place]:
            keys = _with_past(family, layer, key, home, which=0)
            values = _with_past(family, layer, value, home, which=1)
            for unit in family.units:
                output = self._attend_unit(unit, layer, query[:, :, unit.rows], keys, values, scale)
                outputs.append(output.transpose(1, 2))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def counts(self, piece: Piece) -> Counts | None:
        """What the applied tensors allowed the piece's own rows; None without a mask."""
        if piece.strand.plan is None:
            return None
        tallies = self._tallies.get(piece.strand.index, np.zeros((8, self._layers, self._heads), np.int64))
        whole = [tallies[i] if i in (0, 1, 2, 5) else (tallies[i] & 0xFFFFFFFF).astype(np.uint32) for i in range(8)]
        return Counts(*whole)

    def _attend_unit(self, unit: Unit, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """`keys` and `values` are those of the whole family."""
        by_hand = self._isolate or self._softcap is not None
        if not by_hand and self._is_plain(unit, layer):
            return _causal(query, *_seen(unit, keys, values), scale, len(unit.placed))
        apart = not by_hand and query.device.type == "cpu"
        sight = self._sights.find(unit.placed, unit.past, layer, apart=apart)
        if unit.counted:
            self._count(unit, layer, sight)
        if sight.apart is not None:
            output = attend_apart(query, keys, values, sight, sight.apart, unit.own, scale)
        elif by_hand or sight.zeroed is not None:
            mine = _seen(unit, keys, values)
            return attend_by_hand(query, *mine, sight, scale, self._softcap, isolate=self._isolate)
        else:
            output = _sdpa(query, *_seen(unit, keys, values), scale, bias=sight.bias)
        return output if sight.blind is None else output.masked_fill(sight.blind, 0.0)

    def _is_plain(self, unit: Unit, layer: int) -> bool:
        """Causal attention of texts of one length, nothing else."""
        if unit.past or unit.counted or len({one.piece.rows for one in unit.placed}) > 1:
            return False
        return all(self._sights.is_native(one.piece, layer) for one in unit.placed)

    def _count(self, unit: Unit, layer: int, sight: Sight) -> None:
        if sight.tallies is None:
            sight.tallies = count_sight(sight, unit.placed, unit.past)
        for number, one in enumerate(unit.placed):
            for member in one.members:
                if member.strand.plan is not None:
                    whole = self._tallies.setdefault(
                        member.strand.index, np.zeros((8, self._layers, self._heads), np.int64)
                    )
                    whole[:, layer] += sight.tallies[:, :, number]

    def _keep(self, stage: Stage, layer: int, key: Tensor, value: Tensor) -> None:
        """Copy what later passes need into the strands' own buffers."""
        for one in stage.placed:
            for member in one.members:
                strand = member.strand
                if strand.index not in self.keeping or not member.rows:
                    continue
                if strand.keys_values is None:
                    strand.keys_values = []
                if len(strand.keys_values) <= layer:
                    rows = strand.stop - strand.start
                    fresh = [t.new_empty((1, t.shape[1], rows, t.shape[3])) for t in (key, value)]
                    strand.keys_values.append((fresh[0], fresh[1]))
                here = slice(member.start - strand.start, member.stop - strand.start)
                for target, source in zip(strand.keys_values[layer], (key, value), strict=True):
                    target[:, :, here] = source[:, :, one.rows]


def register_attention() -> None:
    """Make the function known to transformers, under its own name, with a mask function that makes no mask."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    """Both must be registered: without a mask function of its own, an attention function would get none of a family's
    sliding windows and could not tell. Ours reads them from the config and builds every mask itself."""


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dualtrace_work: Work | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    if dualtrace_work is None or attention_mask is not None:
        raise Internal(Reason.BUG, "the model was called without a Work, or with a mask that is not ours")
    for name in ("position_bias", "s_aux"):
        if others.get(name) is not None:
            raise Unsupported(Reason.MODEL_UNSUPPORTED, f"the model's attention uses {name}, which is not served here.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]
    return dualtrace_work.attend(layer, query, key, value, scale), None


def _families(placed: tuple[Placed, ...], isolate: bool) -> tuple[Family, ...]:
    """Neighbours behind one past and under one view; a piece that is long enough for a call of its own is alone."""
    groups: list[list[Placed]] = []
    for one in placed:
        if one.piece.rows == 0:
            continue
        if groups and not isolate and _fits(groups[-1], one):
            groups[-1].append(one)
        else:
            groups.append([one])
    return tuple(
        Family(group[0].piece, _units(group), slice(group[0].rows.start, group[-1].rows.stop)) for group in groups
    )


def _units(group: list[Placed]) -> tuple[Unit, ...]:
    parts: list[list[Placed]] = [[]]
    for one in group:
        if group[0].piece.start and parts[-1] and one.rows.stop - parts[-1][0].rows.start > UNIT_ROWS:
            parts.append([])
        parts[-1].append(one)
    past = group[0].piece.start
    units = []
    for part in parts:
        rows = slice(part[0].rows.start, part[-1].rows.stop)
        first = past + rows.start - group[0].rows.start
        counted = any(member.strand.plan is not None for one in part for member in one.members)
        units.append(Unit(tuple(part), rows, past, slice(first, first + rows.stop - rows.start), counted))
    return tuple(units)


def _fits(group: list[Placed], one: Placed) -> bool:
    first, piece = group[0].piece, one.piece
    if piece.start != piece.strand.start or first.start != first.strand.start or piece.start != first.start:
        return False
    if piece.strand.parent is not first.strand.parent or piece.strand.view.key != first.strand.view.key:
        return False
    if piece.start:
        return max(piece.rows, first.rows) <= PACK_ROWS
    if sum(other.piece.rows for other in group) + piece.rows <= PACK_ROWS:
        return True
    plain = all(member.strand.plan is None for other in (*group, one) for member in other.members)
    return plain and all(other.piece.rows == piece.rows for other in group)


def _with_past(family: Family, layer: int, own: Tensor, home: dict[int, slice], *, which: int) -> Tensor:
    """[1,G,past + rows,D]: the keys (or values) of rows [0, past) of the family's text, then those of its own rows."""
    piece = family.lead
    before = [strand for strand in piece.strand.ancestors() if strand.ids.size]
    if len(before) == 1 and before[0].keys_values is None and home[before[0].index].stop == family.rows.start:
        return own[:, :, home[before[0].index].start : family.rows.stop]  # they stand side by side: no copy
    parts: list[Tensor] = []
    for strand in before:
        kept = strand.keys_values
        parts.append(own[:, :, home[strand.index]] if kept is None else kept[layer][which])
    mine = piece.strand.keys_values
    if piece.start > piece.strand.start:
        assert mine is not None
        parts.append(mine[layer][which][:, :, : piece.stop - piece.strand.start])
    else:
        parts.append(own[:, :, family.rows])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _seen(unit: Unit, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Of a family's keys and values, the past and the unit's own."""
    if unit.own.start <= unit.past:
        return keys[:, :, : unit.own.stop], values[:, :, : unit.own.stop]
    first, second = (torch.cat([t[:, :, : unit.past], t[:, :, unit.own]], dim=2) for t in (keys, values))
    return first, second


def _causal(query: Tensor, keys: Tensor, values: Tensor, scale: float, texts: int) -> Tensor:
    """Plain causal attention of `texts` equally long texts that stand side by side."""
    if texts == 1:
        return _sdpa(query, keys, values, scale, bias=None)
    rows, columns = query.shape[2], query.shape[3]
    query, keys, values = (
        t.transpose(1, 2).reshape(texts, rows // texts, -1, columns).transpose(1, 2) for t in (query, keys, values)
    )
    output = _sdpa(query, keys, values, scale, bias=None)
    return output.transpose(1, 2).reshape(1, rows, -1, columns).transpose(1, 2)


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, scale: float, *, bias: Tensor | None) -> Tensor:
    """[B,H,N,D]; without a bias, causal."""
    shared = query.shape[1] // keys.shape[1]
    native = query.device.type == "cpu" or bias is None  # elsewhere a bias and shared keys leave the fast kernels
    if shared > 1 and not native:
        keys, values = (t.repeat_interleave(shared, dim=1) for t in (keys, values))
    if bias is not None:
        bias = bias.expand(query.shape[0], -1, -1, -1)
    return scaled_dot_product_attention(
        query, keys, values, attn_mask=bias, is_causal=bias is None, scale=scale, enable_gqa=shared > 1 and native
    )


def attend_apart(
    query: Tensor, keys: Tensor, values: Tensor, sight: Sight, apart: Apart, own: slice, scale: float
) -> Tensor:
    """Siblings behind one past: its keys for all rows in one call, then each piece's own keys, a batch of pieces in
    another. Both softmaxes become one by the logarithms of their sums."""
    past = apart.past
    biases = sight.bias[..., :past], sight.bias[..., past:]
    before, before_sums = _flash(query, keys[:, :, :past], values[:, :, :past], biases[0], scale)
    batch = [apart.split(t) for t in (query, keys[:, :, own], values[:, :, own], biases[1])]
    after, after_sums = _flash(batch[0], batch[1], batch[2], batch[3], scale)
    after, after_sums = apart.join(after), apart.join(after_sums[..., None])[..., 0]
    # a row that sees nothing has a sum of 1 there, and not of 0
    before_sums = before_sums.masked_fill(apart.blind_before, float("-inf"))
    after_sums = after_sums.masked_fill(apart.blind_after, float("-inf"))
    share = torch.sigmoid(before_sums - after_sums)[..., None].to(before.dtype)
    return torch.lerp(after, before, share)


def _flash(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What sdpa does on this device, with the logarithm of each row's sum, [B,H,N]."""
    found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, attn_mask=bias, scale=scale
    )
    return found


def attend_by_hand(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sight: Sight,
    scale: float,
    softcap: float | None,
    *,
    isolate: bool = False,
) -> Tensor:
    """Scores, softmax, mix, for what sdpa cannot do: a soft cap, weights zeroed after the softmax, and, with
    `isolate`, keys that are not finite and must reach only the rows that see them (0 * NaN is NaN)."""
    shared = query.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(shared, dim=1) for t in (keys, values))
    broken = None
    if isolate:
        broken = ~(torch.isfinite(keys).all(-1) & torch.isfinite(values).all(-1))[:, :, None]  # [1,H,1,K]
        keys, values = keys.nan_to_num(0.0, 0.0, 0.0), values.nan_to_num(0.0, 0.0, 0.0)
    wide = torch.promote_types(query.dtype, torch.float32)
    output = torch.empty_like(query[..., : values.shape[-1]])
    for start in range(0, query.shape[2], HAND_ROWS):
        rows = slice(start, start + HAND_ROWS)
        scores = (query[:, :, rows] @ keys.transpose(2, 3)) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        seen = sight.bias[:, :, rows] == 0
        weights = torch.softmax(scores.to(wide).masked_fill(~seen, float("-inf")), dim=-1)
        if sight.blind is not None:
            weights = weights.masked_fill(sight.blind[:, :, rows], 0.0)
        if sight.zeroed is not None:
            weights = weights.masked_fill(sight.zeroed[:, :, rows], 0.0)
        mixed = weights.to(values.dtype) @ values
        if broken is not None:
            mixed = mixed.masked_fill((seen & broken).any(-1, keepdim=True), float("nan"))
        output[:, :, rows] = mixed
    return output
