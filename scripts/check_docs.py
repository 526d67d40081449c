"""Holds the command line to its promise: every command and option says what it does, and docs/cli.md names them all.

It knows click and the text of one page. It must not know what any command does.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"


def walk_commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """Every command below and including this one, with the words a person types."""
    yield path, command
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            yield from walk_commands(command.commands[name], f"{path} {name}")


def find_gaps(root: click.Command, name: str, page: str) -> list[str]:
    """One line for each thing that has no help or is not on the page."""
    gaps = []
    for path, command in walk_commands(root, name):
        if not (command.help or "").strip():
            gaps.append(f"`{path}` has no help text")
        if not re.search(rf"{re.escape(path)}(?![\w-])", page):
            gaps.append(f"`{path}` does not appear in docs/cli.md")
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not (parameter.help or "").strip():
                gaps.append(f"`{path} {parameter.opts[-1]}` has no help text")
    return gaps


def main() -> int:
    from dualtrace.cli import main as cli  # here, so that a broken CLI fails this check with its own words

    if not PAGE.exists():
        print("docs/cli.md does not exist; write it")
        return 1
    gaps = find_gaps(cli, "dualtrace", PAGE.read_text(encoding="utf-8"))
    print(*gaps, sep="\n", end="\n" if gaps else "")
    if not gaps:
        print(f"{sum(1 for _ in walk_commands(cli, 'dualtrace'))} commands, each with help and documented")
    return 1 if gaps else 0


if __name__ == "__main__":
    sys.exit(main())
