"""Answers as tables for people. Pure: runs and cards in, rich renderables out.

Colour only repeats what a number says already. Everything that came from elsewhere passes through `visible` first, and
nothing is ever read as markup. It must not know terminals, targets or how an answer was got.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from dualtrace.cli.visible import show_line, show_piece
from dualtrace.model_card import ModelProvenance
from dualtrace.questions.answers import Tail
from dualtrace.questions.asked import Input, ScoreQuestion
from dualtrace.runs.run import NextEntry, Run, ScoredItem, ScoreEntry, TokenizedEntry

ABSENT = "–"
WIDE = 80  # from this width on there is room for bars
BAR_NATS = 12  # a full bar
PIECE_WIDTH = 24
LEVELS = ((0.7, "green"), (2.3, ""), (4.6, "yellow"), (math.inf, "bold red"))  # p above 1/2, 1/10, 1/100, below


def surprise_style(logprob: float | None) -> str:
    if logprob is None:
        return "dim"
    return next(style for limit, style in LEVELS if -logprob <= limit)


def bar(nats: float | None) -> Text:
    """One block a nat."""
    if nats is None:
        return Text("")
    return Text("▇" * min(BAR_NATS, round(nats)) + ("+" if nats > BAR_NATS else ""), surprise_style(-nats))


def number(value: float | None, digits: int = 4, style: str = "") -> Text:
    return Text(ABSENT if value is None else f"{value:.{digits}f}", style)


def count(value: int | None) -> Text:
    return Text(ABSENT if value is None else str(value))


def piece(value: bytes | None, style: str = "") -> Text:
    shown = show_piece(value)
    return Text(shown if shown else "''", style)


def figures(name: str) -> Column:
    """A column of numbers: to the right, never broken."""
    return Column(name, justify="right", no_wrap=True)


def pieces(name: str, terminal: int = WIDE) -> Column:
    """A column of pieces: long ones are folded, the earlier the narrower the terminal."""
    return Column(name, max_width=max(8, min(PIECE_WIDTH, terminal - 40)), overflow="fold")


def plain_table(columns: Sequence[Column]) -> Table:
    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)


def pairs_table(pairs: Sequence[tuple[str, RenderableType]]) -> Table:
    """Names and values, one a line."""
    names = Column(no_wrap=True, style="dim", min_width=max(len(name) for name, _ in pairs))
    grid = Table.grid(names, Column(overflow="fold"), padding=(0, 2))
    for name, value in pairs:
        grid.add_row(name, value)
    return grid


def name_engine(provenance: ModelProvenance) -> str:
    """Framework and version, the name once: most versions begin with it."""
    version, framework = provenance.framework_version, provenance.framework
    return version if version.startswith(f"{framework} ") else f"{framework} {version}".rstrip()


def model_line(provenance: ModelProvenance) -> Text:
    """Who answers, in one line."""
    who = f"{provenance.model_id} · {name_engine(provenance)} · {provenance.dtype}"
    text = Text(show_line(f"{who} · {provenance.device}", 160), "dim")
    if provenance.synthetic:
        text.append("\nsynthetic: no model stands behind these numbers", "yellow")
    return text


def token_table(item: ScoredItem, start: int, names: Mapping[int, bytes], width: int) -> Table:
    """One line a token from index `start` on."""
    has_ties = any(item.token_ties[start:])
    candidates = item.token_candidates
    has_bars = width >= WIDE and candidates is None
    columns = [figures("#"), figures("id"), pieces("piece", width), figures("logprob"), figures("rank")]
    columns += [figures("ties")] if has_ties else []
    columns += [Column("top", overflow="fold")] if candidates is not None else []
    columns += [Column("surprise", no_wrap=True)] if has_bars else []
    table = plain_table(columns)
    for index in range(start, len(item.token_ids)):
        logprob = item.token_logprobs[index]
        style = surprise_style(logprob)
        own = item.tokens[index] if item.tokens is not None else None
        shown = piece(own, style) if item.tokens is not None else Text(ABSENT)
        cells = [count(index), count(item.token_ids[index]), shown, number(logprob, style=style)]
        cells += [count(item.token_ranks[index])]
        cells += [count(item.token_ties[index])] if has_ties else []
        cells += [_candidates(candidates.get(index, {}), names)] if candidates is not None else []
        cells += [bar(None if logprob is None else -logprob)] if has_bars else []
        table.add_row(*cells)
    return table


def _candidates(found: Mapping[int, float], names: Mapping[int, bytes]) -> Text:
    """`·Paris:-0.1234 ·Rome:-2.3456`; a candidate is never broken inside."""
    shown = (show_piece(names[one]) if one in names else str(one) for one in found)
    return Text(" ".join(f"{name}:{value:.4f}" for name, value in zip(shown, found.values(), strict=True)))


def item_summary(item: ScoredItem) -> Table:
    scored = sum(value is not None for value in item.token_logprobs)
    pairs: list[tuple[str, RenderableType]] = [
        ("tokens scored", Text(f"{scored} of {len(item.token_ids)}")),
        ("total logprob", number(item.total_logprob)),
        ("mean logprob", number(item.mean_logprob)),
        ("perplexity", number(item.perplexity)),
        ("greedy", Text(ABSENT if item.is_greedy is None else "yes" if item.is_greedy else "no")),
        ("mean 1/rank", number(item.mrr)),
        ("rank-1 share", number(item.rank1_share)),
    ]
    pairs += [("prefix token", count(item.prefix_token_id))] if item.prefix_token_id is not None else []
    if item.windows is not None:
        windows = item.windows
        shape = f"{windows.count}, of at most {windows.max_tokens} tokens, stride {windows.stride}"
        pairs.append(("windows", Text(shape)))
    if item.boundary_token_merged:
        pairs.append(("boundary", Text("the first token also holds the prompt's last characters", "yellow")))
    return pairs_table(pairs)


def comparison_table(run: Run, labels: Sequence[str]) -> Table:
    """One line an item, or an item and variant: what several completions come to."""
    entries = sorted((one for one in run.entries if isinstance(one, ScoredItem)), key=lambda e: (e.item, e.variant))
    has_variants = any(entry.variant for entry in entries)
    columns = [figures("item"), Column("completion", overflow="fold", max_width=32)]
    columns += [figures("variant")] if has_variants else []
    columns += [figures(name) for name in ("tokens", "total", "mean", "greedy")]
    table = plain_table(columns)
    for entry in entries:
        variant = [Text(f"v{entry.variant}")] if has_variants else []
        scored = sum(value is not None for value in entry.token_logprobs)
        greedy = Text("failed", "red") if entry.problem else Text("yes" if entry.is_greedy else "no")
        label = labels[entry.item] if entry.item < len(labels) else ""
        total, mean = number(entry.total_logprob), number(entry.mean_logprob)
        table.add_row(count(entry.item), Text(label), *variant, count(scored), total, mean, greedy)
    return table


def next_table(entry: NextEntry, width: int) -> Table:
    has_bars = width >= WIDE
    columns = [figures("rank"), figures("id"), pieces("piece", width), figures("logprob"), figures("probability")]
    table = plain_table([*columns, *([Column("", no_wrap=True)] if has_bars else [])])
    names = entry.top_tokens
    for index, (token_id, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True)):
        shown = Text(ABSENT) if names is None else piece(names[index])
        cells = [count(index + 1), count(token_id), shown, number(logprob), number(math.exp(min(0.0, logprob)))]
        cells += [Text("▇" * round(20 * math.exp(min(0.0, logprob))))] if has_bars else []
        table.add_row(*cells)
    for token_id, logprob in entry.extra_logprobs.items():
        cells = [Text("extra"), count(token_id), Text(""), number(logprob), number(math.exp(min(0.0, logprob)))]
        table.add_row(*cells)
    return table


def next_summary(entry: NextEntry) -> Table:
    pairs: list[tuple[str, RenderableType]] = [("beyond these", _tail(entry.tail, len(entry.top_ids)))]
    if entry.extra_logprobs:
        pairs.append(("beyond extra", _tail(entry.tail_beyond_extra, None)))
    pairs += [("vocabulary", count(entry.vocab_size)), ("prompt tokens", count(entry.prompt_tokens))]
    pairs += [("prefix token", count(entry.prefix_token_id))] if entry.prefix_token_id is not None else []
    return pairs_table(pairs)


def _tail(tail: Tail | None, listed: int | None) -> Text:
    if tail is None:
        return Text(ABSENT)
    if tail.logprob is not None:
        return Text(f"probability {math.exp(min(0.0, tail.logprob)):.4f} (logprob {tail.logprob:.4f})")
    told = {"FULL_COVERAGE": "nothing: the whole vocabulary is listed", "UNDERFLOW": "less than 2^-126"}
    return Text(told.get(tail.state, show_line(tail.state)))


def score_table(run: Run, names: Mapping[int, bytes]) -> Table:
    question = run.question
    assert isinstance(question, ScoreQuestion)
    columns = [figures("item"), Column("text", overflow="fold", max_width=28), figures("label"), pieces("piece")]
    table = plain_table([*columns, figures("score"), figures("logprob")])
    for entry in run.entries:
        assert isinstance(entry, ScoreEntry)
        text = Text(describe_input(question.items[entry.item]) if entry.item < len(question.items) else "")
        if entry.problem is not None:
            table.add_row(count(entry.item), text, Text("failed", "red"), Text(""), Text(ABSENT), Text(ABSENT))
        rows = zip(entry.label_token_ids, entry.scores, entry.label_logprobs, strict=False)
        for place, (label, score, logprob) in enumerate(rows):
            shown = piece(names[label]) if label in names else Text(ABSENT)
            first = (count(entry.item), text) if place == 0 else (Text(""), Text(""))
            table.add_row(*first, count(label), shown, number(score, 6), number(logprob))
    return table


def tokenize_table(entry: TokenizedEntry) -> Table:
    columns = [figures("#"), figures("id"), pieces("piece")]
    has_offsets = entry.char_starts is not None and entry.char_ends is not None
    table = plain_table([*columns, *([figures("characters")] if has_offsets else [])])
    for index, (token_id, token) in enumerate(zip(entry.token_ids, entry.tokens, strict=True)):
        cells = [count(index), count(token_id), piece(token)]
        if entry.char_starts is not None and entry.char_ends is not None:
            cells.append(Text(f"{entry.char_starts[index]}-{entry.char_ends[index]}"))
        table.add_row(*cells)
    return table


def describe_input(given: Input, width: int = 60) -> str:
    """An input in a few words: its text with visible whitespace, or its ids."""
    if given.text is not None:
        shown = show_piece(given.text.encode("utf-8", "surrogatepass"))
    else:
        assert given.ids is not None
        shown = f"ids {','.join(str(one) for one in given.ids[:16].tolist())}" if given.ids.size else "no ids"
    shown = shown or "''"
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def usage_line(run: Run) -> Iterator[Text]:
    if run.usage is not None and run.execution is not None:
        usage, execution = run.usage, run.execution
        yield Text(
            f"\n{usage.prompt_tokens} tokens asked · {usage.computed_tokens} computed · "
            f"{execution.total_seconds:.3f} s ({execution.queue_seconds:.3f} queued, "
            f"{execution.compute_seconds:.3f} computing)",
            "dim",
        )
