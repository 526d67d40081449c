"""`dualtrace rolling`: how probable each token of a text is, given what stands before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from dualtrace.cli.inputs import STDIN_OR_FILE, Ask, ask_options, gather_inputs, parse_prefix, scoring_options
from dualtrace.problems import InvalidArgument, Reason

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dualtrace.cli.asking import Answered
    from dualtrace.runs import Run

NAMES = ("--text", "--ids", "--file")


@click.command()
@ask_options
@click.option("--text", "texts", multiple=True, help="Text to score; repeat it for several.")
@click.option("--ids", multiple=True, metavar="1,2,3", help="Token ids to score; repeat it for several.")
@click.option("--file", "files", multiple=True, type=STDIN_OR_FILE, help="File with a text, - for standard input.")
@click.option("--max-tokens", type=int, help="Inputs of one window; default: as many as the model has positions.")
@click.option("--stride", type=int, help="Tokens from one window to the next; default: --max-tokens.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Also the most likely tokens at each place.")
@scoring_options
def rolling(
    ask: Ask,
    texts: tuple[str, ...],
    ids: tuple[str, ...],
    files: tuple[str, ...],
    max_tokens: int | None,
    stride: int | None,
    top_k: int,
    prefix: str | None,
    deterministic: bool,
) -> None:
    """Score every token of a whole text, in windows where it is longer than the model."""
    from dualtrace.cli.asking import answer, present
    from dualtrace.questions.asked import RollingQuestion

    inputs = gather_inputs(texts, ids, files, names=NAMES)
    if not inputs:
        raise InvalidArgument(Reason.MISSING, f"nothing to score; give {', '.join(NAMES)}", field="--text")
    question = RollingQuestion(inputs, parse_prefix(prefix), max_tokens, stride, top_k, deterministic=deterministic)
    present(ask, answer(ask, question, name_candidates=top_k > 0 and not ask.as_json), render_rolling)


def render_rolling(answered: Answered, run: Run) -> Iterator[RenderableType]:
    """The tables of a rolling run."""
    from rich.text import Text

    from dualtrace.cli.output import output_console
    from dualtrace.cli.tables import item_summary, model_line, token_table, usage_line
    from dualtrace.runs import ScoredItem

    width = output_console().width
    yield model_line(run.provenance)
    for entry in run.entries:
        if isinstance(entry, ScoredItem) and entry.token_ids:
            yield Text(f"text {entry.item}", "bold") if len(run.entries) > 1 else Text("")
            yield token_table(entry, 0, answered.pieces, width)
            yield Text("")
            yield item_summary(entry)
    yield from usage_line(run)
