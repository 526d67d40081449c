"""`dualtrace demo`: two engines and a coordinator as real processes over a real model, compared, judged, and ended."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dualtrace.cli.inputs import FOLDER, command_options
from dualtrace.problems import InvalidArgument, Reason

if TYPE_CHECKING:
    from dualtrace.cli.demo_program import Seen
    from dualtrace.cli.output import Tell

WANTED = ("torch", "jax")
STAND_IN = "reference"


@dataclass(frozen=True)
class House:
    """What runs: a coordinator, and the names of its two backends."""

    address: str  # of the coordinator
    left: str
    right: str


@click.command()
@click.option("--model", type=FOLDER, help="Checkpoint folder; default: SmolLM2-135M, fetched once into the cache.")
@click.option(
    "--engines",
    metavar="LEFT,RIGHT",
    help="Default: torch,jax; where one is not installed, reference stands in for it, and it is said.",
)
@click.option(
    "--save",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.yaml",
    help="Keep the case that the demo saves; without it, it goes with the demo's own folder.",
)
@command_options
def demo(model: Path | None, engines: str | None, save: Path | None, as_json: bool) -> None:
    """Compare PyTorch with JAX on a real text, then a causal mask with isolated documents; save a case, run it again.

    Sidecars and a coordinator are processes of their own, and all end with the demo. Ends with 1 when the engines do
    not agree.
    """
    from dualtrace.cli.exits import FAILED
    from dualtrace.cli.output import waiting, write_json

    names, notes = choose_engines(engines)
    for note in notes:
        click.echo(note, err=True)
    folder = model or _fetch()
    with waiting("starting") as tell, _house(folder, names, tell) as house:
        tell("comparing")
        seen = _perform(house)
    if save is not None:
        save.write_text(seen.case_text, encoding="utf-8")
    click.echo("all processes have been stopped", err=True)
    if as_json:
        from dualtrace.cli.demo_program import seen_to_json

        write_json({"kind": "dualtrace.demo", "engines": list(names), "notes": list(notes), **seen_to_json(seen)})
    else:
        _show(seen, notes)
    if not seen.engines_agree:
        click.get_current_context().exit(FAILED)


def choose_engines(asked: str | None) -> tuple[tuple[str, str], tuple[str, ...]]:
    """Left and right, and what must be said of the choice. Never another engine than asked for by name."""
    if asked is not None:
        names = tuple(name.strip() for name in asked.split(","))
        if len(names) != 2:
            message = f"--engines {asked!r:.60} names {len(names)}; name two, like torch,jax"
            raise InvalidArgument(Reason.MALFORMED, message, field="--engines")
        return (names[0], names[1]), ()
    from dualtrace.engine_registry import has_framework

    missing = [name for name in WANTED if not has_framework(name)]
    left, right = (STAND_IN if name in missing else name for name in WANTED)
    notes = tuple(
        f"{name} is not installed, so the float64 {STAND_IN} engine stands in for it: pip install 'dualtrace[{name}]'"
        for name in missing
    )
    return (left, right), notes


def _fetch() -> Path:
    from dualtrace.cli.model import progress_on_stderr
    from dualtrace.models.fetch import fetch_smollm2

    with progress_on_stderr() as progress:
        return fetch_smollm2(None, progress)


@contextmanager
def _house(model: Path, names: Sequence[str], tell: Tell) -> Iterator[House]:
    """Both sidecars, then a coordinator over them; it ends first, so that it never sees them go."""
    from dualtrace.cli.child_sidecar import ChildSpec, child_sidecars

    with ExitStack() as stack:
        data = stack.enter_context(tempfile.TemporaryDirectory(prefix="dualtrace-demo-"))
        for name in names:
            click.echo(f"starting {name} over {model}: a process of its own", err=True)
        children = stack.enter_context(child_sidecars([ChildSpec(name, model) for name in names]))
        right = names[1] if names[0] != names[1] else f"{names[1]}-again"
        backends = {}
        for name, child in zip((names[0], right), children, strict=True):
            tell(f"waiting for {name}")
            backends[name] = child.await_ready()
        tell("starting the coordinator")
        yield House(_start_coordinator(stack, backends, data), *backends)


def _start_coordinator(stack: ExitStack, backends: dict[str, str], data: str) -> str:
    from dualtrace.cli.child_process import ChildProcess
    from dualtrace.cli.up import READY

    command = [sys.executable, "-m", "coordinator", "--host", "127.0.0.1", "--port", "0", "--http-port", "0"]
    command += ["--drain-seconds", "2", "--stop-with-stdin", "--data", data]
    for name, address in backends.items():
        command += ["--backend", f"{name}={address}"]
    child = ChildProcess("coordinator", command, READY)
    stack.callback(child.end)
    address = child.match_ready()[1]
    click.echo(f"a coordinator at {address} knows them as {' and '.join(backends)}", err=True)
    return address


def _perform(house: House) -> Seen:
    """A demo shows whole answers only: any failure ends it."""
    import asyncio

    from dualtrace.cli.demo_program import perform
    from dualtrace.client import Connection
    from dualtrace.coordinator_client import CoordinatorClient

    async def work() -> Seen:
        async with CoordinatorClient(Connection(house.address)) as client:
            return await perform(client, f"backend:{house.left}", f"backend:{house.right}")

    return asyncio.run(work())


def _show(seen: Seen, notes: Sequence[str]) -> None:
    from rich.text import Text

    from dualtrace.cli.compare_tables import render_comparison
    from dualtrace.cli.demo_program import find
    from dualtrace.cli.output import output_console, put, show
    from dualtrace.cli.visible import show_text

    width = output_console().width
    for act in seen.acts:
        show([Text(f"\n{act.title}\n", "bold")])
        show(render_comparison(act.report, act.book, width, all_tokens=False))
    show([Text("\n3. A saved case, run again (dualtrace case run)\n", "bold")])
    put(f"{seen.case_text}\n{show_text(seen.case_line)}\n")
    show([Text("\nWhat was seen", "bold"), *(Text(line) for line in (*find(seen), *notes))])
