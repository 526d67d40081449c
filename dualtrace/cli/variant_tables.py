"""Answers under several masks and views as tables: side by side, with what differs and the proof of application.

Pure: runs in, rich renderables out. It must not know how masks or views were written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from dualtrace.cli.output import output_console
from dualtrace.cli.tables import (
    ABSENT,
    count,
    describe_input,
    figures,
    item_summary,
    number,
    piece,
    pieces,
    plain_table,
    surprise_style,
    token_table,
)
from dualtrace.cli.visible import show_line
from dualtrace.questions.answers import Applied, MaskReceipt
from dualtrace.questions.asked import ScoreQuestion
from dualtrace.runs.run import NextEntry, Run, ScoredItem, ScoreEntry

T = TypeVar("T")

SHORT_DIGEST = 12
SHOWN_NAMES = 6


def items_of(run: Run) -> list[tuple[int, list[ScoredItem]]]:
    """The items that were composed, each with its variants in order."""
    found: dict[int, list[ScoredItem]] = {}
    for entry in run.entries:
        if isinstance(entry, ScoredItem) and entry.token_ids:
            found.setdefault(entry.item, []).append(entry)
    return [(item, sorted(entries, key=lambda entry: entry.variant)) for item, entries in sorted(found.items())]


def legend(names: Sequence[str]) -> Iterator[RenderableType]:
    """What v0, v1 ... stand for; nothing where there is but one."""
    if len(names) > 1:
        yield Text("")
        for index, name in enumerate(names):
            yield Text(f"v{index}  {show_line(name, 120)}")


def item_tables(entries: Sequence[ScoredItem], start: int, candidates: Mapping[int, bytes]) -> Iterator[RenderableType]:
    """One item: its tokens and what they come to, its variants side by side where there are several."""
    width = output_console().width
    if len(entries) == 1:
        yield token_table(entries[0], start, candidates, width)
        yield Text("")
        yield item_summary(entries[0])
    else:
        yield side_by_side(entries, start, width)
        yield Text("")
        yield variant_summary(entries)


def side_by_side(entries: Sequence[ScoredItem], start: int, width: int) -> Table:
    """One line a token, one column a variant, and the differences from the first variant."""
    first, *others = entries
    columns = [figures("#"), figures("id"), pieces("piece", width)]
    columns += [figures(f"v{entry.variant}") for entry in entries]
    columns += [figures(f"v{entry.variant}-v{first.variant}") for entry in others]
    table = plain_table(columns)
    for index in range(start, max(len(entry.token_ids) for entry in entries)):
        known = next((one for one in entries if _at(one.token_ids, index) is not None), None)
        if known is None:
            continue  # between the tokens that were read
        own = known.tokens[index] if known.tokens is not None else None
        logprobs = [_at(entry.token_logprobs, index) for entry in entries]
        cells = [count(index), count(known.token_ids[index]), Text(ABSENT) if own is None else piece(own)]
        cells += [number(value, style=surprise_style(value)) for value in logprobs]
        table.add_row(*cells, *(signed(minus(value, logprobs[0])) for value in logprobs[1:]))
    return table


def variant_summary(entries: Sequence[ScoredItem]) -> Table:
    """One line a variant: what its tokens come to."""
    names = ("variant", "tokens", "total", f"-v{entries[0].variant}", "mean", "perplexity", "greedy")
    table = plain_table([figures(name) for name in names])
    for entry in entries:
        scored = sum(value is not None for value in entry.token_logprobs)
        greedy = Text("failed", "red") if entry.problem else Text("yes" if entry.is_greedy else "no")
        apart = None if entry is entries[0] else minus(entry.total_logprob, entries[0].total_logprob)
        numbers = (number(entry.total_logprob), signed(apart), number(entry.mean_logprob), number(entry.perplexity))
        table.add_row(Text(f"v{entry.variant}"), count(scored), *numbers, greedy)
    return table


def masked_table(base: ScoredItem, entry: ScoredItem, width: int) -> Table:
    """One variant against the unmasked base, token by token: only what was read."""
    kinds = (("KL(base|masked)", entry.token_kl_base_masked), ("KL(masked|base)", entry.token_kl_masked_base))
    divergences = [(name, values) for name, values in kinds if values is not None]
    names = ("base", "logprob", "difference", *(name for name, _ in divergences))
    table = plain_table([figures("#"), figures("id"), pieces("piece", width), *(figures(name) for name in names)])
    for index, logprob in enumerate(entry.token_logprobs):
        if logprob is None:
            continue
        own = entry.tokens[index] if entry.tokens is not None else None
        before = _at(base.token_logprobs, index)
        cells = [count(index), count(entry.token_ids[index]), Text(ABSENT) if own is None else piece(own)]
        cells += [number(before), number(logprob, style=surprise_style(logprob)), signed(minus(logprob, before))]
        table.add_row(*cells, *(number(_at(values, index), 6) for _, values in divergences))
    return table


def masked_summary(entries: Sequence[ScoredItem], names: Sequence[str]) -> Table:
    """One line a variant: totals, differences from the base, mean divergences."""
    columns = [figures("variant"), Column("", overflow="fold", max_width=32)]
    columns += [figures(name) for name in ("tokens", "total", "difference", "mean KL(base|masked)")]
    has_kl = any(entry.token_kl_base_masked is not None for entry in entries)
    table = plain_table(columns if has_kl else columns[:-1])
    for entry in entries:
        scored = sum(value is not None for value in entry.token_logprobs)
        apart = None if entry is entries[0] else minus(entry.total_logprob, entries[0].total_logprob)
        kl = [value for value in entry.token_kl_base_masked or () if value is not None]
        cells = [Text(f"v{entry.variant}"), Text(show_line(names[entry.variant], 60)), count(scored)]
        cells += [number(entry.total_logprob), signed(apart)]
        table.add_row(*cells, *([number(sum(kl) / len(kl) if kl else None, 6)] if has_kl else []))
    return table


def variant_score_table(run: Run, names: Mapping[int, bytes]) -> Table:
    """One line an item and label, one column a variant's scores, and the differences from the first."""
    question = run.question
    assert isinstance(question, ScoreQuestion)
    variants = len(question.variants)
    columns = [figures("item"), Column("text", overflow="fold", max_width=28), figures("label"), pieces("piece")]
    columns += [figures(f"v{index}") for index in range(variants)]
    table = plain_table([*columns, *(figures(f"v{index}-v0") for index in range(1, variants))])
    entries = {(one.item, one.variant): one for one in run.entries if isinstance(one, ScoreEntry)}
    for item in sorted({item for item, _ in entries}):
        found = [entries.get((item, variant)) for variant in range(variants)]
        labels = next((one.label_token_ids for one in found if one is not None), ())
        for place, label in enumerate(labels):
            scores = [None if one is None else _at(one.scores, place) for one in found]
            text = Text(describe_input(question.items[item]) if place == 0 else "")
            shown = piece(names[label]) if label in names else Text(ABSENT)
            cells = [count(item) if place == 0 else Text(""), text, count(label), shown]
            cells += [number(value, 6) for value in scores]
            table.add_row(*cells, *(signed(minus(value, scores[0]), 6) for value in scores[1:]))
    return table


