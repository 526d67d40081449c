"""`dualtrace score`: the Score API, probabilities of label tokens after query and item."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from dualtrace.cli.inputs import Ask, ask_options, parse_id_list, parse_ids, text_input
from dualtrace.cli.sights import Sights, sight_options
from dualtrace.cli.visible import show_piece
from dualtrace.problems import InvalidArgument, Problem, Reason

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dualtrace.questions.asked import Input, ScoreQuestion
    from dualtrace.runs.run import Run
    from dualtrace.scorer import Scorer


@click.command()
@ask_options
@click.option("--query", help="What is asked of each item; may be empty.")
@click.option("--query-ids", metavar="1,2,3", help="The same as token ids.")
@click.option("--item", "items", multiple=True, help="An item; repeat it for several.")
@click.option("--item-ids", multiple=True, metavar="4,5", help="An item as token ids; repeat it for several.")
@click.option("--labels", metavar="12,34", help="Label token ids, the same for every item.")
@click.option("--label-text", "label_texts", multiple=True, help="A label as text, which must be one token; repeat it.")
@click.option("--item-labels", multiple=True, metavar="12,34", help="Label ids of one item; one option per item.")
@click.option("--softmax", is_flag=True, help="Softmax over the labels only, instead of full probabilities.")
@click.option("--temperature", type=float, help="Divides the logprobs before --softmax; default: 1.")
@click.option("--item-first", is_flag=True, help="The item stands before the query.")
@click.option(
    "--packing",
    type=click.Choice(["hidden", "visible"]),
    help="All items in one row behind one query: "
    "hidden scores as without packing, visible as query + delimiter + item.",
)
@click.option("--delimiter", type=int, metavar="ID", help="Token id between packed items; visible needs it.")
@sight_options
@click.option("--deterministic", is_flag=True, help="Ask for bit-equal numbers whatever else the server runs.")
def score(
    ask: Ask,
    sights: Sights,
    query: str | None,
    query_ids: str | None,
    items: tuple[str, ...],
    item_ids: tuple[str, ...],
    labels: str | None,
    label_texts: tuple[str, ...],
    item_labels: tuple[str, ...],
    softmax: bool,
    temperature: float | None,
    item_first: bool,
    packing: str | None,
    delimiter: int | None,
    deterministic: bool,
) -> None:
    """Score label tokens after query + item, for each item."""
    from dualtrace.cli.asking import answer, present
    from dualtrace.cli.inputs import one_input
    from dualtrace.masks.packing import Convention
    from dualtrace.questions.asked import ScoreQuestion

    _check_labels(labels, label_texts, item_labels)
    asked = one_input(query, query_ids, None, names=("--query", "--query-ids", "--query-ids"))
    inputs = [text_input(text, "--item") for text in items] + [parse_ids(ids, "--item-ids") for ids in item_ids]
    shared = None if labels is None else parse_id_list(labels, "--labels")
    own = tuple(parse_id_list(one, "--item-labels") for one in item_labels) or None

    convention = None if packing is None else Convention(f"MIS_{packing.upper()}_DELIMITER")
    question = ScoreQuestion(
        asked, tuple(inputs), shared, own, softmax, temperature, item_first, convention, delimiter,
        deterministic=deterministic,
    )  # fmt: skip

    async def prepare(scorer: Scorer, deadline: float | None) -> ScoreQuestion:
        found = await resolve_labels(scorer, label_texts, deadline) if label_texts else shared
        return replace(question, labels=found, variants=await sights.variants(scorer, deadline))

    present(ask, answer(ask, prepare), lambda _answered, run: render_score(run, label_texts, sights.labels))


def _check_labels(labels: str | None, label_texts: Sequence[str], item_labels: Sequence[str]) -> None:
    given = [name for name, value in (
        ("--labels", labels is not None), ("--label-text", label_texts), ("--item-labels", item_labels),
    ) if value]  # fmt: skip
    if len(given) != 1:
        found = " and ".join(given) or "none"
        message = f"{found} given; give exactly one of --labels, --label-text, --item-labels"
        reason = Reason.CONFLICT if given else Reason.MISSING
        raise InvalidArgument(reason, message, field="--labels")


async def resolve_labels(
    scorer: Scorer, texts: Sequence[str], deadline: float | None, flag: str = "--label-text"
) -> tuple[int, ...]:
    """The token ids of label texts, by asking the scorer. A text that is not exactly one token is refused."""
    from dualtrace.questions.asked import TokenizeQuestion
    from dualtrace.scorer import ask_one

    inputs: tuple[Input, ...] = tuple(text_input(text, flag) for text in texts)
    answer = await ask_one(scorer, TokenizeQuestion(inputs), deadline=deadline)
    ids: list[int] = []
    for text, tokens in zip(texts, answer.results, strict=True):
        if isinstance(tokens, Problem):
            raise tokens
        if len(tokens) != 1:
            pairs = zip(tokens.ids.tolist(), tokens.pieces, strict=True)
            listed = ", ".join(f"{token_id} {show_piece(piece)}" for token_id, piece in pairs) or "none"
            message = f"label {text!r} is {len(tokens)} tokens ({listed}); a label must be exactly one"
            raise InvalidArgument(Reason.OUT_OF_RANGE, message, field=flag, allowed="texts of one token")
        ids.append(int(tokens.ids[0]))
    return tuple(ids)


def render_score(run: Run, label_texts: Sequence[str], variants: Sequence[str]) -> Iterator[RenderableType]:
    from rich.text import Text

    from dualtrace.cli.tables import model_line, score_table, usage_line
    from dualtrace.cli.variant_tables import legend, receipts, variant_score_table
    from dualtrace.questions.asked import ScoreQuestion

    assert isinstance(run.question, ScoreQuestion)
    names = {one: text.encode() for one, text in zip(run.question.labels or (), label_texts, strict=False)}
    yield model_line(run.provenance)
    yield from legend(variants)
    yield Text("")
    yield score_table(run, names) if len(variants) < 2 else variant_score_table(run, names)
    yield from receipts(run, variants)
    yield from usage_line(run)
