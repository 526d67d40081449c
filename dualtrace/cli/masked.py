"""`dualtrace masked`: one text under many masks and views, each against the model as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from dualtrace.cli.inputs import STDIN_OR_FILE, Ask, ask_options, one_input, parse_prefix, scoring_options
from dualtrace.cli.segments import SegmentsAsked, parse_read, segment_options
from dualtrace.cli.sights import Sights, sight_options
from dualtrace.problems import InvalidArgument, Reason

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dualtrace.questions.asked import MaskedForwardQuestion
    from dualtrace.runs.run import Run
    from dualtrace.scorer import Scorer

NAMES = ("--text", "--ids", "--file")


@click.command()
@ask_options
@click.option("--text", help="The text.")
@click.option("--ids", metavar="1,2,3", help="The same as token ids.")
@click.option("--file", type=STDIN_OR_FILE, help="The same from a file, - for standard input.")
@click.option(
    "--read",
    "reads",
    multiple=True,
    metavar="START:END",
    help="Tokens to read, or a segment's name; repeat it. Default: every token that can be scored.",
)
@click.option("--kl", is_flag=True, help="Also the exact KL both ways between the base and each variant.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Also the most likely tokens, in --json.")
@segment_options
@sight_options
@scoring_options
def masked(
    ask: Ask,
    text: str | None,
    ids: str | None,
    file: str | None,
    reads: tuple[str, ...],
    kl: bool,
    top_k: int,
    segments: SegmentsAsked,
    sights: Sights,
    prefix: str | None,
    deterministic: bool,
) -> None:  # fmt: skip
    """Score one text under masks and views, and measure each against the model as it is.

    The model as it is comes first, as v0. Every --mask under every --view is a variant.
    """
    from dualtrace.cli.asking import answer, present
    from dualtrace.questions.asked import MaskedForwardQuestion

    if not sights.masks and not sights.views:
        raise InvalidArgument(Reason.MISSING, "nothing to compare with; give --mask or --view", field="--mask")
    sights = replace(sights, with_base=True)
    given = one_input(text, ids, file, names=NAMES)
    spans = tuple(parse_read(one) for one in reads)
    question = MaskedForwardQuestion(
        given, (), (), spans, parse_prefix(prefix), top_k, kl, kl, deterministic=deterministic
    )

    async def prepare(scorer: Scorer, deadline: float | None) -> MaskedForwardQuestion:
        found = await segments.resolve(given, scorer, deadline)
        return replace(question, segments=found, variants=await sights.variants(scorer, deadline))

    present(ask, answer(ask, prepare), lambda _answered, run: render_masked(run, sights.labels))


def render_masked(run: Run, names: Sequence[str]) -> Iterator[RenderableType]:
    """A table a variant, against the base; then one line a variant."""
    from rich.text import Text

    from dualtrace.cli.output import output_console
    from dualtrace.cli.tables import model_line, usage_line
    from dualtrace.cli.variant_tables import items_of, masked_summary, masked_table, receipts
    from dualtrace.cli.visible import show_line

    width = output_console().width
    yield model_line(run.provenance)
    for _item, (base, *variants) in items_of(run):
        for entry in variants:
            yield Text(f"\nv{entry.variant} {show_line(names[entry.variant], 120)}", "bold")
            if entry.problem is None:
                yield masked_table(base, entry, width)
            else:
                yield Text("failed", "red")
        yield Text("")
        yield masked_summary([base, *variants], names)
    yield from receipts(run, names)
    yield from usage_line(run)
