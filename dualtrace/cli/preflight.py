"""`dualtrace preflight`: are the model's numbers sane, in every view?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dualtrace.cli.exits import FAILED
from dualtrace.cli.inputs import Ask, ask_options
from dualtrace.cli.sights import VIEWS, parse_view
from dualtrace.cli.visible import show_line

if TYPE_CHECKING:
    from dualtrace.cli.output import Tell
    from dualtrace.questions.answers import PreflightResult
    from dualtrace.scorer import Scorer
    from dualtrace.views import View

Checked = list[tuple["View", "PreflightResult"]]


@click.command()
@ask_options
@click.option(
    "--view",
    "views",
    multiple=True,
    metavar="VIEW",
    help=f"Whose weights: {VIEWS}. Default: the base and every adapter fully on.",
)
def preflight(ask: Ask, views: tuple[str, ...]) -> None:  # fmt: skip
    """Run one forward per view on a fixed text and check its numbers; ends with 1 when a view fails."""
    from rich.table import Column
    from rich.text import Text

    from dualtrace.cli.asking import with_scorer
    from dualtrace.cli.output import show, write_json
    from dualtrace.cli.tables import plain_table

    asked = tuple(parse_view(view) for view in views)

    async def check(scorer: Scorer, deadline: float | None, _tell: Tell) -> Checked:
        return await _check(scorer, asked, deadline)

    found = with_scorer(ask, check)
    if ask.as_json:
        write_json({"kind": "dualtrace.preflight", "target": ask.target, "views": _to_json(found)})
    else:
        table = plain_table([Column("view"), Column("numbers"), Column("why", overflow="fold")])
        for view, result in found:
            why = "" if result.problem is None else show_line(str(result.problem), 400)
            table.add_row(Text(show_line(str(view))), Text("sane" if result.ok else "bad"), Text(why))
        show([table])
    if not all(result.ok for _, result in found):
        click.get_current_context().exit(FAILED)


async def _check(scorer: Scorer, views: tuple[View, ...], deadline: float | None) -> Checked:
    from dualtrace.questions.asked import PreflightQuestion
    from dualtrace.scorer import ask_one
    from dualtrace.server import served_views

    asked = views or served_views(await scorer.describe())
    answer = await ask_one(scorer, PreflightQuestion(asked), deadline=deadline)
    return list(zip(asked, answer.results, strict=True))


def _to_json(found: Checked) -> list[dict[str, object]]:
    from dualtrace.records import to_json
    from dualtrace.runs.run import store_problem

    return [
        {
            "view": to_json(view),
            "ok": result.ok,
            "problem": None if result.problem is None else to_json(store_problem(result.problem)),
        }
        for view, result in found
    ]
