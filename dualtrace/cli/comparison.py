"""`dualtrace comparison`: what a coordinator keeps of comparisons, and the showing of a report that came from it."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from dualtrace.cli.coordinator_link import Link, link_options, with_coordinator

if TYPE_CHECKING:
    from dualtrace.cli.comparing import Judged
    from dualtrace.compare.report import CompareReport
    from dualtrace.coordinator_client import CoordinatorClient
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
    from dualtrace.cli.output import output_console, show, write_json
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
        show([comparisons_table(found, output_console().width)])
    else:
        click.echo("no comparison is kept", err=True)


@comparison.command("show")
@click.argument("comparison_id")
@link_options()
def show_command(link: Link, comparison_id: str, as_json: bool) -> None:
    """One stored comparison: its tables and its verdict. Ends with 0 however it was judged."""
    from dualtrace.cli.comparing import Judged
    from dualtrace.cli.output import put
    from dualtrace.cli.pair_book import PairBook

    if as_json:
        put(with_coordinator(link, lambda client: client.get_comparison_text(comparison_id)) + "\n")
        return
    report = with_coordinator(link, lambda client: client.get_comparison(comparison_id))
    book = PairBook()
    book.fill(report)
    show_report(Judged(locate(report, link), book, comparison_id=comparison_id))


async def compare_kept(client: CoordinatorClient, link: Link, left: str, right: str, as_json: bool) -> Judged:
    """Compare with the question that the left side's stored run holds."""
    from dualtrace.cli.comparing import ask_coordinator, judged_there
    from dualtrace.cli.output import waiting
    from dualtrace.library import ComparePlan, SideSpec

    plan = ComparePlan(None, SideSpec(left), SideSpec(right), timeout_seconds=link.timeout_seconds)
    with waiting(f"asking the coordinator at {link.address}") as tell:
        outcome, book, opening = await ask_coordinator(client, plan, link.deadline, tell, is_silent=as_json)
    judged = judged_there(outcome, book, opening)
    return replace(judged, report=locate(judged.report, link))


def locate(report: CompareReport, link: Link) -> CompareReport:
    """The coordinator wrote the command that reproduces it, and does not know by which address it was reached."""
    if not report.reproduce:
        return report
    return replace(report, reproduce=f"{report.reproduce} {shlex.join(link.flags)}")


def present_report(judged: Judged, as_json: bool) -> None:
    """The report as tables or data, and the exit code that its verdict asks for."""
    from dualtrace.cli.comparing import verdict_code
    from dualtrace.cli.output import put

    if as_json:
        put(judged.report_text + "\n")
    else:
        show_report(judged)
    click.get_current_context().exit(verdict_code(judged.report))


def show_report(judged: Judged) -> None:
    from dualtrace.cli.compare_findings import reproduction_text
    from dualtrace.cli.compare_tables import render_comparison
    from dualtrace.cli.output import output_console, put, show

    width = output_console().width
    shown = render_comparison(judged.report, judged.book, width, all_tokens=False, is_opened=judged.is_opened)
    show(shown)
    put(reproduction_text(judged.report))
    if judged.comparison_id:
        click.echo(f"kept as {judged.comparison_id}", err=True)
