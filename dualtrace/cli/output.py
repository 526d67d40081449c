"""Where a command's words go: data to standard output, talk and progress to standard error.

It knows terminals and pipes. It must not know what is said.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dualtrace.cli.visible import show_text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

Tell = Callable[[str], None]

_waiting: Live | None = None  # the line of `waiting` that stands on the terminal now


def put(text: str) -> None:
    """Write to standard output, all of it or BrokenPipeError.

    In bytes and in a loop: with PYTHONUNBUFFERED a text stream takes a half-written pipe for a success. What the
    stream's encoding cannot hold is written as an escape.
    """
    left = memoryview(text.encode(sys.stdout.encoding or "utf-8", "backslashreplace"))
    with _line_put_aside():
        sys.stdout.flush()
        while left:
            left = left[sys.stdout.buffer.write(left) :]
        sys.stdout.buffer.flush()


@contextmanager
def _line_put_aside() -> Iterator[None]:
    """Data and the waiting line may share a terminal: the line stands below, and never in the middle."""
    line = _waiting if sys.stdout.isatty() else None
    if line is not None:
        line.stop()
    yield
    if line is not None:
        line.start()


def colour(text: str, name: str) -> str:
    """The text in a colour of the terminal, where standard output is one that wants it."""
    import click

    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain or not name else click.style(text, fg=name)


def write_json(document: Any) -> None:
    put(json.dumps(document, allow_nan=False, ensure_ascii=True) + "\n")


def show(renderables: Iterable[RenderableType]) -> None:
    """Print tables: as wide as the terminal, but never so narrow that a number would be cut."""
    from rich.console import Console
    from rich.measure import Measurement

    console, boundless = output_console(), Console(width=10_000)
    own_width = console.width
    with console.capture() as captured:
        for renderable in renderables:
            console.width = max(own_width, Measurement.get(boundless, boundless.options, renderable).minimum)
            console.print(renderable)
    put("\n".join(line.rstrip(" ") for line in captured.get().split("\n")))


def output_console() -> Console:
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)


@contextmanager
def waiting(text: str) -> Iterator[Tell]:
    """A line on standard error that says what is being waited for; silent where that is not a terminal."""
    if not sys.stderr.isatty():
        yield say_nothing
        return
    global _waiting
    from rich.console import Console
    from rich.live import Live
    from rich.spinner import Spinner
    from rich.text import Text

    spinner = Spinner("dots", Text(show_text(text)))
    # Standard output is left alone: rich would send it to standard error, where data does not belong.
    with Live(spinner, console=Console(stderr=True), transient=True, redirect_stdout=False) as line:
        _waiting = line
        try:
            yield lambda text: spinner.update(text=Text(show_text(text)))
        finally:
            _waiting = None


def say_nothing(_text: str) -> None:
    """Where nobody looks."""
