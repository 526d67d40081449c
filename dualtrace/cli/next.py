"""`dualtrace next`: the most likely tokens after a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from dualtrace.cli.inputs import (
    STDIN_OR_FILE,
    Ask,
    ask_options,
    gather_inputs,
    parse_id_list,
    parse_prefix,
    scoring_options,
)
from dualtrace.cli.sights import Sights, sight_options
from dualtrace.problems import InvalidArgument, Reason

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dualtrace.cli.asking import Answered
    from dualtrace.questions.asked import NextTokenQuestion
    from dualtrace.runs.run import Run
    from dualtrace.scorer import Scorer

NAMES = ("--prompt", "--prompt-ids", "--prompt-file")


@click.command("next")
@ask_options
@click.option("--prompt", "prompts", multiple=True, help="What stands before; repeat it for several.")
@click.option("--prompt-ids", multiple=True, metavar="1,2,3", help="The same as token ids; repeat it for several.")
@click.option("--prompt-file", "files", multiple=True, type=STDIN_OR_FILE, help="The same from a file, - for stdin.")
@click.option("--top-k", type=int, default=10, show_default=True, help="How many tokens to list.")
@click.option("--extra-ids", default="", metavar="5,6", help="Ids whose logprob is wanted whatever their rank.")
@sight_options
@scoring_options
def next_tokens(
    ask: Ask,
    sights: Sights,
    prompts: tuple[str, ...],
    prompt_ids: tuple[str, ...],
    files: tuple[str, ...],
    top_k: int,
    extra_ids: str,
    prefix: str | None,
    deterministic: bool,
) -> None:
    """List the most likely tokens at the position after each prompt."""
    from dualtrace.cli.asking import answer, present
    from dualtrace.questions.asked import NextTokenQuestion

    inputs = gather_inputs(prompts, prompt_ids, files, names=NAMES)
    if not inputs:
        raise InvalidArgument(Reason.MISSING, f"no prompt; give {', '.join(NAMES)}", field="--prompt")
    extra = parse_id_list(extra_ids, "--extra-ids")
    question = NextTokenQuestion(inputs, top_k, extra, parse_prefix(prefix), deterministic=deterministic)

    async def prepare(scorer: Scorer, deadline: float | None) -> NextTokenQuestion:
        return replace(question, variants=await sights.variants(scorer, deadline))

    present(ask, answer(ask, prepare), lambda answered, run: render_next(answered, run, sights.labels))


def render_next(_answered: Answered, run: Run, names: Sequence[str] = ()) -> Iterator[RenderableType]:
    """The tables of a next-token run; `names` are those of the variants."""
    from rich.text import Text

    from dualtrace.cli.output import output_console
    from dualtrace.cli.tables import describe_input, model_line, next_summary, next_table, usage_line
    from dualtrace.cli.variant_tables import legend, receipts
    from dualtrace.questions.asked import NextTokenQuestion
    from dualtrace.runs.run import NextEntry

    assert isinstance(run.question, NextTokenQuestion)
    width = output_console().width
    yield model_line(run.provenance)
    yield from legend(names)
    for entry in sorted(run.entries, key=lambda entry: entry.item):  # stable: variants stay in order
        if isinstance(entry, NextEntry) and entry.problem is None and entry.item < len(run.question.prompts):
            under = f", v{entry.variant} {names[entry.variant]}" if len(names) > 1 else ""
            yield Text(f"\nafter {describe_input(run.question.prompts[entry.item])}{under}", "bold")
            yield next_table(entry, width)
            yield Text("")
            yield next_summary(entry)
    yield from receipts(run, names)
    yield from usage_line(run)
