"""`dualtrace comparison`: what a coordinator keeps of comparisons, and the showing of a report that came from it."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

import click

from dualtrace.cli.coordinator_link import Link, link_options, with_coordinator
from dualtrace.problems import Internal, Reason

if TYPE_CHECKING:
    from dualtrace.cli.pair_book import PairBook
    from dualtrace.compare.report import CompareReport
    from dualtrace.coordinator_client import CompareOutcome, CoordinatorClient
    from dualtrace.library import ComparisonSummary

LISTED = 50


@click.group()
def comparison() -> None:
    """Stored comparisons: two runs and a report each."""


@comparison.command("list")
@click.option("--case", "case_name", default="", help="Only those of this case.")
@click.option("--verdict", type=click.Choice(["pass", "fail", "incomparable", "error"]), help="Only with this verdict.")
@click.option("--limit", type=click.IntRange(min=1), default=LISTED, show_default=True, help="At most so many.")
@link_options()
def list_command(link: Link, case_name: str, verdict: str | None, limit: int, as_json: bool) -> None:
    """Stored comparisons, the newest first."""
    from dualtrace.cli.output import show, write_json
    from dualtrace.cli.run_tables import comparisons_table
    from dualtrace.compare.report import Verdict
    from dualtrace.records import to_json

    wanted = None if verdict is None else Verdict(verdict.upper())

    async def work(client: CoordinatorClient) -> list[ComparisonSummary]:
        found: list[ComparisonSummary] = []
        token = ""
        while len(found) < limit:
            size = min(limit - len(found), 1000)
            page = await client.list_comparisons(size, token, case=case_name, verdict=wanted)
            found += page.entries
            token = page.next_page_token
            if not token:
                break
        return found

    found = with_coordinator(link, work)
    if as_json:
        write_json({"kind": "dualtrace.comparisons", "comparisons": to_json(tuple(found))})
    elif found:
        show([comparisons_table(found)])
    else:
        click.echo("no comparison is kept", err=True)


@comparison.command("show")
@click.argument("comparison_id")
@link_options()
def show_command(link: Link, comparison_id: str, as_json: bool) -> None:
    """One stored comparison: its tables and its verdict. Ends with 0 however it was judged."""
    from dualtrace.cli.output import put

    if as_json:
        put(with_coordinator(link, lambda client: client.get_comparison_text(comparison_id)) + "\n")
        return
    report = with_coordinator(link, lambda client: client.get_comparison(comparison_id))
    show_report(report, None, comparison_id)


async def compare_kept(client: CoordinatorClient, left: str, right: str) -> tuple[CompareOutcome, PairBook]:
    """Compare with the question that the left side's stored run holds."""
    from dualtrace.cli.pair_book import PairBook
    from dualtrace.coordinator_client import CompareOutcome
    from dualtrace.library import ComparePlan, SideSpec

    book = PairBook()
    async with aclosing(client.compare(ComparePlan(None, SideSpec(left), SideSpec(right)))) as events:
        async for event in events:
            if isinstance(event, CompareOutcome):
                return event, book
            book.push(event)
    raise Internal(Reason.INCOMPLETE_STREAM, "the coordinator ended the comparison without a report")


def present_report(report: CompareReport, book: PairBook | None, as_json: bool, comparison_id: str = "") -> None:
    """The report as data, and the exit code that its verdict asks for."""
    from dualtrace.cli.comparing import verdict_code
    from dualtrace.cli.output import put
    from dualtrace.compare.report import report_to_text

    if as_json:
        put(report_to_text(report) + "\n")
    else:
        show_report(report, book, comparison_id)
    click.get_current_context().exit(verdict_code(report))


def show_report(report: CompareReport, book: PairBook | None, comparison_id: str) -> None:
    from dualtrace.cli.compare_tables import render_comparison
    from dualtrace.cli.output import output_console, show
    from dualtrace.cli.pair_book import PairBook

    book = book or PairBook()
    book.fill(report)
    show(render_comparison(report, book, output_console().width, all_tokens=False))
    if comparison_id:
        click.echo(f"kept as {comparison_id}", err=True)
