"""Which coordinator a command speaks to: the options that every such command has, and the connection they make.

It knows addresses and credentials. It must not know what is asked of a coordinator.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dualtrace.cli.inputs import FILE, command_options, read_token
from dualtrace.problems import DeadlineExceeded, InvalidArgument, Reason

if TYPE_CHECKING:
    from dualtrace.client import Connection
    from dualtrace.coordinator_client import CoordinatorClient

T = TypeVar("T")
Function = Callable[..., Any]

ADDRESS_VARIABLE = "DUALTRACE_COORDINATOR"
DEFAULT_ADDRESS = "127.0.0.1:50050"
SCHEMES = ("grpc://", "grpcs://")


@dataclass(frozen=True)
class Link:
    """How to reach the coordinator, as given on the command line."""

    coordinator: str | None = None  # None: the environment's, else the default
    token_file: Path | None = None
    ca_file: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    timeout_seconds: float | None = None

    @property
    def address(self) -> str:
        return self.coordinator or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS

    @property
    def flags(self) -> str:
        """What a command that is to be repeated needs to find the same coordinator."""
        return f"--coordinator {self.address}"

    def open(self) -> CoordinatorClient:
        """To be closed by the caller; must be called where an event loop runs."""
        from dualtrace.coordinator_client import CoordinatorClient

        return CoordinatorClient(self.connection())

    def connection(self) -> Connection:
        from dualtrace.client import Connection

        scheme, separator, rest = self.address.partition("://")
        address = rest if separator else self.address
        if (separator and f"{scheme}://" not in SCHEMES) or not address:
            message = f"coordinator {self.address!r:.80} is not understood; write HOST:PORT or grpcs://HOST:PORT"
            raise InvalidArgument(Reason.MALFORMED, message, field="--coordinator")
        tls = scheme == "grpcs" and bool(separator)
        if not tls and (self.ca_file or self.certificate or self.key):
            message = "certificates are for TLS; write --coordinator grpcs://HOST:PORT"
            raise InvalidArgument(Reason.CONFLICT, message, field="--coordinator")
        token = None if self.token_file is None else read_token(self.token_file)
        return Connection(address, tls, self.ca_file, self.certificate, self.key, token)


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
        click.option("--token-file", type=FILE, help="File with the bearer token of the coordinator."),
        click.option("--ca-file", type=FILE, help="PEM file of the authority to trust, for grpcs://."),
        click.option("--certificate", type=FILE, help="PEM file of our own certificate, for mutual TLS."),
        click.option("--key", type=FILE, help="PEM file of that certificate's private key."),
    )  # fmt: skip
    wrapped: Function = command_options(command)
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped


def with_coordinator(link: Link, work: Callable[[CoordinatorClient], Awaitable[T]]) -> T:
    """Connect, do the work, disconnect."""
    return asyncio.run(_work_with(link, work))


async def _work_with(link: Link, work: Callable[[CoordinatorClient], Awaitable[T]]) -> T:
    client = link.open()
    try:
        async with asyncio.timeout(link.timeout_seconds):
            return await work(client)
    except TimeoutError:
        message = f"no answer within {link.timeout_seconds:g} s; allow more with --timeout"
        raise DeadlineExceeded(Reason.DEADLINE, message) from None
    finally:
        await client.close()
