"""A comparison as tables for people: token by token, candidate by candidate, label by label.

Pure: reports and pairs in, rich renderables out. Colour only repeats what a word says already, and everything that came
from elsewhere passes through `visible` first. It must not know targets, terminals or how the sides were asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.cells import cell_len
from rich.console import RenderableType
from rich.rule import Rule
from rich.table import Column, Table
from rich.text import Text

from dualtrace.cli.compare_findings import (
    gates_table,
    render_opening_of,
    summary_table,
    time_line,
    unused_gates_line,
    verdict_lines,
)
from dualtrace.cli.pair_book import ItemPairs, PairBook
from dualtrace.cli.tables import (
    ABSENT,
    PIECE_WIDTH,
    count,
    describe_input,
    figures,
    pairs_table,
    piece,
    pieces,
    plain_table,
)
from dualtrace.cli.trace_plot import plot_traces
from dualtrace.cli.visible import show_piece
from dualtrace.compare.events import IdMismatch
from dualtrace.compare.figures import DistributionReport, LabelReport
from dualtrace.compare.pass_rule import TokenStatus
from dualtrace.compare.report import CompareReport
from dualtrace.questions.asked import (
    Input,
    LogprobQuestion,
    MaskedForwardQuestion,
    NextTokenQuestion,
    RollingQuestion,
    ScoreQuestion,
)

SHOW_ALL_UP_TO = 64  # tokens of one item
AROUND = 8  # tokens shown on either side of the first divergence
WORST = 8  # tokens shown because they are farthest apart
NAMES = ("#", "id", "piece", "left", "right", "right-left", "rank", "status")
WIDE_GAP = 3  # characters between two columns
PIECE_ROOM = 12  # a piece is not folded earlier: a word cut into letters is unreadable
TABLES_UP_TO = 8  # items that get a table of their own; of more, those that differ come first

STATUS_STYLE = {
    TokenStatus.MATCH: "green",
    TokenStatus.MISMATCH: "bold red",
    TokenStatus.ID_MISMATCH: "bold red",
    TokenStatus.UNSCORED: "dim",
    TokenStatus.NOT_KEPT: "dim",
    TokenStatus.UNAVAILABLE: "yellow",
}
STATUS_WORD = {
    TokenStatus.MATCH: "ok",
    TokenStatus.MISMATCH: "DIFFERS",
    TokenStatus.ID_MISMATCH: "OTHER ID",
    TokenStatus.UNSCORED: "unscored",
    TokenStatus.NOT_KEPT: "not kept",
    TokenStatus.UNAVAILABLE: "unavailable",
}
BAD = {TokenStatus.MISMATCH, TokenStatus.ID_MISMATCH}


def render_comparison(
    report: CompareReport, book: PairBook, width: int, *, all_tokens: bool, is_opened: bool = False
) -> Iterator[RenderableType]:
    """Everything, in the order in which a reader asks. `is_opened`: who the sides are was shown already."""
    if not is_opened:
        yield from render_opening_of(report)
    yield from item_tables(report, book, width, all_tokens=all_tokens)
    for line in report.distributions:
        yield from distribution_tables(line, item_label(report, line.item), width)
    if report.labels:
        yield Text("")
        yield labels_table(report)
    if report.tokens is not None and report.tokens.aligned_count:
        yield Text("")
        yield summary_table(report.tokens)
    yield from time_line(report)
    yield Text("")
    yield gates_table(report.gates)
    yield from unused_gates_line(report.gates)
    yield Text("")
    yield from verdict_lines(report)


def item_tables(report: CompareReport, book: PairBook, width: int, *, all_tokens: bool) -> Iterator[RenderableType]:
    shown = choose_items(book)
    for item in shown:
        pairs = book.items[item]
        yield Text("")
        if len(book.items) > 1:
            yield Text(f"item {item}: {item_label(report, item)}", "bold")
        yield token_table(pairs, width, all_tokens=all_tokens)
        yield from left_out_line(pairs, all_tokens=all_tokens)
        if pairs.id_mismatch is not None:
            yield id_mismatch_line(pairs.id_mismatch)
        plot = plot_traces(pairs, width)
        if plot:
            yield Text("")
            yield from plot
    if len(shown) < len(book.items):
        yield Text("")
        yield Text(f"{len(book.items) - len(shown)} more items, all in agreement", "dim")


def choose_items(book: PairBook) -> list[int]:
    """All while they are few; of many, every one that differs, so that nothing bad is left out."""
    if len(book.items) <= TABLES_UP_TO:
        return sorted(book.items)
    return [item for item in sorted(book.items) if any(status in BAD for status in book.items[item].statuses)]


def choose_rows(pairs: ItemPairs, *, all_tokens: bool) -> list[int]:
    """Places to show: all of a short text; of a long one the first divergence with what is round it, and the worst."""
    total = len(pairs)
    if all_tokens or total <= SHOW_ALL_UP_TO:
        return list(range(total))
    centre = next((place for place, status in enumerate(pairs.statuses) if status in BAD), None)
    chosen = set(range(AROUND)) if centre is None else set(range(centre - AROUND, centre + AROUND + 1))
    ranked = sorted((place for place in range(total) if _distance(pairs, place)), key=lambda p: -_distance(pairs, p))
    return sorted(place for place in chosen | set(ranked[:WORST]) if 0 <= place < total)


def _distance(pairs: ItemPairs, place: int) -> float:
    delta = pairs.delta(place)
    return 0.0 if delta is None else math.inf if math.isnan(delta) else abs(delta)


def token_table(pairs: ItemPairs, width: int, *, all_tokens: bool) -> Table:
    """A line a token; a clear line before the first one out of tolerance, and one for what is left out.

    On a narrow terminal the gaps shrink first, then the ids go: a line that breaks cannot be read down its columns.
    """
    rows = choose_rows(pairs, all_tokens=all_tokens)
    cells = {place: _cells(pairs, place) for place in rows}
    has_ids = any(token_id >= 0 for token_id in pairs.token_ids)
    roomy = _widths(cells.values())
    names = [name for name in NAMES if has_ids or name != "id"]
    is_tight = sum(roomy[name] for name in names) + WIDE_GAP * (len(names) - 1) > width
    if is_tight and sum(roomy[name] for name in names) + len(names) - 1 > width:
        names = [name for name in names if name != "id"]
    others = sum(roomy[name] for name in names if name != "piece") + (1 if is_tight else WIDE_GAP) * (len(names) - 1)
    table = plain_table([_column(name, roomy[name], width - others) for name in names])
    table.padding = (0, 0) if is_tight else table.padding
    _fill(table, pairs, {place: [found[name] for name in names] for place, found in cells.items()})
    return table


def _fill(table: Table, pairs: ItemPairs, rows: Mapping[int, Sequence[Text]]) -> None:
    before = -1
    for place, row in rows.items():
        if place > before + 1:
            _add_gap(table, pairs, before + 1, place)
        if _is_first(pairs, place):
            table.add_row(*(Rule(characters="━", style="bold red") for _ in row))
        table.add_row(*row)
        before = place
    if before + 1 < len(pairs):
        _add_gap(table, pairs, before + 1, len(pairs))


def _widths(rows: Iterable[Mapping[str, Text]]) -> dict[str, int]:
    """What each column needs so that no number breaks; of pieces a word's length, the rest of one is folded."""
    widest = {name: cell_len(name) for name in NAMES}
    for row in rows:
        for name, cell in row.items():
            widest[name] = max(widest[name], cell.cell_len)
    return {**widest, "piece": min(PIECE_ROOM, widest["piece"])}


