"""`dualtrace demo`: a real sidecar process over a small real model, asked three questions over gRPC, and ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dualtrace.cli.inputs import FOLDER, Ask, command_options

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dualtrace.card import Card
    from dualtrace.cli.asking import Answered
    from dualtrace.runs import AskedQuestion, Run

TEXT = "The capital of France is Paris, and the capital of Germany is Berlin."
PROMPT = "The capital of France is"
COMPLETIONS = (" Paris.", " Berlin.")
TOP_K = 5

Render = Callable[["Answered", "Run"], Iterable["RenderableType"]]


@click.command()
@click.option("--model", type=FOLDER, help="Checkpoint folder; default: SmolLM2-135M, fetched once into the cache.")
@command_options
def demo(model: Path | None, as_json: bool) -> None:
    """Start a sidecar, score a short text, list next tokens, compare two completions, stop the sidecar."""
    from dualtrace.cli.asking import with_scorer
    from dualtrace.cli.child_sidecar import child_sidecar
    from dualtrace.cli.describe import card_to_json
    from dualtrace.cli.output import waiting, write_json
    from dualtrace.runs import write_run

    folder = model or _fetch()
    click.echo(f"starting a sidecar over {folder}: a process of its own, in float64", err=True)
    with waiting("loading the weights and checking the model's numbers") as tell, child_sidecar(folder) as target:
        tell("asking")
        ask = Ask(target=target)
        card = with_scorer(ask, lambda scorer, _deadline, _tell: scorer.describe(), quiet=True)
        answers = [(_answer(ask, question), render, title) for question, render, title in _program()]
    click.echo(f"the sidecar at {target} has been stopped", err=True)
    runs = [run for (_, run), _, _ in answers]
    if as_json:
        document = {"kind": "dualtrace.demo", "card": card_to_json(card), "runs": [write_run(run) for run in runs]}
        write_json({**document, "findings": list(find(runs))})
    else:
        _show(card, answers, runs)


def _fetch() -> Path:
    from dualtrace.cli.model import progress_on_stderr
    from dualtrace.models.fetch import fetch_smollm2

    with progress_on_stderr() as progress:
        return fetch_smollm2(None, progress)


def _program() -> Iterator[tuple[AskedQuestion, Render, str]]:
    from dualtrace.cli.logprob import render_logprob
    from dualtrace.cli.next import render_next
    from dualtrace.cli.rolling import render_rolling
    from dualtrace.questions.asked import Input, LogprobItem, LogprobQuestion, NextTokenQuestion, RollingQuestion

    prompt = Input(text=PROMPT)
    pairs = tuple(LogprobItem(prompt, Input(text=text)) for text in COMPLETIONS)
    yield RollingQuestion((Input(text=TEXT),)), render_rolling, "1. A text, token by token (dualtrace rolling)"
    yield NextTokenQuestion((prompt,), TOP_K), render_next, "2. What comes next? (dualtrace next)"
    yield LogprobQuestion(pairs), render_logprob, "3. Which completion is likelier? (dualtrace logprob)"


def _answer(ask: Ask, question: AskedQuestion) -> tuple[Answered, Run]:
    """A demo shows whole answers only: any failure, of the call or of an item, ends it."""
    from dualtrace.cli.asking import answer
    from dualtrace.runs import restore_problem

    answered = answer(ask, question, quiet=True)
    if answered.failure is not None:
        raise answered.failure
    assert answered.run is not None
    for stored in answered.run.problems:
        raise restore_problem(stored)
    return answered, answered.run


def _show(card: Card, answers: list[tuple[tuple[Answered, Run], Render, str]], runs: list[Run]) -> None:
    from rich.text import Text

    from dualtrace.cli.describe import card_table
    from dualtrace.cli.output import show

    show([Text("0. Who answers (dualtrace describe)", "bold"), card_table(card)])
    for (answered, run), render, title in answers:
        show([Text(f"\n{title}", "bold"), *render(answered, run)])
    show([Text("\nWhat was seen", "bold"), *(Text(line) for line in find(runs))])


def find(runs: list[Run]) -> Iterator[str]:
    """Two or three plain sentences, out of the numbers themselves."""
    from dualtrace.cli.visible import show_piece
    from dualtrace.runs import NextEntry, ScoredItem

    text, following, pair = (run.entries for run in runs)
    item = text[0]
    assert isinstance(item, ScoredItem)
    scored = [(value, index) for index, value in enumerate(item.token_logprobs) if value is not None]
    if scored and item.perplexity is not None and item.tokens is not None:
        lowest, at = min(scored)
        yield (
            f"Over {len(scored)} scored tokens the perplexity is {item.perplexity:.2f}; the most surprising token is "
            f'"{show_piece(item.tokens[at])}" at index {at}, with probability {math.exp(lowest):.2g}.'
        )
    first = following[0]
    assert isinstance(first, NextEntry)
    if first.top_tokens:
        share = math.exp(first.top_logprobs[0])
        yield f'After "{PROMPT}" the likeliest token is "{show_piece(first.top_tokens[0])}", at {share:.1%}.'
    totals = [entry.total_logprob for entry in pair if isinstance(entry, ScoredItem)]
    if len(totals) == len(COMPLETIONS) and totals[0] is not None and totals[1] is not None:
        apart = totals[0] - totals[1]
        better, worse = COMPLETIONS if apart >= 0 else COMPLETIONS[::-1]
        factor = math.exp(min(700.0, abs(apart)))
        yield f'The model prefers "{better}" to "{worse}" by {abs(apart):.2f} nats, a factor of {factor:.3g}.'
