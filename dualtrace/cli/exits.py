"""The one place where failures become a message on standard error and an exit code.

0    all went well                            2    wrong usage or an invalid argument
1    a verdict failed, or some items did      3    the backend is unavailable, or gave out half-way
130  interrupted                              141  whoever read our output left
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import click

from dualtrace.cli.visible import show_text
from dualtrace.problems import (
    BadNumbers,
    Cancelled,
    DeadlineExceeded,
    Exhausted,
    Internal,
    Problem,
    Reason,
    Unavailable,
)

FAILED, USAGE, UNAVAILABLE, INTERRUPTED, PIPE_CLOSED = 1, 2, 3, 130, 141
DEBUG = "dualtrace.debug"  # in the context's meta, which all commands of one call share

_OF_KIND: dict[type[Problem], int] = {
    BadNumbers: FAILED,
    Internal: FAILED,
    Unavailable: UNAVAILABLE,
    DeadlineExceeded: UNAVAILABLE,
    Exhausted: UNAVAILABLE,
    Cancelled: UNAVAILABLE,
}
_OF_REASON = {
    Reason.INCOMPLETE_STREAM: UNAVAILABLE,
    Reason.NOT_READY: UNAVAILABLE,
    Reason.STORAGE_BUSY: USAGE,  # a second coordinator on one data folder: a mistake of whoever started it
}


def exit_code(problem: Problem) -> int:
    """What a problem of a whole call ends with; the caller's own mistakes are usage."""
    return _OF_REASON.get(problem.reason, _OF_KIND.get(type(problem), USAGE))


def tell_problem(problem: Problem) -> str:
    detail = problem.detail
    lines = [f"error: {detail.message}"]
    if detail.field:
        lines.append(f"  field: {detail.field}")
    if detail.allowed and detail.allowed not in detail.message:
        lines.append(f"  allowed: {detail.allowed}")
    lines.append(f"  reason: {detail.reason} ({problem.code_name})")
    return show_text("\n".join(lines))


@contextmanager
def guard(context: click.Context) -> Iterator[None]:
    """Run a command so that every failure ends in a message and a code, never in a traceback unless asked."""
    try:
        yield
        sys.stdout.flush()
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except KeyboardInterrupt:
        _say(context, "interrupted")
        context.exit(INTERRUPTED)
    except BrokenPipeError:
        _abandon_output()
        context.exit(PIPE_CLOSED)
    except Problem as problem:
        _say(context, tell_problem(problem))
        context.exit(exit_code(problem))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _say(context, f"error: {show_text(f'{where}{error.strerror or error}')}")
        context.exit(USAGE)
    except Exception as error:  # noqa: BLE001 - a bug of ours: told in one line, shown whole with --debug
        _say(context, f"error: a bug in dualtrace: {type(error).__name__}: {show_text(str(error))}")
        if not context.meta.get(DEBUG):
            click.echo("  run it again with --debug for the traceback, and report that", err=True)
        context.exit(FAILED)


def _say(context: click.Context, message: str) -> None:
    if context.meta.get(DEBUG):
        click.echo(traceback.format_exc(), err=True, nl=False)
    click.echo(message, err=True)


def _abandon_output() -> None:
    """Nobody reads: what is still buffered must not fail again when the interpreter ends."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
