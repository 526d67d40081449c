"""`dualtrace compare`: do two sides agree, and if not, where do they part?"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dualtrace.cli.compare_question import QuestionAsked, question_options
from dualtrace.cli.compare_sides import SidesAsked, side_options
from dualtrace.problems import InvalidArgument, Reason

if TYPE_CHECKING:
    from dualtrace.cli.comparing import Judged, Wanted
    from dualtrace.compare.gates import GatePolicy
    from dualtrace.compare.tolerance import Tolerance

Function = Callable[..., Any]

ARGUMENTS = "dualtrace.arguments"  # in the context's meta: the command's own, as they were written
KEPT_TOKENS = 4096
OUT_FILE = click.Path(dir_okay=False, writable=True, path_type=Path)


class Repeatable(click.Command):
    """Remembers how it was called, so that a verdict can end with the command that reproduces it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = tuple(args)
        return super().parse_args(ctx, args)


def reproduction(context: click.Context) -> str:
    return shlex.join(["dualtrace", *context.command_path.split()[1:], *context.meta[ARGUMENTS]])


def judging_options(function: Function) -> Function:
    """Tolerance, gates and where the result goes; the function gets one `wanted`."""

    @functools.wraps(function)
    def command(*args: Any, **given: Any) -> Any:
        return function(*args, wanted=_read_wanted({name: given.pop(name) for name in _NAMES}), **given)

    options: tuple[Callable[[Function], Function], ...] = (
        click.option("--abs-epsilon", type=float, metavar="NATS", help="Tolerance: |l - r| <= this + ..."),
        click.option("--rel-epsilon", type=float, metavar="SHARE",
                     help="... + this x max(|l|, |r|). Default of both: the profile of the sides' precisions."),
        click.option("--max-mismatches", type=click.IntRange(min=0), default=0, show_default=True,
                     help="Tokens that may be out of tolerance."),
        click.option("--score-max", type=click.FloatRange(min=0), metavar="X", help="Largest score difference."),
        click.option("--score-mean", type=click.FloatRange(min=0), metavar="X", help="Mean score difference."),
        click.option("--max-failures", type=click.FloatRange(0, 1), metavar="SHARE", help="Items that may fail."),
        click.option("--keep-tokens", type=click.IntRange(min=0), default=KEPT_TOKENS, show_default=True,
                     help="Tokens of a side that the JSON report holds; tables, --csv and --html have all."),
        click.option("--all-tokens", is_flag=True, help="Show every token, not only where the sides part."),
        click.option("--csv", "csv_file", type=OUT_FILE, metavar="FILE", help="Also write every pair as CSV."),
        click.option("--html", "html_file", type=OUT_FILE, metavar="FILE",
                     help="Also write one self-contained page, for a bug report."),
        click.option("--save-left", type=OUT_FILE, metavar="FILE", help="Keep the left answer as a run."),
        click.option("--save-right", type=OUT_FILE, metavar="FILE", help="Keep the right answer as a run."),
    )  # fmt: skip
    wrapped: Function = command
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped


_NAMES = ("abs_epsilon", "rel_epsilon", "max_mismatches", "score_max", "score_mean", "max_failures", "keep_tokens",
          "all_tokens", "csv_file", "html_file", "save_left", "save_right")  # fmt: skip


def _read_wanted(given: dict[str, Any]) -> Wanted:
    from dualtrace.cli.comparing import Wanted

    return Wanted(
        tolerance=_read_tolerance(given["abs_epsilon"], given["rel_epsilon"]),
        policy=_read_policy(given),
        keep_tokens=given["keep_tokens"],
        all_tokens=given["all_tokens"],
        csv_file=given["csv_file"],
        html_file=given["html_file"],
        save_left=given["save_left"],
        save_right=given["save_right"],
    )


def _read_tolerance(abs_epsilon: float | None, rel_epsilon: float | None) -> Tolerance | None:
    from dualtrace.compare.tolerance import request_tolerance

    if abs_epsilon is None and rel_epsilon is None:
        return None
    return request_tolerance(abs_epsilon or 0.0, rel_epsilon or 0.0)


def _read_policy(given: dict[str, Any]) -> GatePolicy:
    from dataclasses import replace

    from dualtrace.compare.gates import DEFAULT_GATES

    named = {"score_max_abs_diff": given["score_max"], "score_mean_abs_diff": given["score_mean"],
             "max_failure_rate": given["max_failures"], "max_token_mismatches": given["max_mismatches"]}  # fmt: skip
    return replace(DEFAULT_GATES, **{name: value for name, value in named.items() if value is not None})


@click.command(cls=Repeatable)
@side_options(live=True)
@question_options
@judging_options
@click.pass_context
def compare(context: click.Context, sides: SidesAsked, asked: QuestionAsked, wanted: Wanted) -> None:
    """Ask LEFT and RIGHT one question and hold the answers against each other, token by token.

    Without RIGHT both sides are LEFT: under two masks or views, that is, or simply twice. Engines over a checkpoint
    (torch:DIR, jax:DIR, reference:DIR) run as sidecars of their own for as long as it takes.

    \b
    The question is one of
      --text, --text-file, --ids      every token of a text
      --prompt with --completion      a completion after a prompt; or --items
      --next                          the distribution of the next token
      --query with --item, --label    label scores
    or none, when a side is a stored run, which knows its own.

    Ends with 0 when the sides agree, 1 when they do not or cannot be compared, 3 when a side was not available.
    """
    from dualtrace.cli.comparing import compare_by_coordinator, compare_here

    _check_question(sides, asked)
    command = reproduction(context)
    if sides.needs_coordinator:
        judged = compare_by_coordinator(sides, asked, wanted, command)
    else:
        judged = compare_here(sides, asked, wanted, command)
    finish(context, sides.as_json, wanted, judged)


def _check_question(sides: SidesAsked, asked: QuestionAsked) -> None:
    if asked.is_empty and not any(side.target.kind in {"file", "run"} for side in sides.both):
        message = "nothing was asked; give --text, --prompt with --completion, --next or --query with --item"
        raise InvalidArgument(Reason.MISSING, message, field="--text")
    if asked.files_from_stdin + sides.files_from_stdin > 1:
        raise InvalidArgument(Reason.DUPLICATE, "standard input can be read once; name files", field="-")


def finish(context: click.Context, as_json: bool, wanted: Wanted, judged: Judged) -> None:
    """Show it, write the files, and end with the verdict's code."""
    from dualtrace.cli.compare_findings import reproduction_text
    from dualtrace.cli.compare_tables import render_comparison
    from dualtrace.cli.comparing import verdict_code, write_files
    from dualtrace.cli.output import output_console, put, show
    from dualtrace.compare.report import report_to_text

    if as_json:
        put((judged.report_text or report_to_text(judged.report)) + "\n")
    else:
        width = output_console().width
        show(render_comparison(judged.report, judged.book, width, all_tokens=wanted.all_tokens))
        put(reproduction_text(judged.report))
    write_files(wanted, judged)  # after the showing: a full disk must not take the result with it
    for words in judged.last_words:
        click.echo(words, err=True)
    if code := verdict_code(judged.report):
        context.exit(code)
