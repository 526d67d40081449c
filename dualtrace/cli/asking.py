"""Asking a target a question and showing the answer: the steps every asking command has in common.

It knows Scorers and runs. It must not know what a particular question's options or tables are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import click

from dualtrace.cli.exits import exit_code, tell_problem
from dualtrace.cli.inputs import Ask
from dualtrace.cli.output import Tell, put, say_nothing, show, waiting
from dualtrace.problems import DeadlineExceeded, Problem, Reason
from dualtrace.questions.asked import Input, TokenizeQuestion
from dualtrace.runs.collector import RunCollector
from dualtrace.runs.run import AskedQuestion, Run, ScoredItem, restore_problem, run_to_text
from dualtrace.scorer import Scorer, ask_one
from dualtrace.targets import Target, open_target, parse_target
from dualtrace.tokens import Tokens

if TYPE_CHECKING:
    from rich.console import RenderableType

T = TypeVar("T")

Prepare = Callable[[Scorer, float | None], Awaitable[AskedQuestion]]
"""Makes the question with the scorer's help (label texts become ids by asking it)."""


@dataclass(frozen=True)
class Answered:
    """What came back: a run, whole or broken off, and the failure of the whole call."""

    run: Run | None
    failure: Problem | None = None
    pieces: Mapping[int, bytes] = field(default_factory=dict)  # of candidate ids, where asked and known


def with_scorer(ask: Ask, work: Callable[[Scorer, float | None, Tell], Awaitable[T]], *, quiet: bool = False) -> T:
    """Open the target, do the work, close it. Says on a terminal what is being waited for, unless `quiet`."""
    target = parse_target(ask.target)
    if quiet:
        return asyncio.run(_work_with(target, ask, work, say_nothing))
    with waiting(f"opening {target}") as tell:
        return asyncio.run(_work_with(target, ask, work, tell))


async def _work_with(
    target: Target, ask: Ask, work: Callable[[Scorer, float | None, Tell], Awaitable[T]], tell: Tell
) -> T:
    scorer = await open_target(target, ask.target_options())
    remote = target.kind in {"grpc", "grpcs"}
    tell(f"asking {target}")
    deadline = None if ask.timeout_seconds is None else time.monotonic() + ask.timeout_seconds
    try:
        async with asyncio.timeout_at(None if deadline is None else _on_loop_clock(deadline)):
            result = await work(scorer, deadline, tell)
    except BaseException as error:
        # An engine in this process may be in a step that takes minutes; its thread is a daemon and ends with us.
        if remote:
            await scorer.close()
        if isinstance(error, TimeoutError):
            message = f"no answer within {ask.timeout_seconds:g} s; allow more with --timeout"
            raise DeadlineExceeded(Reason.DEADLINE, message) from None
        raise
    await scorer.close()
    return result


def _on_loop_clock(deadline: float) -> float:
    """A moment of time.monotonic on the loop's clock, a little later: the scorer's own deadline speaks first."""
    return asyncio.get_running_loop().time() + max(0.0, deadline - time.monotonic()) + 0.25


def answer(
    ask: Ask, question: AskedQuestion | Prepare, *, name_candidates: bool = False, quiet: bool = False
) -> Answered:
    """Ask one question and collect the answer; when it breaks off, what had come is kept beside the failure."""
    begun: list[RunCollector] = []

    async def work(scorer: Scorer, deadline: float | None, tell: Tell) -> Answered:
        asked = await question(scorer, deadline) if callable(question) else question
        provenance = (await scorer.describe()).provenance if isinstance(asked, TokenizeQuestion) else None
        collector = RunCollector(ask.target, asked, provenance=provenance)
        begun.append(collector)
        async for event in scorer.ask(asked, deadline=deadline):
            collector.push(event)
            if collector.scored_tokens:
                tell(f"{collector.scored_tokens} tokens scored")
        run = collector.run()
        return Answered(run, None, await _name_candidates(scorer, run, deadline) if name_candidates else {})

    try:
        return with_scorer(ask, work, quiet=quiet)
    except Problem as problem:
        kept = begun[0].run() if begun and begun[0].scored_tokens else None
        return Answered(kept, problem)


async def _name_candidates(scorer: Scorer, run: Run, deadline: float | None) -> Mapping[int, bytes]:
    """The pieces of all top-k ids, for people. A scorer without a tokenizer leaves them as ids."""
    items = [entry for entry in run.entries if isinstance(entry, ScoredItem)]
    ids = sorted({one for item in items for found in (item.token_candidates or {}).values() for one in found})
    if not ids or all(item.tokens is None for item in items):
        return {}
    from dualtrace.engine import int_array

    described = await ask_one(scorer, TokenizeQuestion((Input(ids=int_array(ids)),)), deadline=deadline)
    found = described.results[0]
    return dict(zip(ids, found.pieces, strict=False)) if isinstance(found, Tokens) else {}


def present(ask: Ask, answered: Answered, render: Callable[[Answered, Run], Iterable[RenderableType]]) -> None:
    """Data to standard output, what failed to standard error, and the exit code that says so."""
    run = answered.run
    if run is not None:
        if ask.as_json:
            put(run_to_text(run) + "\n")
        else:
            show(render(answered, run))
    if answered.failure is not None:
        if run is not None:
            click.echo("the answer broke off; what is shown is not complete", err=True)
        raise answered.failure
    if run is not None and run.problems:
        click.get_current_context().exit(_tell_problems(run))


def _tell_problems(run: Run) -> int:
    """Name the items that failed. When all did, the code is the first one's own; when some did, it is 1."""
    for entry in run.entries:
        if entry.problem is not None:
            problem = restore_problem(entry.problem, entry.item)
            under = f", v{variant}" if (variant := getattr(entry, "variant", 0)) else ""
            click.echo(f"item {entry.item}{under}: {tell_problem(problem)}", err=True)
    whole = len(run.problems) == len(run.entries)
    return exit_code(restore_problem(run.problems[0])) if whole else 1
