"""RollingLogprob as rows: one row per window and variant. Pure; it must not know queues or the wire."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dualtrace.problems import InvalidArgument, Problem, Reason
from dualtrace.questions.answers import ItemHeader, RollingWindows
from dualtrace.questions.asked import Input, RollingQuestion, Variant
from dualtrace.questions.compose import (
    Context,
    check_chars,
    check_count,
    check_tokens,
    check_top_k,
    check_variants,
    check_work,
    placed,
    with_prefix,
)
from dualtrace.questions.item_rows import VariantRows, WholeItem, check_all, rows_of_item, scored_tokens
from dualtrace.questions.sight import Sight
from dualtrace.questions.token_plan import PlannedItem, PlannedRow, Refused, TokenPlan, scoring_row, slice_tokens
from dualtrace.questions.windows import window_count, windows

ROW_COST = 256
"""Tokens that one row is worth beside its own: very many tiny windows cost memory, not arithmetic."""


@dataclass(frozen=True)
class _Grid:
    max_tokens: int
    stride: int


def plan_rolling(question: RollingQuestion, context: Context) -> TokenPlan:
    limits = context.limits
    check_count(len(question.inputs), limits, "inputs", least=1)
    check_variants(question.variants, limits, len(question.inputs))
    check_all(question.variants, context)
    check_top_k(question.top_k, limits)
    check_chars(question.inputs, limits)
    grid = _grid(question, limits.max_positions)
    items: list[PlannedItem | Problem] = []
    total = work = 0
    for index, given in enumerate(question.inputs):
        try:
            planned = _plan_item(given, question, context, grid, f"inputs[{index}]")
        except Problem as problem:
            items.append(placed(problem, index))
            continue
        items.append(planned)
        total += planned.header.token_count * len(question.variants)
        check_tokens(total, limits, len(question.variants))
        assert planned.header.windows is not None
        width = min(grid.max_tokens, planned.header.token_count)
        work += planned.header.windows.count * (width + ROW_COST) * len(question.variants)
        check_work(work, limits)  # before the windows are made: a stride of 1 over a book makes very many
    rows: list[PlannedRow] = []
    refused: list[Refused] = []
    for index, item in enumerate(items):
        if isinstance(item, PlannedItem):
            found = _rows(item, index, question, grid, context)
            rows += found.rows
            refused += found.refused
    return TokenPlan(tuple(items), tuple(rows), len(question.variants), question.top_k, total, tuple(refused))


def _grid(question: RollingQuestion, positions: int) -> _Grid:
    max_tokens = positions if question.max_tokens is None else question.max_tokens
    if not 1 <= max_tokens <= positions:
        message = f"max_tokens {max_tokens} asked; the model has {positions} positions"
        raise InvalidArgument(Reason.OUT_OF_RANGE, message, field="max_tokens", allowed=f"1-{positions}")
    stride = max_tokens if question.stride is None else question.stride
    if not 1 <= stride <= max_tokens:
        message = f"stride {stride} asked; it must be at least 1 and at most max_tokens ({max_tokens})"
        raise InvalidArgument(Reason.OUT_OF_RANGE, message, field="stride", allowed=f"1-{max_tokens}")
    return _Grid(max_tokens, stride)


def _plan_item(given: Input, question: RollingQuestion, context: Context, grid: _Grid, field: str) -> PlannedItem:
    prefix_id = context.prefix_id(question.prefix, given, field)
    tokens = context.tokens(given, field)
    context.check_ids(tokens.ids, f"{field}.text")
    count = int(tokens.ids.size)
    length = count + (prefix_id is not None)
    start = 0 if prefix_id is not None else 1
    scored_start = start if start < count else None
    header = ItemHeader(
        token_count=count,
        scored_start=scored_start,
        prefix_token_id=prefix_id,
        unscored=slice_tokens(tokens, 0, count if scored_start is None else scored_start),
        windows=RollingWindows(window_count(length, grid.max_tokens, grid.stride), grid.max_tokens, grid.stride),
    )
    return PlannedItem(tokens, header, count)


def _rows(item: PlannedItem, index: int, question: RollingQuestion, grid: _Grid, context: Context) -> VariantRows:
    """Windows for variants without a mask; a mask speaks of the whole text, so it needs one window."""
    found = VariantRows()
    for number, variant in enumerate(question.variants):
        if variant.mask is None:
            found.rows += _window_rows(item, index, number, variant, question.top_k, grid)
            continue
        masked = _masked_rows(item, index, number, question, context)
        found.rows += masked.rows
        found.refused += masked.refused
    return found


def _window_rows(
    item: PlannedItem, index: int, number: int, variant: Variant, top_k: int, grid: _Grid
) -> list[PlannedRow]:
    front = 0 if item.header.prefix_token_id is None else 1
    sequence = with_prefix(item.header.prefix_token_id, item.tokens.ids)
    rows = []
    for window in windows(int(sequence.size), grid.max_tokens, grid.stride):
        feed = slice(window.feed_start, window.feed_stop)
        score = slice(window.score_start, window.score_stop)
        row = replace(scoring_row(sequence, feed, score, top_k), view=variant.view)
        # Row r of the window predicts sequence[feed_start + r + 1].
        offset = window.feed_start + 1 - front
        rows.append(PlannedRow(row, index, number, offset, Sight(variant.view, None, row.positions)))
    return rows


def _masked_rows(
    item: PlannedItem, index: int, number: int, question: RollingQuestion, context: Context
) -> VariantRows:
    windows_needed = item.header.windows.count if item.header.windows else 0
    if windows_needed > 1:
        message = f"a masked text must fit one window; this one needs {windows_needed}; shorten it or raise max_tokens"
        problem = InvalidArgument(Reason.MASK_NEEDS_ONE_WINDOW, message, field=f"variants[{number}].mask", item=index)
        return VariantRows(refused=[Refused(index, number, problem)])
    text = question.inputs[index].text
    whole = WholeItem(index, item, scored_tokens(item), question.top_k, None if text is None else len(text))
    return rows_of_item(whole, (question.variants[number],), context, first=number)
