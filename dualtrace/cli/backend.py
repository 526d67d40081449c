"""`dualtrace backend`: whom a coordinator can ask, and whether they are well."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dualtrace.cli.coordinator_link import Link, link_options, with_coordinator
from dualtrace.problems import NotFound, Reason

if TYPE_CHECKING:
    from dualtrace.library import Backend


@click.group()
def backend() -> None:
    """The backends that a coordinator knows by name."""


@backend.command("list")
@link_options()
def list_command(link: Link, as_json: bool) -> None:
    """All backends with their health."""
    from dualtrace.cli.output import show, write_json
    from dualtrace.cli.run_tables import backends_table

    found = with_coordinator(link, lambda client: client.list_backends())
    if as_json:
        write_json({"kind": "dualtrace.backends", "backends": [_to_json(one) for one in found]})
    elif found:
        show([backends_table(found)])
    else:
        click.echo("the coordinator has no backend; start it with --backend NAME=HOST:PORT", err=True)


@backend.command("show")
@click.argument("name")
@link_options()
def show_command(link: Link, name: str, as_json: bool) -> None:
    """One backend: its replicas, and the card of the model behind them. Ends with 3 when it is not healthy."""
    from dualtrace.cli.exits import UNAVAILABLE
    from dualtrace.cli.output import show, write_json
    from dualtrace.cli.run_tables import backends_table, replicas_table

    backends = with_coordinator(link, lambda client: client.list_backends())
    name = name.removeprefix("backend:")
    found = next((one for one in backends if one.name == name), None)
    if found is None:
        allowed = ", ".join(one.name for one in backends)
        raise NotFound(Reason.NOT_FOUND, f"there is no backend {name!r:.120}", field="name", allowed=allowed)
    if as_json:
        write_json({"kind": "dualtrace.backend", **_to_json(found)})
    else:
        from rich.text import Text

        from dualtrace.cli.describe import card_table

        card = [] if found.card is None else [Text(""), card_table(found.card)]
        show([backends_table([found]), Text(""), replicas_table(found), *card])
    if not found.healthy:
        click.get_current_context().exit(UNAVAILABLE)


def _to_json(backend: Backend) -> dict[str, Any]:
    from dualtrace.cli.describe import card_to_json
    from dualtrace.records import to_json

    return {
        "name": backend.name,
        "healthy": backend.healthy,
        "replicas": to_json(backend.replicas),
        "synthetic": backend.synthetic,
        "problem": backend.problem,
        "card": None if backend.card is None else card_to_json(backend.card),
    }
