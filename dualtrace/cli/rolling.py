"""`dualtrace rolling`: how probable each token of a text is, given what stands before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from dualtrace.cli.inputs import STDIN_OR_FILE, Ask, ask_options, gather_inputs, parse_prefix, scoring_options
from dualtrace.cli.sights import Sights, sight_options
from dualtrace.problems import InvalidArgument, Reason

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dualtrace.cli.asking import Answered
    from dualtrace.questions.asked import RollingQuestion
    from dualtrace.runs.run import Run
    from dualtrace.scorer import Scorer

NAMES = ("--text", "--ids", "--file")


@click.command()
@ask_options
@click.option("--text", "texts", multiple=True, help="Text to score; repeat it for several.")
@click.option("--ids", multiple=True, metavar="1,2,3", help="Token ids to score; repeat it for several.")
@click.option("--file", "files", multiple=True, type=STDIN_OR_FILE, help="File with a text, - for standard input.")
@click.option("--max-tokens", type=int, help="Inputs of one window; default: as many as the model has positions.")
@click.option("--stride", type=int, help="Tokens from one window to the next; default: --max-tokens.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Also the most likely tokens at each place.")
@sight_options
@scoring_options
def rolling(
    ask: Ask,
    sights: Sights,
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

    async def prepare(scorer: Scorer, deadline: float | None) -> RollingQuestion:
        return replace(question, variants=await sights.variants(scorer, deadline))

    answered = answer(ask, prepare, name_candidates=top_k > 0 and not ask.as_json)
    present(ask, answered, lambda answered, run: render_rolling(answered, run, sights.labels))


def render_rolling(answered: Answered, run: Run, names: Sequence[str] = ()) -> Iterator[RenderableType]:
    """The tables of a rolling run; `names` are those of the variants."""
    from rich.text import Text

    from dualtrace.cli.tables import model_line, usage_line
    from dualtrace.cli.variant_tables import item_tables, items_of, legend, receipts
    from dualtrace.questions.asked import RollingQuestion

    assert isinstance(run.question, RollingQuestion)
    yield model_line(run.provenance)
    yield from legend(names)
    for item, entries in items_of(run):
        yield Text(f"\ntext {item}", "bold") if len(run.question.inputs) > 1 else Text("")
        yield from item_tables(entries, 0, answered.pieces)
    yield from receipts(run, names)
    yield from usage_line(run)
