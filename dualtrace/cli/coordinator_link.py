"""Which coordinator a command speaks to: the options that every such command has, and the connection they make.

It knows addresses and credentials. It must not know what is asked of a coordinator.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dualtrace.cli.inputs import FILE, command_options, read_token
from dualtrace.problems import DeadlineExceeded, Reason

if TYPE_CHECKING:
    from dualtrace.client import Connection
    from dualtrace.coordinator_client import CoordinatorClient

T = TypeVar("T")

GRACE_SECONDS = 0.25  # a call that has a deadline of its own says more than we can
Function = Callable[..., Any]

ADDRESS_VARIABLE = "DUALTRACE_COORDINATOR"
DEFAULT_ADDRESS = "127.0.0.1:50050"
CREDENTIALS = {
    "token_file": "DUALTRACE_CLIENT_TOKEN_FILE",
    "ca_file": "DUALTRACE_CLIENT_CA_FILE",
    "certificate": "DUALTRACE_CLIENT_CERTIFICATE",
    "key": "DUALTRACE_CLIENT_KEY",
}
"""What lets us in, where no flag says it. A coordinator's own settings begin with DUALTRACE_COORDINATOR_."""


@dataclass(frozen=True)
class Link:
    """How to reach the coordinator, as given on the command line and in the environment."""

    coordinator: str | None = None  # None: the environment's, else the default
    token_file: Path | None = None
    ca_file: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    timeout_seconds: float | None = None

    @property
    def address(self) -> str:
        return self.coordinator or default_address()

    @property
    def flags(self) -> tuple[str, ...]:
        """What a command that is to be repeated needs to find the same coordinator and to be let in."""
        files = {"--token-file": self.token_file, "--ca-file": self.ca_file, "--certificate": self.certificate,
                 "--key": self.key}  # fmt: skip
        given = [part for flag, file in files.items() if file is not None for part in (flag, str(file))]
        return ("--coordinator", self.address, *given)

    @property
    def deadline(self) -> float | None:
        """On the clock of time.monotonic, counted from now."""
        return None if self.timeout_seconds is None else time.monotonic() + self.timeout_seconds

    def open(self) -> CoordinatorClient:
        """To be closed by the caller; must be called where an event loop runs."""
        from dualtrace.coordinator_client import CoordinatorClient

        return CoordinatorClient(self.connection())

    def connection(self) -> Connection:
        from dualtrace.targets import connect_coordinator

        token = None if self.token_file is None else read_token(self.token_file)
        return connect_coordinator(
            self.address, ca_file=self.ca_file, certificate_file=self.certificate, key_file=self.key, token=token
        )


PATIENCE = "Give up after so long; without it, as long as the coordinator allows."


def link_options(timeout_help: str = PATIENCE) -> Callable[[Function], Function]:
    """--coordinator and what goes with it; the function gets one `link`. With --json and --debug."""
    return lambda function: _add_link_options(function, timeout_help)


def _add_link_options(function: Function, timeout_help: str) -> Function:
    @functools.wraps(function)
    def command(**given: Any) -> Any:
        names = Link.__dataclass_fields__
        link = Link(**{name: given.pop(name) for name in names if name in given})
        return function(link=link, **given)

    options: tuple[Callable[[Function], Function], ...] = (
        click.option("--coordinator", metavar="HOST:PORT",
                     help=f"The coordinator; default: ${ADDRESS_VARIABLE}, else {DEFAULT_ADDRESS}."),
        click.option("--timeout", "timeout_seconds", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
                     help=timeout_help),
        *(
            click.option(f"--{name}", type=FILE, envvar=variable, show_envvar=True, help=told)
            for (name, told), variable in zip((
                ("token-file", "File with the bearer token of the coordinator."),
                ("ca-file", "PEM file of the authority to trust, for grpcs://."),
                ("certificate", "PEM file of our own certificate, for mutual TLS."),
                ("key", "PEM file of that certificate's private key."),
            ), CREDENTIALS.values(), strict=True)
        ),
    )  # fmt: skip
    wrapped: Function = command_options(command)
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped


def default_address() -> str:
    """Where a coordinator is looked for that nobody named."""
    return os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS


def with_coordinator(link: Link, work: Callable[[CoordinatorClient], Awaitable[T]]) -> T:
    """Connect, do the work, disconnect."""
    return asyncio.run(_work_with(link, work))


async def _work_with(link: Link, work: Callable[[CoordinatorClient], Awaitable[T]]) -> T:
    client = link.open()
    try:
        async with asyncio.timeout(link.timeout_seconds and link.timeout_seconds + GRACE_SECONDS):
            return await work(client)
    except TimeoutError:
        message = f"no answer within {link.timeout_seconds:g} s; allow more with --timeout"
        raise DeadlineExceeded(Reason.DEADLINE, message) from None
    finally:
        await client.close()
