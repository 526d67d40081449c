"""Doing a comparison for a command: sides opened, asked, judged; files written. Shared by compare, diff and cases.

It knows how the sides are asked, here or by a coordinator. It must not know how a result looks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path

import click

from dualtrace.cli.compare_csv import comparison_to_csv
from dualtrace.cli.compare_findings import Introduced, render_opening
from dualtrace.cli.compare_html import comparison_to_html
from dualtrace.cli.compare_question import QuestionAsked
from dualtrace.cli.compare_sides import (
    AbsentScorer,
    Children,
    SideAsked,
    SidesAsked,
    close_own,
    open_sides,
    start_children,
)
from dualtrace.cli.coordinator_texts import write_out
from dualtrace.cli.exits import FAILED, UNAVAILABLE, exit_code
from dualtrace.cli.output import Tell, show, waiting
from dualtrace.cli.pair_book import PairBook
from dualtrace.cli.visible import show_text
from dualtrace.compare.events import CompareEvent, CompareHeader
from dualtrace.compare.gates import GatePolicy
from dualtrace.compare.report import CompareReport, Verdict
from dualtrace.compare.tolerance import Tolerance
from dualtrace.comparing.comparison import CompareOptions, Comparison, LiveSide
from dualtrace.coordinator_client import CompareOutcome, CoordinatorClient
from dualtrace.library import ComparePlan, SideSpec
from dualtrace.problems import Internal, InvalidArgument, Problem, Reason
from dualtrace.questions.asked import ForwardQuestion, Variant
from dualtrace.runs.run import Run, restore_problem, run_to_text
from dualtrace.runs.stored_scorer import StoredScorer
from dualtrace.scorer import Scorer
from dualtrace.targets import find_coordinator
from dualtrace.views import BASE


@dataclass(frozen=True)
class Wanted:
    """How to judge, and what to write."""

    tolerance: Tolerance | None
    policy: GatePolicy
    keep_tokens: int = 4096
    all_tokens: bool = False
    csv_file: Path | None = None
    html_file: Path | None = None
    save_left: Path | None = None
    save_right: Path | None = None


@dataclass(frozen=True, eq=False)
class Judged:
    """What came of it."""

    report: CompareReport
    book: PairBook
    left_run: Run | None = None
    right_run: Run | None = None
    report_text: str = ""  # the very document, where a coordinator made it
    comparison_id: str = ""  # under which the coordinator keeps it
    is_opened: bool = False  # who the sides are was shown before they answered
    last_words: tuple[str, ...] = field(default=())  # of sidecars of ours that died


def verdict_code(report: CompareReport) -> int:
    """The exit code of a verdict: 3 where a side was not available, 1 for everything else that is no PASS."""
    if report.verdict is Verdict.PASS:
        return 0
    problems = [side.problem for side in (report.left, report.right) if side.problem is not None]
    codes = {exit_code(restore_problem(problem)) for problem in problems}
    return UNAVAILABLE if report.verdict is Verdict.ERROR and UNAVAILABLE in codes else FAILED


def late_sides(report: CompareReport) -> tuple[str, ...]:
    """Targets that did not answer in time: who stands behind them may be in a step that never ends."""
    sides = (report.left, report.right)
    return tuple(one.target for one in sides if one.problem is not None and one.problem.reason == Reason.DEADLINE)


def compare_here(sides: SidesAsked, asked: QuestionAsked, wanted: Wanted, command: str) -> Judged:
    """Everything from this process and children of it."""
    question = None if asked.is_empty else asked.read()
    with waiting(f"starting {_names(sides)}") as tell, start_children(sides.both) as children:
        children.await_all(sides.start_seconds, tell)
        judged = asyncio.run(_compare(sides, asked, question, wanted, command, children, tell))
        words = tuple(words for side in dict.fromkeys(sides.both) for words in _last_words(side, children))
    return replace(judged, last_words=words)


def _names(sides: SidesAsked) -> str:
    return " and ".join(dict.fromkeys(str(side.target) for side in sides.both))


async def _compare(
    sides: SidesAsked,
    asked: QuestionAsked,
    question: ForwardQuestion | None,
    wanted: Wanted,
    command: str,
    children: Children,
    tell: Tell,
) -> Judged:
    async with open_sides(sides, children) as scorers:
        tell(f"asking {_names(sides)}")
        deadline = None if sides.timeout_seconds is None else time.monotonic() + sides.timeout_seconds
        if question is not None:
            question = await asked.complete(question, _choose_helper(sides, scorers), deadline)
        left, right = [await _live_side(sides, place, scorers, deadline) for place in range(2)]
        options = CompareOptions(wanted.tolerance, wanted.policy, wanted.keep_tokens, command)
        comparison = Comparison(question, left, right, options)
        async with aclosing(comparison.events()) as events:
            opening = Opening(sides.as_json, (left.target, left.variant), (right.target, right.variant))
            report, book = await read_events(events, tell, opening)
        if not late_sides(report):
            await close_own(sides, scorers)
        return Judged(report, book, comparison.left_run, comparison.right_run, is_opened=opening.is_shown)


def compare_by_coordinator(sides: SidesAsked, asked: QuestionAsked, wanted: Wanted, command: str) -> Judged:
    """Everything by the coordinator, which keeps it too."""
    with waiting(f"asking the coordinator at {sides.left.coordinator}") as tell:
        judged = asyncio.run(_compare_there(sides, asked, wanted, tell))
    # The document says how to ask by stored run; shown is the command of this very call, which names the coordinator.
    return replace(judged, report=replace(judged.report, reproduce=command))


def _side_spec(side: SideAsked) -> SideSpec:
    if side.stored_variant is not None:
        message = (
            f"{side.target}: a coordinator compares runs of one variant; leave --left-variant, --right-variant out"
        )
        raise InvalidArgument(Reason.CONFLICT, message, field="--left-variant")
    masks, views = side.sights.masks, side.sights.views
    mask = masks[0].usual() if masks else None
    return SideSpec(str(side.target), Variant(views[0] if views else BASE, mask, side.sights.allow_leak))


async def _compare_there(sides: SidesAsked, asked: QuestionAsked, wanted: Wanted, tell: Tell) -> Judged:
    deadline = None if sides.timeout_seconds is None else time.monotonic() + sides.timeout_seconds
    async with open_coordinator(sides) as client:
        question = await write_out(asked, client, [str(side.target) for side in sides.both], deadline)
        left, right = (_side_spec(side) for side in sides.both)
        plan = ComparePlan(
            question,
            left,
            right,
            wanted.tolerance,
            wanted.policy,
            wanted.keep_tokens,
            timeout_seconds=sides.timeout_seconds,
        )
        outcome, book, opening = await ask_coordinator(client, plan, deadline, tell, is_silent=sides.as_json)
    return judged_there(outcome, book, opening)


def judged_there(outcome: CompareOutcome, book: PairBook, opening: Opening) -> Judged:
    return Judged(
        outcome.report,
        book,
        report_text=outcome.report_text,
        comparison_id=outcome.comparison_id,
        is_opened=opening.is_shown,
    )


def open_coordinator(sides: SidesAsked) -> CoordinatorClient:
    side = sides.left
    options = replace(side.ask.target_options(), coordinator=side.coordinator)
    return CoordinatorClient(find_coordinator(side.target, options))


async def ask_coordinator(
    client: CoordinatorClient, plan: ComparePlan, deadline: float | None, tell: Tell, *, is_silent: bool
) -> tuple[CompareOutcome, PairBook, Opening]:
    """A comparison by the coordinator. It keeps a share of the time to tell what became of a side that is late."""
    book = PairBook()
    opening = Opening(is_silent, (plan.left.target, plan.left.variant), (plan.right.target, plan.right.variant))
    async with aclosing(client.compare(plan, deadline=deadline)) as told:
        async for event in told:
            if isinstance(event, CompareOutcome):
                book.fill(event.report)
                return event, book, opening
            opening.push(event)
            book.push(event)
            tell(book.progress())
    raise Internal(Reason.INCOMPLETE_STREAM, "the comparison ended without its report")


@dataclass
class Opening:
    """Who the two sides are, shown the moment both have said it: before any token, and not again at the end."""

    is_silent: bool  # data is wanted, no tables
    left: tuple[str, Variant]
    right: tuple[str, Variant]
    is_shown: bool = False

    def push(self, event: CompareEvent) -> None:
        if self.is_silent or not isinstance(event, CompareHeader):
            return
        left, right = Introduced(*self.left, event.left), Introduced(*self.right, event.right)
        show(render_opening(left, right, event.differences, event.tolerance))
        self.is_shown = True


async def read_events(
    events: AsyncIterator[CompareEvent | CompareReport], tell: Tell, opening: Opening
) -> tuple[CompareReport, PairBook]:
    """Collect what a comparison tells, with progress for whoever waits."""
    book = PairBook()
    report: CompareReport | None = None
    async for event in events:
        if isinstance(event, CompareReport):
            report = event
        else:
            opening.push(event)
            book.push(event)
            tell(book.progress())
    if report is None:
        raise Internal(Reason.INCOMPLETE_STREAM, "the comparison ended without its report")
    book.fill(report)
    return report, book


def _choose_helper(sides: SidesAsked, scorers: Sequence[Scorer]) -> Scorer:
    """Who tokenizes labels and expressions: the left side, unless it knows no tokenizer."""
    able = [
        scorer for side, scorer in zip(sides.both, scorers, strict=True)
        if not isinstance(scorer, StoredScorer | AbsentScorer)
        and not (side.target.kind == "py" and side.ask.tokenizer is None)
    ]  # fmt: skip
    return able[0] if able else scorers[0]


async def _live_side(sides: SidesAsked, place: int, scorers: Sequence[Scorer], deadline: float | None) -> LiveSide:
    """A side with its face and mask; beside a stored run a live side that names none takes the run's own."""
    side, scorer, other = sides.both[place], scorers[place], scorers[1 - place]
    name, seconds = str(side.target), sides.timeout_seconds
    if isinstance(scorer, StoredScorer):
        if side.names_sight:
            message = f"{side.target} is a stored answer, under the mask and view that it was asked; leave these out"
            raise InvalidArgument(Reason.CONFLICT, message, field="--mask")
        return LiveSide(name, scorer, timeout_seconds=seconds)
    if not side.names_sight:
        variant = other.question.variants[0] if isinstance(other, StoredScorer) else Variant()
        return LiveSide(name, scorer, variant, seconds)
    try:
        return LiveSide(name, scorer, await side.variant(scorer, deadline), seconds)
    except InvalidArgument:
        raise
    except Problem as problem:  # it could not be told the mask: that side's failure, not the other's
        return LiveSide(name, AbsentScorer(problem), timeout_seconds=seconds)


def _last_words(side: SideAsked, children: Children) -> tuple[str, ...]:
    child = children.find(side)
    if child is None or not child.has_ended or children.failed_to_start(side):
        return ()
    return (show_text(f"the sidecar of {side.target} has ended; it said:\n{child.last_words() or 'nothing'}"),)


def write_files(wanted: Wanted, judged: Judged) -> None:
    """What was asked to be kept, and a word about each on standard error."""
    report, book = judged.report, judged.book
    if wanted.csv_file is not None:
        _write(wanted.csv_file, comparison_to_csv(report, book))
    if wanted.html_file is not None:
        _write(wanted.html_file, comparison_to_html(report, book))
    runs = (("left", wanted.save_left, judged.left_run), ("right", wanted.save_right, judged.right_run))
    for name, file, run in runs:
        if file is not None and run is None:
            click.echo(f"the {name} side gave no answer; {file} was not written", err=True)
        elif file is not None and run is not None:
            _write(file, run_to_text(run) + "\n")


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    click.echo(f"wrote {file}", err=True)