def receipts(run: Run, names: Sequence[str]) -> Iterator[RenderableType]:
    """What was really applied, once for each variant and different mask; nothing for the model as it is."""
    said: set[tuple[int, str]] = set()
    several = len({entry.item for entry in run.entries}) > 1
    for entry in sorted(run.entries, key=lambda entry: getattr(entry, "variant", 0)):
        if not isinstance(entry, ScoredItem | NextEntry | ScoreEntry) or entry.variant >= len(names):
            continue
        label = show_line(names[entry.variant], 60)
        head = (f"v{entry.variant} " if len(names) > 1 else "") + (f"item {entry.item} " if several else "") + label
        for line in receipt_lines(entry.applied, getattr(entry, "delta_modules", ())):
            if (entry.variant, line) not in said:
                if not said:
                    yield Text("")
                said.add((entry.variant, line))
                yield Text(f"{head}: {line}", "dim")


def receipt_lines(applied: Applied | None, delta_modules: Sequence[str]) -> Iterator[str]:
    if applied is not None:
        receipt, digest = applied.receipt, applied.metadata.digest
        yield f"{_what_was_cut(receipt)} · mask {_short(digest)} · effective {_short(receipt.effective_mask_digest)}"
        yield from (f"note: {show_line(note, 160)}" for note in applied.metadata.notes)
    if delta_modules:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in delta_modules})
        yield f"a delta was added to {len(delta_modules)} modules ({show_line(_some(kinds), 80)})"


def _what_was_cut(receipt: MaskReceipt) -> str:
    if not receipt.layers_hit:
        return f"nothing cut: the model's own attention in all {len(receipt.layers_applied)} layers"
    heads = sorted(set(receipt.heads_hit))
    at = f"heads {ranges(heads[0])}" if len(heads) == 1 else "other heads in other layers"
    cut = f"{receipt.entries_cut} entries cut"
    edges = receipt.entries_cut_that_base_allowed
    by_edges = f" ({edges} by edges)" if edges else ""
    emptied = f", {receipt.rows_emptied} rows emptied" if receipt.rows_emptied else ""
    return f"{cut}{by_edges}{emptied} in layers {ranges(receipt.layers_hit)}, {at}"


def _short(digest: str) -> str:
    return show_line(digest.removeprefix("sha256:"), 80)[:SHORT_DIGEST]


def _some(names: Sequence[str]) -> str:
    left = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {left} more" if left > 0 else "")


def ranges(values: Iterable[int]) -> str:
    """`0-2, 5`: ascending numbers in few words."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def minus(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def signed(value: float | None, digits: int = 4) -> Text:
    """With its sign; what rounds to nothing is +0, whichever side it is on."""
    return Text(ABSENT if value is None else f"{round(value, digits) + 0.0:+.{digits}f}")


def _at(values: Sequence[T] | None, index: int) -> T | None:
    return values[index] if values is not None and index < len(values) else None
