"""What a sequence may see under a variant: its view, its compiled mask, and the proof that both were obeyed.

It knows the mask package and views. It must not know queues, engines' insides or the wire.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from dualtrace.arrays import IntArray
from dualtrace.engine import Readout
from dualtrace.masks.json_form import digest
from dualtrace.masks.plan import MaskPlan, compile_mask
from dualtrace.masks.receipt import Counts, check
from dualtrace.masks.resolve import MaskContext, resolve
from dualtrace.masks.spec import MaskSpec, SegmentName
from dualtrace.problems import Internal, NotFound, Problem, Reason, Unsupported
from dualtrace.questions.answers import Applied, MaskMetadata, MaskReceipt
from dualtrace.questions.asked import Variant
from dualtrace.questions.compose import Context
from dualtrace.tokens import Tokens
from dualtrace.views import View


@dataclass(frozen=True, eq=False)
class Sequence:
    """A composed sequence of inputs: its ids with the prefix in front, and the places that masks may name."""

    ids: IntArray  # [T] int32
    tokens: Tokens  # [T - prefix]
    prefix: int  # 0 or 1
    characters: int | None = None  # None when the input was ids
    segments: Mapping[SegmentName, tuple[int, int]] = field(default_factory=dict)  # token ranges


@dataclass(frozen=True, eq=False)
class Sight:
    """A variant that met a sequence."""

    view: View
    plan: MaskPlan | None  # None: the model's own attention
    positions: IntArray  # [T]
    document_starts: tuple[int, ...] = ()  # tokens that this mask leaves unscored


def check_variant(variant: Variant, context: Context, field_name: str) -> None:
    """What can be refused before any sequence is known."""
    if variant.mask is not None and not context.masks:
        message = "this scorer applies the model's own attention only; leave the mask out (see Describe)"
        raise Unsupported(Reason.UNSUPPORTED_MASK, message, field=f"{field_name}.mask")
    if variant.view.adapter and not context.views:
        message = f"view {variant.view} asked; this scorer has no adapters (see Describe)"
        raise Unsupported(Reason.UNSUPPORTED_VIEW, message, field=f"{field_name}.view")
    if variant.view.adapter and variant.view.adapter not in context.adapters:
        allowed = ", ".join(context.adapters)
        message = f"adapter {variant.view.adapter!r} asked; this scorer has: {allowed}"
        raise NotFound(Reason.NOT_FOUND, message, field=f"{field_name}.view", allowed=allowed)


def see(variant: Variant, sequence: Sequence, context: Context, *, positions: IntArray | None = None) -> Sight:
    """Compile the variant for the sequence. May take long for large masks; bounded by the mask package."""
    length = int(sequence.ids.size)
    counted = np.arange(length, dtype=np.int32) if positions is None else positions
    if variant.mask is None:
        return Sight(variant.view, None, counted)
    mask_context = MaskContext(
        length=length,
        geometry=context.geometry,
        prefix=sequence.prefix,
        starts=sequence.tokens.starts,
        ends=sequence.tokens.ends,
        characters=sequence.characters,
        segments=sequence.segments,
        positions=positions,
    )
    try:
        plan = compile_mask(resolve(variant.mask, mask_context, context.fetch_array))
    except Problem as problem:
        raise problem.at(under="mask") from None
    reset = plan.positions()
    starts = tuple(entry.token for entry in plan.unscored())
    return Sight(variant.view, plan, counted if reset is None else reset, starts)


def readable_rows(sight: Sight, rows: IntArray, token_offset: int, *, allow_leak: bool) -> IntArray:
    """The rows that may be read: not those that predict a document's start; a leaking one fails the call."""
    if sight.document_starts:
        rows = rows[~np.isin(rows + token_offset, sight.document_starts)]
    if sight.plan is not None and not allow_leak:
        sight.plan.refuse_leaks(rows.tolist())
    return rows


def describe_mask(spec: MaskSpec, plan: MaskPlan) -> MaskMetadata:
    return MaskMetadata(spec.name, digest(spec), plan.shape(), plan.sparsity(), plan.resolved.notes)


@dataclass
class Proof:
    """Collects what an engine tallied for one row, readout by readout."""

    counts: Counts | None = None
    delta_modules: tuple[str, ...] = ()

    def add(self, readout: Readout) -> None:
        if readout.counts is not None:
            self.counts = readout.counts if self.counts is None else self.counts + readout.counts
        if readout.delta_modules is not None:
            self.delta_modules = readout.delta_modules

    def check(self, sight: Sight) -> Applied | None:
        """The receipt, held against the oracle; a difference fails (MASK_NOT_APPLIED)."""
        if not sight.view.is_plain and not self.delta_modules:
            message = f"view {sight.view} was asked and the engine added no delta anywhere"
            raise Internal(Reason.MASK_NOT_APPLIED, message)
        if sight.plan is None:
            return None
        if self.counts is None:
            raise Internal(Reason.MASK_NOT_APPLIED, "a mask was asked and the engine gave no receipt for it")
        receipt = check(self.counts, sight.plan)
        told = MaskReceipt(
            effective_mask_digest=receipt.effective_mask_digest,
            layers_hit=receipt.layers_hit,
            heads_hit=receipt.heads_hit,
            layers_applied=receipt.layers_applied,
            heads_applied=receipt.heads_applied,
            entries_cut=receipt.entries_cut,
            entries_cut_that_base_allowed=receipt.entries_cut_that_base_allowed,
            rows_emptied=receipt.rows_emptied,
        )
        return Applied(describe_mask(sight.plan.resolved.spec, sight.plan), told)
