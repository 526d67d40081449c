"""`dualtrace logprob`: how probable a completion is after a prompt, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from dualtrace.cli.inputs import (
    STDIN_OR_FILE,
    Ask,
    ask_options,
    one_input,
    parse_ids,
    parse_prefix,
    read_items,
    scoring_options,
    text_input,
)
from dualtrace.cli.sights import Sights, sight_options
from dualtrace.problems import InvalidArgument, Reason

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dualtrace.cli.asking import Answered
    from dualtrace.questions.asked import LogprobItem
    from dualtrace.runs.run import Run
    from dualtrace.scorer import Scorer

NAMES = ("--prompt", "--prompt-ids", "--prompt-file")
TABLES_UP_TO = 8  # items that get a table of their own


@click.command()
@ask_options
@click.option("--prompt", help="What stands before; may be empty.")
@click.option("--prompt-ids", metavar="1,2,3", help="The same as token ids.")
@click.option("--prompt-file", type=STDIN_OR_FILE, help="The same from a file, - for standard input.")
@click.option("--completion", "completions", multiple=True, help="What is scored; repeat it for several.")
@click.option("--completion-ids", multiple=True, metavar="4,5", help="The same as token ids; repeat it for several.")
@click.option("--items", type=STDIN_OR_FILE, help="JSON lines with prompt and completion, or *_ids; - for stdin.")
@click.option(
    "--boundary",
    type=click.Choice(["joint", "separate", "strict"]),
    help="How text is cut into prompt and completion; default: joint.",
)
@click.option("--top-k", type=int, default=0, show_default=True, help="Also the most likely tokens at each place.")
@sight_options
@scoring_options
def logprob(
    ask: Ask,
    sights: Sights,
    prompt: str | None,
    prompt_ids: str | None,
    prompt_file: str | None,
    completions: tuple[str, ...],
    completion_ids: tuple[str, ...],
    items: str | None,
    boundary: str | None,
    top_k: int,
    prefix: str | None,
    deterministic: bool,
) -> None:
    """Score completions after a prompt: log p(completion | prompt), in nats."""
    from dualtrace.cli.asking import answer, present
    from dualtrace.questions.asked import LogprobQuestion
    from dualtrace.tokens import Boundary

    given = (prompt, prompt_ids, prompt_file)
    if items is None:
        asked = _pair(given, completions, completion_ids)
    elif any(value is not None for value in given) or completions or completion_ids:
        message = "--items holds prompts and completions itself; leave the other options out"
        raise InvalidArgument(Reason.CONFLICT, message, field="--items")
    else:
        asked = read_items(items)
    cut = None if boundary is None else Boundary(boundary.upper())
    question = LogprobQuestion(asked, cut, parse_prefix(prefix), top_k, deterministic=deterministic)

    async def prepare(scorer: Scorer, deadline: float | None) -> LogprobQuestion:
        return replace(question, variants=await sights.variants(scorer, deadline))

    answered = answer(ask, prepare, name_candidates=top_k > 0 and not ask.as_json)
    present(ask, answered, lambda answered, run: render_logprob(answered, run, sights.labels))


def _pair(
    given: tuple[str | None, str | None, str | None], completions: Sequence[str], completion_ids: Sequence[str]
) -> tuple[LogprobItem, ...]:
    from dualtrace.questions.asked import LogprobItem

    if not completions and not completion_ids:
        message = "nothing to score; give --completion, --completion-ids or --items"
        raise InvalidArgument(Reason.MISSING, message, field="--completion")
    prompt = one_input(*given, names=NAMES)
    scored = [text_input(text, "--completion") for text in completions]
    scored += [parse_ids(ids, "--completion-ids") for ids in completion_ids]
    return tuple(LogprobItem(prompt, one) for one in scored)


def render_logprob(answered: Answered, run: Run, names: Sequence[str] = ()) -> Iterator[RenderableType]:
    """The tables of a logprob run: one per item while they are few, and one line per item where there are several.

    `names` are those of the variants, where there are any but the model itself.
    """
    from rich.text import Text

    from dualtrace.cli.tables import comparison_table, describe_input, model_line, usage_line
    from dualtrace.cli.variant_tables import item_tables, items_of, legend, receipts
    from dualtrace.questions.asked import LogprobQuestion

    assert isinstance(run.question, LogprobQuestion)
    labels = [describe_input(item.completion) for item in run.question.items]
    yield model_line(run.provenance)
    yield from legend(names)
    for item, entries in items_of(run) if len(labels) <= TABLES_UP_TO else ():
        yield Text(f"\nitem {item}: {labels[item]}", "bold") if len(labels) > 1 else Text("")
        yield from item_tables(entries, max(entry.prompt_tokens for entry in entries), answered.pieces)
    if len(labels) > 1:
        yield Text("")
        yield comparison_table(run, labels)
    yield from receipts(run, names)
    yield from usage_line(run)