def _column(name: str, needed: int, room: int) -> Column:
    if name == "piece":
        longest = max(PIECE_ROOM, min(PIECE_WIDTH, room) // 2 * 2)  # even: many a character is two wide
        return Column(name, min_width=needed, max_width=longest, overflow="fold")
    return Column(name, no_wrap=True) if name == "status" else figures(name)


def _add_gap(table: Table, pairs: ItemPairs, start: int, stop: int) -> None:
    cells = [Text("") for _ in table.columns]
    cells[0], cells[-1] = Text("⋮", "dim"), Text(_skipped(pairs, start, stop), "dim")
    table.add_row(*cells)


def _skipped(pairs: ItemPairs, start: int, stop: int) -> str:
    bad = sum(status in BAD for status in pairs.statuses[start:stop])
    return f"{stop - start} more" + (f", {bad} bad" if bad else "")


def left_out_line(pairs: ItemPairs, *, all_tokens: bool) -> Iterator[Text]:
    shown = len(choose_rows(pairs, all_tokens=all_tokens))
    if shown < len(pairs):
        first = "around the first divergence" if any(status in BAD for status in pairs.statuses) else "the first ones"
        told = f"{shown} of {len(pairs)} tokens: {first}, and those farthest apart; --all-tokens shows all"
        yield Text(told, "dim")


def _is_first(pairs: ItemPairs, place: int) -> bool:
    return pairs.divergence is not None and pairs.indices[place] == pairs.divergence.index


def _cells(pairs: ItemPairs, place: int) -> dict[str, Text]:
    status = pairs.statuses[place]
    style = STATUS_STYLE[status]
    own, token_id = pairs.pieces[place], pairs.token_ids[place]
    return {
        "#": count(pairs.indices[place]),
        "id": count(token_id if token_id >= 0 else None),
        "piece": Text(ABSENT) if own is None else piece(own, style if status in BAD else ""),
        "left": value_text(pairs.left_logprobs[place]),
        "right": value_text(pairs.right_logprobs[place]),
        "right-left": delta_text(pairs.delta(place), style if status in BAD else "dim"),
        "rank": rank_text(pairs.left_ranks[place], pairs.right_ranks[place]),
        "status": Text(STATUS_WORD[status] + (" ◀ first" if _is_first(pairs, place) else ""), style),
    }


def value_text(value: float | None) -> Text:
    return Text(ABSENT if value is None else f"{value:.5f}")


def delta_text(delta: float | None, style: str = "") -> Text:
    if delta is None:
        return Text(ABSENT, "dim")
    return Text("0" if delta == 0 else f"{delta:+.2e}", style)


def rank_text(left: int | None, right: int | None) -> Text:
    if left is None or right is None:
        known = left if right is None else right
        return Text(ABSENT if known is None else str(known), "dim")
    return Text(str(left)) if left == right else Text(f"{left}→{right}", "yellow")


def id_mismatch_line(found: IdMismatch) -> Text:
    def told(token_id: int | None, own: bytes | None) -> str:
        return (
            "no token" if token_id is None else f"id {token_id} {show_piece(own) if own is not None else ''}".rstrip()
        )

    left, right = told(found.left_id, found.left_piece), told(found.right_id, found.right_piece)
    return Text(f"the sides read different tokens from token {found.index} on: left {left}, right {right}", "bold red")


def distribution_tables(line: DistributionReport, label: str, width: int) -> Iterator[RenderableType]:
    yield Text("")
    yield Text(f"after {label}", "bold").append(f"  {STATUS_WORD[line.status]}", STATUS_STYLE[line.status])
    if not line.token_ids:
        return
    table = plain_table(
        [figures("id"), pieces("piece", width), figures("left"), figures("right"), figures("right-left")]
    )
    for place, token_id in enumerate(line.token_ids):
        left, right = line.left_logprobs[place], line.right_logprobs[place]
        own = None if line.tokens is None else line.tokens[place]
        shown = Text(ABSENT) if own is None else piece(own)
        table.add_row(count(token_id), shown, value_text(left), value_text(right), delta_text(right - left))
    yield table
    yield Text("")
    yield pairs_table(
        [
            ("largest |Δ|", Text(ABSENT if line.max_abs_diff is None else f"{line.max_abs_diff:.3g} nats")),
            ("most likely", Text(_agreement(line.top1_agrees))),
            ("KL(left||right)", _bound(line.kl_left_right_lower)),
            ("KL(right||left)", _bound(line.kl_right_left_lower)),
            ("Jensen-Shannon", Text(_between(line.js_lower, line.js_upper))),
        ]
    )


def _agreement(agrees: bool | None) -> str:
    return ABSENT if agrees is None else "the same on both sides" if agrees else "another token on either side"


def _bound(lower: float | None) -> Text:
    return Text(ABSENT if lower is None else f"at least {lower:.3g} nats")


def _between(lower: float | None, upper: float | None) -> str:
    return ABSENT if lower is None or upper is None else f"{lower:.3g} to {upper:.3g} nats"


def labels_table(report: CompareReport) -> Table:
    columns = [figures("item"), Column("text", overflow="fold", max_width=32)]
    columns += [figures(name) for name in ("label", "left", "right", "right-left")]
    table = plain_table([*columns, Column("status", no_wrap=True)])
    for line in report.labels:
        _add_labels(table, line, item_label(report, line.item))
    return table


def _add_labels(table: Table, line: LabelReport, label: str) -> None:
    word, style = STATUS_WORD[line.status], STATUS_STYLE[line.status]
    if not line.left_scores or not line.right_scores:
        blank = Text(ABSENT)
        table.add_row(count(line.item), Text(label), blank, blank, blank, blank, Text(word, style))
        return
    for place, (left, right) in enumerate(zip(line.left_scores, line.right_scores, strict=True)):
        first = place == 0
        table.add_row(
            count(line.item) if first else Text(""),
            Text(label if first else ""),
            count(line.label_token_ids[place]),
            value_text(left),
            value_text(right),
            delta_text(right - left),
            Text(word if first else "", style),
        )


def item_label(report: CompareReport, item: int) -> str:
    """What the item is, in a few characters."""
    question = report.question
    inputs: Sequence[Input]
    match question:
        case LogprobQuestion():
            inputs = [one.completion for one in question.items]
        case RollingQuestion():
            inputs = question.inputs
        case NextTokenQuestion():
            inputs = question.prompts
        case ScoreQuestion():
            inputs = question.items
        case MaskedForwardQuestion():
            inputs = [question.input]
        case _:
            inputs = ()
    return describe_input(inputs[item]) if item < len(inputs) else str(item)
