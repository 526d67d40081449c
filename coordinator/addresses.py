"""Addresses of replicas as gRPC takes them: names looked up, several of them made one target.

gRPC balances over what one target resolves to, and a list of its own may hold IP addresses only. It knows names and
numbers. It must not know who listens there.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence

from coordinator.settings import split_address
from dualtrace.listening import run_aside
from dualtrace.problems import Reason, Unavailable

LOOK_UP_SECONDS = 10.0

Endpoint = tuple[str, int]
"""An IP address and a port."""


def is_dns(address: str) -> bool:
    """A name that stands for all replicas, as many as it has addresses."""
    return address.startswith("dns:")


async def look_up(address: str) -> tuple[Endpoint, ...]:
    """The endpoints behind one address, in a fixed order; IPv4 alone where a name has both, as loopbacks do."""
    host, port = split_address(address, "addresses")
    try:
        return ((str(ipaddress.ip_address(host)), port),)
    except ValueError:
        pass
    try:
        async with asyncio.timeout(LOOK_UP_SECONDS):
            # A thread of its own: a dead name service must not fill the pool that stores runs.
            found = await run_aside(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), "look-up")
    except TimeoutError:
        message = f"the name {host} was not looked up within {LOOK_UP_SECONDS:g} s; does the name service answer?"
        raise Unavailable(Reason.UNREACHABLE, message, field="addresses") from None
    except (OSError, UnicodeError) as error:  # UnicodeError: of a name that no name service could be asked for
        message = f"the name {host} cannot be looked up: {getattr(error, 'strerror', None) or error}; "
        message += "is it spelled right?"
        raise Unavailable(Reason.UNREACHABLE, message, field="addresses") from None
    hosts = {str(entry[4][0]) for entry in found}
    preferred = {one for one in hosts if ":" not in one} or hosts
    return tuple((one, port) for one in sorted(preferred))


def write_endpoint(endpoint: Endpoint) -> str:
    host, port = endpoint
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def join_endpoints(endpoints: Sequence[Endpoint]) -> str:
    """One gRPC target over all of them. A list is of one family, so IPv4 is mapped where IPv6 stands beside it."""
    if any(":" in host for host, _ in endpoints):
        mapped = [(host if ":" in host else f"::ffff:{host}", port) for host, port in endpoints]
        return "ipv6:" + ",".join(write_endpoint(one) for one in mapped)
    return "ipv4:" + ",".join(write_endpoint(one) for one in endpoints)
