"""`dualtrace compare`: do two sides agree, and if not, where do they part?"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dualtrace.cli.compare_question import QuestionAsked, question_options
from dualtrace.cli.compare_sides import CONNECTING_NAMES, SIDE_NAMES, SidesAsked, side_options
from dualtrace.cli.help_sections import SectionedCommand
from dualtrace.problems import InvalidArgument, Reason

if TYPE_CHECKING:
    from dualtrace.cli.comparing import Judged, Wanted
    from dualtrace.compare.gates import GatePolicy
    from dualtrace.compare.tolerance import Tolerance

Function = Callable[..., Any]

ARGUMENTS = "dualtrace.arguments"  # in the context's meta: the command's own, as they were written
KEPT_TOKENS = 4096
OUT_FILE = click.Path(dir_okay=False, writable=True, path_type=Path)


class Repeatable(SectionedCommand):
    """Remembers how it was called, so that a verdict can end with the command that reproduces it."""

    def sections(self) -> Sequence[tuple[str, Collection[str]]]:
        return sections_of_comparison()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = tuple(args)
        return super().parse_args(ctx, args)


def reproduction(context: click.Context) -> str:
    return shlex.join(["dualtrace", *context.command_path.split()[1:], *context.meta[ARGUMENTS]])


_JUDGING: tuple[tuple[str, Callable[[Function], Function]], ...] = (
    ("tolerance", click.option("--tolerance", metavar="PROFILE", help="A tolerance profile by its name, as "
                               "docs/tolerances.md has them. Default: that of the sides' precisions.")),
    ("abs_epsilon", click.option("--abs-epsilon", type=float, metavar="NATS",
                                 help="Instead of a profile: |l - r| <= this + ...")),
    ("rel_epsilon", click.option("--rel-epsilon", type=float, metavar="SHARE", help="... + this x max(|l|, |r|).")),
    ("max_mismatches", click.option("--max-mismatches", type=click.IntRange(min=0), default=0, show_default=True,
                                    help="Tokens that may be out of tolerance.")),
    ("score_max", click.option("--score-max", type=click.FloatRange(min=0), metavar="X",
                               help="Largest score difference.  [default: 0.02]")),
    ("score_mean", click.option("--score-mean", type=click.FloatRange(min=0), metavar="X",
                                help="Mean score difference.  [default: 0.01]")),
    ("max_failures", click.option("--max-failures", type=click.FloatRange(0, 1), metavar="SHARE",
                                  help="Items that may fail.  [default: 0]")),
)  # fmt: skip
_RESULTS: tuple[tuple[str, Callable[[Function], Function]], ...] = (
    ("keep_tokens", click.option("--keep-tokens", type=click.IntRange(min=0), default=KEPT_TOKENS, show_default=True,
                                 help="Tokens of a side that the JSON report holds; tables, --csv and --html have "
                                 "all.")),
    ("all_tokens", click.option("--all-tokens", is_flag=True,
                                help="Show every token, not only where the sides part.")),
    ("csv_file", click.option("--csv", "csv_file", type=OUT_FILE, metavar="FILE",
                              help="Also write every pair as CSV.")),
    ("html_file", click.option("--html", "html_file", type=OUT_FILE, metavar="FILE",
                               help="Also write one self-contained page, for a bug report.")),
    ("save_left", click.option("--save-left", type=OUT_FILE, metavar="FILE", help="Keep the left answer as a run.")),
    ("save_right", click.option("--save-right", type=OUT_FILE, metavar="FILE", help="Keep the right answer as a run.")),
)  # fmt: skip


def sections_of_comparison() -> Sequence[tuple[str, Collection[str]]]:
    return (
        ("The question", QuestionAsked.__dataclass_fields__),
        ("Its sides", SIDE_NAMES),
        ("The judgement", [name for name, _ in _JUDGING]),
        ("What to show and keep", [name for name, _ in _RESULTS]),
        ("Who is reached how", CONNECTING_NAMES),
    )


def judging_options(*, results: bool = True) -> Callable[[Function], Function]:
    """Tolerance and gates and, with `results`, where the result goes; the function gets one `wanted`."""
    chosen = (*_JUDGING, *(_RESULTS if results else ()))

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def command(*args: Any, **given: Any) -> Any:
            own = {name: given.pop(name) for name, _ in chosen}
            return function(*args, wanted=_read_wanted(own), **given)

        wrapped: Function = command
        for _, option in reversed(chosen):
            wrapped = option(wrapped)
        return wrapped

    return decorate


def _read_wanted(given: dict[str, Any]) -> Wanted:
    from dualtrace.cli.comparing import Wanted

    results = {name: given[name] for name, _ in _RESULTS if name in given}
    return Wanted(**{"tolerance": _read_tolerance(given), "policy": _read_policy(given), **results})


def _read_tolerance(given: dict[str, Any]) -> Tolerance | None:
    from dualtrace.compare.tolerance import PROFILES, request_tolerance

    name, numbers = given["tolerance"], (given["abs_epsilon"], given["rel_epsilon"])
    if name is None:
        return None if numbers == (None, None) else request_tolerance(numbers[0] or 0.0, numbers[1] or 0.0)
    if numbers != (None, None):
        message = "--tolerance names a profile, which has its own numbers; give it or --abs-epsilon and --rel-epsilon"
        raise InvalidArgument(Reason.CONFLICT, message, field="--tolerance")
    known = {profile.tolerance.name: profile.tolerance for profile in PROFILES}
    if name not in known:
        allowed = ", ".join(known)
        message = f"tolerance {name!r:.80} asked; there are {allowed}"
        raise InvalidArgument(Reason.NOT_FOUND, message, field="--tolerance", allowed=allowed)
    return known[name]


def _read_policy(given: dict[str, Any]) -> GatePolicy:
    from dataclasses import replace

    from dualtrace.compare.gates import DEFAULT_GATES

    named = {"score_max_abs_diff": given["score_max"], "score_mean_abs_diff": given["score_mean"],
             "max_failure_rate": given["max_failures"], "max_token_mismatches": given["max_mismatches"]}  # fmt: skip
    return replace(DEFAULT_GATES, **{name: value for name, value in named.items() if value is not None})


@click.command(cls=Repeatable, epilog="""\b
Examples:
  dualtrace compare torch:DIR jax:DIR --text 'The same text.'
  dualtrace compare torch:DIR --text-file trace.txt --right-mask doc.json
  dualtrace compare backend:torch run:ID --html report.html
""")  # fmt: skip
@side_options(live=True)
@question_options
@judging_options()
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
        show(render_comparison(judged.report, judged.book, width, all_tokens=wanted.all_tokens,
                               is_opened=judged.is_opened))  # fmt: skip
        put(reproduction_text(judged.report))
    if judged.comparison_id:
        click.echo(f"kept as {judged.comparison_id}", err=True)
    write_files(wanted, judged)  # after the showing: a full disk must not take the result with it
    for words in judged.last_words:
        click.echo(words, err=True)
    if code := verdict_code(judged.report):
        context.exit(code)
