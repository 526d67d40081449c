"""What the demo asks a coordinator, and what is to be said of the answers.

It knows the texts and the client. It must not know processes or options.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from dualtrace.cases.files import read_case_text, write_case
from dualtrace.cli.case_results import Ended, tell_line
from dualtrace.cli.case_running import run_kept
from dualtrace.cli.output import say_nothing
from dualtrace.cli.pair_book import PairBook
from dualtrace.cli.visible import show_piece
from dualtrace.compare.report import CompareReport, Verdict, write_report
from dualtrace.coordinator_client import CompareOutcome, CoordinatorClient
from dualtrace.library import Case, ComparePlan, SideSpec
from dualtrace.masks.spec import Causal, DocIsolation, MaskSpec
from dualtrace.problems import Internal, Reason, Unavailable
from dualtrace.questions.asked import Input, RollingQuestion, Variant
from dualtrace.runs.run import restore_problem

DOCUMENTS = ("The capital of France is Paris.", " The capital of Germany is Berlin, and the capital of Italy is Rome.")
TEXT = "".join(DOCUMENTS)
CASE_NAME = "capitals"
TOP_K = 2


@dataclass(frozen=True)
class Act:
    """One comparison of the demo."""

    title: str
    report: CompareReport
    book: PairBook


@dataclass(frozen=True)
class Seen:
    engines: Act
    masks: Act
    case_text: str
    case_line: str
    case_report: CompareReport
    second_document: int  # index of its first token

    @property
    def acts(self) -> tuple[Act, Act]:
        return self.engines, self.masks

    @property
    def engines_agree(self) -> bool:
        return self.engines.report.verdict is Verdict.PASS and self.case_report.verdict is Verdict.PASS


async def perform(client: CoordinatorClient, left: str, right: str) -> Seen:
    question = RollingQuestion((Input(text=TEXT),), top_k=TOP_K)
    plan = ComparePlan(question, SideSpec(left), SideSpec(right))
    engines = await _compare(client, plan, f"1. {left} and {right} on one text (dualtrace compare)")
    cut = _second_document(engines)
    causal = SideSpec(left, Variant(mask=MaskSpec(Causal())))
    isolated = SideSpec(left, Variant(mask=MaskSpec(DocIsolation(boundaries=(cut,)))))
    title = f"2. {left}: causal, and each document by itself (dualtrace compare --left-mask --right-mask)"
    masks = await _compare(client, replace(plan, left=causal, right=isolated), title)
    text = write_case(Case(CASE_NAME, question, SideSpec(left), SideSpec(right), tags=("demo",)))
    report, line = await _run_case(client, text)
    return Seen(engines, masks, text, line, report, cut)


async def _compare(client: CoordinatorClient, plan: ComparePlan, title: str) -> Act:
    book = PairBook()
    async with aclosing(client.compare(plan)) as events:
        async for event in events:
            if isinstance(event, CompareOutcome):
                book.fill(event.report)
                _require_both(event.report)
                return Act(title, event.report, book)
            book.push(event)
    raise Internal(Reason.INCOMPLETE_STREAM, "the comparison ended without its report")


def _require_both(report: CompareReport) -> None:
    for side in (report.left, report.right):
        if side.problem is not None:
            raise restore_problem(side.problem)


def _second_document(act: Act) -> int:
    """The index of the first token that starts in the second document, counted in bytes of the pieces."""
    end = len(DOCUMENTS[0].encode())
    passed = 0
    pairs = act.book.item(0)
    for index, piece in zip(pairs.indices, pairs.pieces, strict=True):
        if passed >= end:
            return index
        passed += len(piece or b"")
    raise Unavailable(Reason.NO_TOKENIZER, "the sides tell no pieces, so that the documents cannot be told apart")


async def _run_case(client: CoordinatorClient, text: str) -> tuple[CompareReport, str]:
    """What was written is what is read, kept and run: by its name, as a job."""
    ((case, _line),) = read_case_text(text, f"{CASE_NAME}.yaml")
    kept = await client.create_case(case)
    report, comparison_id, seconds = await run_kept(kept.name, client, None, say_nothing)
    verdict, rest = tell_line(Ended(kept, "", seconds, report, comparison_id=comparison_id))
    return report, f"{verdict}  {rest}"


def find(seen: Seen) -> Iterator[str]:
    """Plain sentences, out of the numbers themselves."""
    first, second = seen.engines.report, seen.masks.report
    tokens, tolerance = first.tokens, first.tolerance
    if tokens is not None and tolerance is not None and tokens.max_token_abs_diff is not None:
        agree = "agree" if first.verdict is Verdict.PASS else "do NOT agree"
        yield (
            f"{_engine(first, 'left')} and {_engine(first, 'right')} {agree}: over {tokens.aligned_count} tokens the "
            f"largest difference is {tokens.max_token_abs_diff:.1e} nats; {tolerance.name} allows "
            f"{tolerance.abs_epsilon:g} and {tolerance.rel_epsilon:g} of the value."
        )
    yield from _find_isolation(seen, second)
    yield f"The case {CASE_NAME} was saved as a file, kept by the coordinator, and run again: {seen.case_line}."


def _find_isolation(seen: Seen, report: CompareReport) -> Iterator[str]:
    if report.tokens is None or report.tokens.first_divergence_index is None:
        yield "Isolating the documents changed nothing within tolerance."
        return
    where = report.tokens.first_divergence_index
    expected = "where the second document begins" if where == seen.second_document else "not where it should"
    yield f"Isolating the documents parts from causal at token {where}, {expected}: here FAIL is the right verdict."
    pairs = seen.masks.book.item(0)
    changes = [(abs(delta), place) for place in range(len(pairs)) if (delta := pairs.delta(place)) is not None]
    if changes:
        change, place = max(changes)
        piece = show_piece(pairs.pieces[place])
        yield f'Without the first document "{piece}" (token {pairs.indices[place]}) changes most, by {change:.2f} nats.'


def _engine(report: CompareReport, side: str) -> str:
    known = getattr(report, side).provenance
    return "?" if known is None else f"{known.framework} in {known.dtype}"


def seen_to_json(seen: Seen) -> dict[str, Any]:
    return {
        "comparisons": [write_report(act.report) for act in seen.acts],
        "case": seen.case_text,
        "case_report": write_report(seen.case_report),
        "findings": list(find(seen)),
    }
