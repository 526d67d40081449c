"""`dualtrace up`: sidecars over one model and a coordinator over them, as processes of their own, until Ctrl-C.

It knows which processes there are and in what order they start and end. It must not know what they answer.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dualtrace.cli.inputs import FOLDER, command_options, parse_adapters
from dualtrace.problems import InvalidArgument, Reason, Unavailable

if TYPE_CHECKING:
    from dualtrace.cli.child_process import ChildProcess
    from dualtrace.cli.child_sidecar import ChildSpec
    from dualtrace.cli.output import Tell

READY = re.compile(r"listening on grpc (\S+)(?: http (\S+))?")
LOOK_SECONDS = 0.2
TEXT = "The capital of France is Paris."


@dataclass(frozen=True)
class Ready:
    """Where everything listens."""

    backends: dict[str, str]  # name -> HOST:PORT
    grpc: str
    http: str


@click.command()
@click.option("--model", type=FOLDER, help="Checkpoint folder; every engine but fake needs one.")
@click.option("--engines", metavar="NAME,NAME", help="Default: torch and jax, those of them that are installed.")
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=DIR", help="PEFT adapter to load; repeat it.")
@click.option("--dtype", default="", help="Number type of the weights; default: the engines' own.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 1024), help="Threads of each engine.")
@click.option("--port", default=50050, show_default=True, type=click.IntRange(0, 65535), help="The coordinator's gRPC.")
@click.option("--http-port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="Its HTTP; 0: any.")
@click.option(
    "--data", type=click.Path(file_okay=False, path_type=Path), help="Folder of what is kept; default: the user's own."
)
@command_options
def up(engines: str | None, port: int, http_port: int, data: Path | None, as_json: bool, **given: Any) -> None:
    """Start sidecars over a model and a coordinator over them; Ctrl-C stops them all.

    Each is a process of its own on this machine, reachable from it alone. Prints where they listen and a first
    command to try. When one of them dies the others are ended too, and the exit code is 3.
    """
    from dualtrace.cli.output import waiting

    specs = _specs(_choose(engines), **given)
    with stopping(), ExitStack() as stack:
        with waiting("starting") as tell:
            sidecars = _start_sidecars(stack, specs)
            backends = {child.spec.engine: _await(child, child.await_ready, tell) for child in sidecars}
            coordinator = _start_coordinator(stack, backends, port, http_port, data)
            grpc, http = _await(coordinator, lambda: coordinator.match_ready().groups(default=""), tell)
        _say_ready(Ready(backends, grpc, http), as_json)
        with suppress(KeyboardInterrupt):  # from here on being stopped is no failure
            _watch([*sidecars, coordinator])
        click.echo("stopping", err=True)
    click.echo("all stopped", err=True)


def _choose(engines: str | None) -> tuple[str, ...]:
    """The engines asked for, or those whose frameworks are installed."""
    from dualtrace.engine_registry import FRAMEWORKS, has_framework, list_engines

    if engines is None:
        found = tuple(name for name in FRAMEWORKS if has_framework(name))
        if not found:
            message = (
                "neither torch nor jax is installed: pip install 'dualtrace[torch,jax]', or name --engines reference"
            )
            raise InvalidArgument(Reason.NOT_FOUND, message, field="--engines")
        return found
    names = tuple(name.strip() for name in engines.split(","))
    known = list_engines()
    for name in names:
        if name not in known:
            message = f"engine {name!r:.80} asked; there are {', '.join(known)}"
            raise InvalidArgument(Reason.NOT_FOUND, message, field="--engines", allowed=", ".join(known))
    if len(set(names)) != len(names):
        raise InvalidArgument(Reason.DUPLICATE, f"{engines:.80} names an engine twice", field="--engines")
    return names


def _specs(
    engines: Sequence[str], model: Path | None, adapters: tuple[str, ...], dtype: str, threads: int
) -> list[ChildSpec]:
    from dualtrace.cli.child_sidecar import ChildSpec

    if model is None and set(engines) != {"fake"}:
        message = "up needs --model DIR; `dualtrace model tiny DIR` makes a small one, `model fetch` a real one"
        raise InvalidArgument(Reason.MISSING, message, field="--model")
    named = parse_adapters(adapters)
    return [
        ChildSpec(engine, None, threads)
        if engine == "fake"  # it has no weights: neither a checkpoint nor adapters
        else ChildSpec(engine, model, threads, dtype, adapters=named)
        for engine in engines
    ]


def _start_sidecars(stack: ExitStack, specs: Sequence[ChildSpec]) -> tuple[Any, ...]:
    from dualtrace.cli.child_sidecar import child_sidecars

    for spec in specs:
        click.echo(f"starting {spec.engine}{f' over {spec.model}' if spec.model else ''}", err=True)
    return stack.enter_context(child_sidecars(specs))


def _start_coordinator(
    stack: ExitStack, backends: dict[str, str], port: int, http_port: int, data: Path | None
) -> ChildProcess:
    """After the sidecars and ended before them, so that it never sees them go."""
    from dualtrace.cli.child_process import ChildProcess

    command = [sys.executable, "-m", "coordinator", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--http-port", str(http_port), "--drain-seconds", "2", "--stop-with-stdin"]
    command += [] if data is None else ["--data", str(data)]
    for name, address in backends.items():
        command += ["--backend", f"{name}={address}"]
    child = ChildProcess("coordinator", command, READY)
    stack.callback(child.end)
    return child


def _await(child: ChildProcess, ready: Any, tell: Tell) -> Any:
    tell(f"waiting for the {child.name}")
    found = ready()
    click.echo(f"the {child.name} is ready after {child.age_seconds:.1f} s (process {child.pid})", err=True)
    return found


def _say_ready(ready: Ready, as_json: bool) -> None:
    from dualtrace.cli.output import put, write_json

    if as_json:
        write_json({"kind": "dualtrace.up", "backends": ready.backends, "grpc": ready.grpc, "http": ready.http})
        return
    lines = [f"{name:<12} {address}" for name, address in ready.backends.items()]
    lines += [f"{'coordinator':<12} {ready.grpc}, http://{ready.http}", "", "try:", f"  {_first_command(ready)}"]
    put("\n".join(lines) + "\n")
    click.echo("Ctrl-C stops them all", err=True)


def _first_command(ready: Ready) -> str:
    names = list(ready.backends)
    if len(names) < 2:
        return f"dualtrace backend list --coordinator {ready.grpc}"
    sides = f"backend:{names[0]} backend:{names[1]}"
    return f'dualtrace compare {sides} --coordinator {ready.grpc} --text "{TEXT}"'


def _watch(children: Sequence[ChildProcess]) -> None:
    """Until one of them dies; Ctrl-C is how it ends well."""
    while True:
        time.sleep(LOOK_SECONDS)
        for child in children:
            if child.has_ended:
                said = child.last_words() or "nothing"
                message = f"the {child.name} ended by itself; the others are ended too. It said:\n{said}"
                raise Unavailable(Reason.UNREACHABLE, message)


@contextmanager
def stopping() -> Iterator[None]:
    """SIGTERM as Ctrl-C, while the block lasts: the children are ended either way before we are."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
