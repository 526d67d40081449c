"""`dualtrace health`: is a sidecar serving?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dualtrace.cli.exits import UNAVAILABLE
from dualtrace.cli.inputs import Ask, ask_options
from dualtrace.problems import InvalidArgument, Reason, Unavailable

if TYPE_CHECKING:
    from dualtrace.client import Connection

DEFAULT_SECONDS = 10.0


@click.command()
@ask_options
def health(ask: Ask) -> None:
    """Ask a sidecar's health service; ends with 0 when it serves, 3 when it does not."""
    import asyncio

    from dualtrace.cli.output import write_json
    from dualtrace.targets import find_connection, parse_target

    target = parse_target(ask.target)
    if target.kind not in {"grpc", "grpcs"}:
        message = f"{ask.target} runs in this process; health is for grpc:// and grpcs://"
        raise InvalidArgument(Reason.MALFORMED, message, field="target")
    connection = find_connection(target, ask.target_options())
    state = asyncio.run(_check(connection, ask.timeout_seconds or DEFAULT_SECONDS))
    if ask.as_json:
        write_json({"kind": "dualtrace.health", "target": ask.target, "status": state})
    else:
        click.echo(state)
    if state != "SERVING":
        click.get_current_context().exit(UNAVAILABLE)


async def _check(connection: Connection, seconds: float) -> str:
    """The status' name, from the standard gRPC health service, which needs no token."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from dualtrace.client import open_channel

    async with open_channel(connection) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=seconds)
        except grpc.aio.AioRpcError as error:
            message = (
                f"cannot ask {connection.address}: {error.code().name}: {error.details()}; is a sidecar running there?"
            )
            raise Unavailable(Reason.UNREACHABLE, message, field="target") from None
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))
