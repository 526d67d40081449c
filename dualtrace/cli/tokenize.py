"""`dualtrace tokenize`: text to tokens, ids to pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from dualtrace.cli.inputs import STDIN_OR_FILE, Ask, ask_options, gather_inputs
from dualtrace.problems import InvalidArgument, Reason

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dualtrace.cli.asking import Answered
    from dualtrace.runs.run import Run

NAMES = ("--text", "--ids", "--file")


@click.command()
@ask_options
@click.option("--text", "texts", multiple=True, help="Text to encode; repeat it for several.")
@click.option("--ids", multiple=True, metavar="1,2,3", help="Token ids to describe; repeat it for several.")
@click.option("--file", "files", multiple=True, type=STDIN_OR_FILE, help="File with a text, - for standard input.")
@click.option("--special-tokens", is_flag=True, help="With the tokenizer's own special tokens (BOS and the like).")
def tokenize(
    ask: Ask, texts: tuple[str, ...], ids: tuple[str, ...], files: tuple[str, ...], special_tokens: bool
) -> None:
    """Show the tokens of a text, or the pieces of ids, as TARGET sees them."""
    from dualtrace.cli.asking import answer, present
    from dualtrace.questions.asked import TokenizeQuestion

    inputs = gather_inputs(texts, ids, files, names=NAMES)
    if not inputs:
        raise InvalidArgument(Reason.MISSING, f"nothing to tokenize; give {', '.join(NAMES)}", field="--text")
    present(ask, answer(ask, TokenizeQuestion(inputs, special_tokens)), _render)


def _render(_answered: Answered, run: Run) -> Iterator[RenderableType]:
    from rich.text import Text

    from dualtrace.cli.tables import tokenize_table
    from dualtrace.runs.run import TokenizedEntry

    for entry in run.entries:
        if isinstance(entry, TokenizedEntry) and entry.problem is None:
            if len(run.entries) > 1:
                yield Text(f"input {entry.item}", "bold")
            yield tokenize_table(entry)
            yield Text(f"{len(entry.token_ids)} tokens", "dim")
