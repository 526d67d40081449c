"""MaskedForward as rows: one sequence, one row per variant, measured against the unmasked base where KL is asked.

Pure. It must not know queues, engines' insides or the wire.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from dualtrace.arrays import IntArray
from dualtrace.masks.resolve import MaskContext, span_tokens
from dualtrace.masks.spec import SegmentName
from dualtrace.problems import InvalidArgument, Problem, Reason, Unsupported
from dualtrace.questions.answers import ItemHeader
from dualtrace.questions.asked import MaskedForwardQuestion
from dualtrace.questions.compose import (
    Context,
    check_chars,
    check_one_window,
    check_tokens,
    check_top_k,
    check_variants,
    check_work,
    placed,
)
from dualtrace.questions.item_rows import (
    UNMASKED,
    WholeItem,
    check_all,
    measured,
    plan_row,
    rows_of_item,
    scored_tokens,
)
from dualtrace.questions.token_plan import PlannedItem, PlannedRow, TokenPlan, slice_tokens


def plan_masked_forward(question: MaskedForwardQuestion, context: Context) -> TokenPlan:
    check_variants(question.variants, context.limits, 1)
    check_all(question.variants, context)
    check_top_k(question.top_k, context.limits)
    check_chars([question.input], context.limits)
    _check_contrast(question, context)
    variants = len(question.variants)
    empty = TokenPlan((), (), variants, question.top_k, 0)
    try:
        planned = _plan_item(question, context)
        segments = check_segments(question.segments, planned.header.token_count)
        item = _whole(question, planned, segments, context)
    except Problem as problem:
        return replace(empty, items=(placed(problem, 0),))
    tokens = planned.header.token_count * variants
    check_tokens(tokens, context.limits, variants)
    # A plain variant is run as an unmasked one, so that it shares its rows with the masked ones.
    asked = tuple(replace(v, mask=UNMASKED.mask) if v.mask is None and context.masks else v for v in question.variants)
    found = rows_of_item(item, asked, context)
    rows = _against_base(found.rows, item, context) if _wants_kl(question) else found.rows
    check_work(sum(row.row.length for row in rows), context.limits)
    return TokenPlan(
        (planned,),
        tuple(rows),
        variants,
        question.top_k,
        tokens,
        tuple(found.refused),
        question.kl_base_masked,
        question.kl_masked_base,
    )


def _wants_kl(question: MaskedForwardQuestion) -> bool:
    return question.kl_base_masked or question.kl_masked_base


def _check_contrast(question: MaskedForwardQuestion, context: Context) -> None:
    if _wants_kl(question) and not context.contrasts:
        message = "this scorer cannot measure KL against the base (see Describe); leave the kl fields out"
        field = "kl_base_masked" if question.kl_base_masked else "kl_masked_base"
        raise Unsupported(Reason.NOT_IMPLEMENTED, message, field=field)


def _plan_item(question: MaskedForwardQuestion, context: Context) -> PlannedItem:
    given = question.input
    prefix_id = context.prefix_id(question.prefix, given, "input")
    tokens = context.tokens(given, "input")
    context.check_ids(tokens.ids, "input.text")
    count = int(tokens.ids.size)
    check_one_window(count + (prefix_id is not None), context.limits, "input")
    start = 0 if prefix_id is not None else 1
    scored_start = start if start < count else None
    header = ItemHeader(
        token_count=count,
        scored_start=scored_start,
        prefix_token_id=prefix_id,
        unscored=slice_tokens(tokens, 0, count if scored_start is None else scored_start),
    )
    return PlannedItem(tokens, header, count)


def check_segments(
    given: tuple[tuple[SegmentName, tuple[int, int]], ...], tokens: int
) -> Mapping[SegmentName, tuple[int, int]]:
    """The named token ranges, each name once and inside the text."""
    segments: dict[SegmentName, tuple[int, int]] = {}
    for index, (name, (start, end)) in enumerate(given):
        field = f"segments[{index}]"
        if name in segments:
            raise InvalidArgument(Reason.DUPLICATE, f"segment {name} stands twice", field=field)
        if not 0 <= start < end <= tokens:
            message = f"segment {name} is tokens {start}-{end}; the text has {tokens} (0-{tokens})"
            raise InvalidArgument(Reason.OUT_OF_RANGE, message, field=field, allowed=f"0-{tokens}")
        segments[name] = (start, end)
    return segments


def _whole(
    question: MaskedForwardQuestion,
    planned: PlannedItem,
    segments: Mapping[SegmentName, tuple[int, int]],
    context: Context,
) -> WholeItem:
    characters = None if question.input.text is None else len(question.input.text)
    item = WholeItem(0, planned, scored_tokens(planned), question.top_k, characters, segments)
    if not question.reads or not item.tokens_read.size:
        return item
    return replace(item, tokens_read=_read_tokens(question, item, context))


def _read_tokens(question: MaskedForwardQuestion, item: WholeItem, context: Context) -> IntArray:
    """The union of the spans asked, as far as it can be scored."""
    sequence = item.sequence()
    mask_context = MaskContext(
        length=int(sequence.ids.size),
        geometry=context.geometry,
        prefix=sequence.prefix,
        starts=sequence.tokens.starts,
        ends=sequence.tokens.ends,
        characters=item.characters,
        segments=item.segments,
    )
    wanted = np.zeros(item.planned.header.token_count, np.bool_)
    for index, span in enumerate(question.reads):
        start, end = span_tokens(span, mask_context, f"reads[{index}]")
        wanted[start:end] = True
    chosen = np.intersect1d(np.flatnonzero(wanted), item.tokens_read).astype(np.int32)
    if not chosen.size:
        message = "none of the tokens to read can be scored: the first one has no row before it"
        raise InvalidArgument(Reason.EMPTY, message, field="reads")
    return chosen


def _against_base(rows: list[PlannedRow], item: WholeItem, context: Context) -> list[PlannedRow]:
    """Measure every row against the unmasked base view: a variant that is just that, else a row of its own."""
    if not rows:
        return rows
    own = [row for row in rows if row.sight.view.is_plain and row.sight.plan and row.sight.plan.is_unmasked()]
    base = own[0] if own else plan_row(item, item.sequence(), 0, UNMASKED, context)
    return [measured(row, base.row) for row in rows]
