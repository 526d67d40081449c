"""`dualtrace diff`: two stored answers held against each other, without any model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dualtrace.cli.compare import Repeatable, finish, judging_options, reproduction
from dualtrace.cli.compare_question import QuestionAsked
from dualtrace.cli.compare_sides import SidesAsked, side_options
from dualtrace.problems import InvalidArgument, Reason

if TYPE_CHECKING:
    from dualtrace.cli.comparing import Wanted

STORED = {"file", "run"}


@click.command(cls=Repeatable)
@side_options(live=False)
@judging_options()
@click.pass_context
def diff(context: click.Context, sides: SidesAsked, wanted: Wanted) -> None:
    """Compare two stored answers: LEFT and RIGHT are run files (FILE.json) or run:ID.

    Nothing is computed again and no model is needed. Output and exit codes are those of `dualtrace compare`.
    """
    from dualtrace.cli.comparing import compare_here

    for side in sides.both:
        if side.target.kind not in STORED:
            message = f"{side.target} is no stored answer; `dualtrace compare` asks live ones"
            raise InvalidArgument(Reason.CONFLICT, message, field="target", allowed="FILE.json, run:ID")
    finish(context, sides.as_json, wanted, compare_here(sides, QuestionAsked(), wanted, reproduction(context)))
