"""`python -m coordinator`: one coordinator process, told by flags, environment and a file what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from coordinator.settings import CoordinatorSettings, read_configuration
from dualtrace.cli.exits import guard
from dualtrace.cli.inputs import command_options
from dualtrace.cli.setting_flags import pop_flags, setting_options


class Guarded(click.Command):
    """Whatever goes wrong becomes a message and an exit code, as in `dualtrace`."""

    def invoke(self, ctx: click.Context) -> Any:
        with guard(ctx):
            return super().invoke(ctx)


@click.command(cls=Guarded, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--backend", "backends", multiple=True, metavar="NAME=HOST:PORT[,HOST:PORT]",
    help="A named backend and its replicas; repeat it. TLS and tokens of backends stand in the --config file.",
)  # fmt: skip
@click.option("--config", type=click.Path(dir_okay=False, path_type=Path), help="TOML file of settings and backends.")
@click.option("--print-config", is_flag=True, help="Show every setting with its source, and end.")
@click.option("--stop-with-stdin", is_flag=True, help="Stop when standard input ends: for a parent that may be killed.")
@setting_options(CoordinatorSettings)
@command_options
def main(
    backends: tuple[str, ...],
    config: Path | None,
    print_config: bool,
    stop_with_stdin: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Compare backends, keep what came of it, and serve both over gRPC and HTTP until told to stop.

    Prints `listening on grpc HOST:PORT http HOST:PORT` on standard output when it is ready. SIGTERM or Ctrl-C lets
    running comparisons end first; a second one stops at once. Jobs go on at the next start.
    """
    flags = pop_flags(CoordinatorSettings, given)
    configuration = read_configuration(file=config, environ=os.environ, flags=flags, backends=backends)
    if print_config:
        click.echo(configuration.show())
        return

    import asyncio

    from coordinator.serving import serve
    from dualtrace.listening import stop_with_stdin as watch_stdin

    if stop_with_stdin:
        watch_stdin()
    asyncio.run(serve(configuration, lambda message: _announce(message, as_json)))


def _announce(message: str, as_json: bool) -> None:
    """Where it listens is data; the rest is talk."""
    if not message.startswith("listening on "):
        click.echo(message, err=True)
    elif as_json:
        words = message.removeprefix("listening on ").split()
        addresses = dict(zip(words[::2], words[1::2], strict=True))
        click.echo(json.dumps({"kind": "dualtrace.listening", **addresses}))
    else:
        click.echo(message)


if __name__ == "__main__":
    main(prog_name="python -m coordinator")
