"""`dualtrace case list, get, create, update, delete, import, export`: the cases that a coordinator keeps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dualtrace.cli.coordinator_link import Link, link_options, with_coordinator
from dualtrace.problems import AlreadyExists, InvalidArgument, Reason

if TYPE_CHECKING:
    from dualtrace.coordinator_client import CoordinatorClient
    from dualtrace.library import Case, SideSpec

PATH = click.Path(exists=True, path_type=Path)
SHORT = 60
SET = click.option(
    "--set", "values", multiple=True, metavar="NAME=VALUE",
    help="What ${NAME} stands for in targets; the environment comes second. Repeat it.",
)  # fmt: skip


def list_kept(link: Link, tag: str = "") -> tuple[Case, ...]:
    """All cases of the coordinator, page by page."""
    return with_coordinator(link, lambda client: _list_all(client, tag))


async def _list_all(client: CoordinatorClient, tag: str) -> tuple[Case, ...]:
    found: list[Case] = []
    token = ""
    while True:
        page = await client.list_cases(tag, page_token=token)
        found += page.entries
        token = page.next_page_token
        if not token:
            return tuple(found)


def case_to_json(case: Case) -> dict[str, Any]:
    """As in a file, and its revision."""
    from dualtrace.cases.files import CASE

    return {**CASE.write(case), "revision": case.revision}


@click.command("list")
@click.option("--tag", default="", help="Only cases with this tag.")
@link_options()
def list_command(link: Link, tag: str, as_json: bool) -> None:
    """The cases that the coordinator keeps, by name."""
    from dualtrace.cli.output import show, write_json

    cases = list_kept(link, tag)
    if as_json:
        write_json({"kind": "dualtrace.cases", "cases": [case_to_json(case) for case in cases]})
    elif not cases:
        click.echo("no case is kept" + (f" with tag {tag}" if tag else ""), err=True)
    else:
        show([_table(cases)])


def _table(cases: Sequence[Case]) -> Any:
    from rich.table import Column
    from rich.text import Text

    from dualtrace.cli.tables import figures, plain_table
    from dualtrace.cli.visible import show_line

    names = [Column("name", no_wrap=True), figures("rev"), *(Column(name) for name in ("tags", "left", "right"))]
    table = plain_table([*names, Column("description", overflow="fold")])
    for case in cases:
        sides = [Text(show_line(tell_side(side), SHORT)) for side in (case.left, case.right)]
        first = [Text(case.name), Text(str(case.revision)), Text(", ".join(case.tags))]
        table.add_row(*first, *sides, Text(show_line(case.description, SHORT)))
    return table


def tell_side(side: Any) -> str:
    """A side in few words."""
    view = side.variant.view
    told = side.target if str(view) == "base" else f"{side.target} {view}"
    return told + (" masked" if side.variant.mask is not None else "")


@click.command("get")
@click.argument("name")
@link_options()
def get_command(link: Link, name: str, as_json: bool) -> None:
    """One case, in the form of a case file."""
    from dualtrace.cases.files import write_case
    from dualtrace.cli.output import put, write_json

    case = with_coordinator(link, lambda client: client.get_case(name))
    if as_json:
        write_json(case_to_json(case))
        return
    click.echo(f"revision {case.revision}", err=True)
    put(write_case(case))


@click.command("update")
@click.argument("path", type=PATH)
@click.option("--revision", type=int, help="The revision that is replaced; default: the one kept now.")
@SET
@link_options()
def update_command(link: Link, path: Path, revision: int | None, values: tuple[str, ...], as_json: bool) -> None:
    """Replace a case by that of a file. With --revision it fails when somebody else was faster."""
    cases = read_filled([path], values)
    if len(cases) != 1:
        message = f"{path} holds {len(cases)} cases; update takes one, import --update takes many"
        raise InvalidArgument(Reason.CONFLICT, message, field="path")

    async def work(client: CoordinatorClient) -> Case:
        expected = (await client.get_case(cases[0].name)).revision if revision is None else revision
        return await client.update_case(cases[0], expected)

    tell_kept("updated", [with_coordinator(link, work)], as_json)


@click.command("delete")
@click.argument("name")
@click.option("--revision", type=int, help="The revision that is deleted; default: the one kept now.")
@link_options()
def delete_command(link: Link, name: str, revision: int | None, as_json: bool) -> None:
    """Forget a case. Its comparisons stay."""
    from dualtrace.cli.output import write_json

    async def work(client: CoordinatorClient) -> int:
        expected = (await client.get_case(name)).revision if revision is None else revision
        await client.delete_case(name, expected)
        return expected

    deleted = with_coordinator(link, work)
    if as_json:
        write_json({"kind": "dualtrace.cases", "deleted": name, "revision": deleted})
    else:
        click.echo(f"deleted {name} (revision {deleted})")


@click.command("import")
@click.argument("paths", nargs=-1, required=True, type=PATH)
@click.option("--update", is_flag=True, help="Replace cases that are kept already and differ.")
@SET
@link_options()
def import_command(link: Link, paths: tuple[Path, ...], update: bool, values: tuple[str, ...], as_json: bool) -> None:
    """Keep all cases of FILES or folders. Those that are kept as they are stay untouched."""
    cases = read_filled(paths, values)

    async def work(client: CoordinatorClient) -> list[tuple[str, Case]]:
        kept = {case.name: case for case in await _list_all(client, "")}
        differing = [case.name for case in cases if case.name in kept and not _is_same(case, kept[case.name])]
        if differing and not update:
            message = f"{', '.join(differing)} differ from what is kept; give --update to replace them"
            raise AlreadyExists(Reason.ALREADY_EXISTS, message, field="--update")
        return [await _import_one(client, case, kept.get(case.name)) for case in cases]

    done = with_coordinator(link, work)
    for word in ("created", "updated", "unchanged"):
        tell_kept(word, [case for did, case in done if did == word], as_json=False, err=as_json)
    if as_json:
        from dualtrace.cli.output import write_json

        write_json({"kind": "dualtrace.cases", "cases": [{"did": did, **case_to_json(case)} for did, case in done]})


async def _import_one(client: CoordinatorClient, case: Case, kept: Case | None) -> tuple[str, Case]:
    if kept is None:
        return "created", await client.create_case(case)
    if _is_same(case, kept):
        return "unchanged", kept
    return "updated", await client.update_case(case, kept.revision)


def _is_same(left: Case, right: Case) -> bool:
    from dualtrace.cases.files import write_case

    return write_case(left) == write_case(right)


@click.command("export")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--tag", default="", help="Only cases with this tag.")
@click.option("--force", is_flag=True, help="Replace files that are there.")
@link_options()
def export_command(link: Link, directory: Path, tag: str, force: bool, as_json: bool) -> None:
    """Write the coordinator's cases to DIRECTORY, each as NAME.yaml; importing them gives the same cases."""
    from dualtrace.cases.files import write_case
    from dualtrace.cli.output import write_json

    cases = list_kept(link, tag)
    files = {directory / f"{case.name}.yaml": write_case(case) for case in cases}
    there = next((file for file, text in files.items() if file.exists() and file.read_text() != text), None)
    if there is not None and not force:
        message = f"{there} is there and differs; give --force to replace it"
        raise AlreadyExists(Reason.ALREADY_EXISTS, message, field="--force")
    directory.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        file.write_text(text, encoding="utf-8")
    if as_json:
        write_json({"kind": "dualtrace.cases", "files": [str(file) for file in files]})
    else:
        for file in files:
            click.echo(file)


def read_filled(paths: Sequence[Path], values: Sequence[str]) -> tuple[Case, ...]:
    """The cases of files with their variables filled in, for a store that knows no variables."""
    from dualtrace.cases.files import find_cases
    from dualtrace.cases.targets import fill_case, parse_values

    known = {**os.environ, **parse_values(values)}
    cases = []
    for filed in find_cases(paths):
        case = fill_case(filed.case, known, filed.file.parent.absolute())
        for name, side in (("left", case.left), ("right", case.right)):
            check_side(case.name, name, side, f"{filed.file}:{filed.line}")
        cases.append(replace(case, revision=0))
    return tuple(cases)


def check_side(case: str, name: str, side: SideSpec, field: str, instead: str = "") -> None:
    """A coordinator opens nothing that a caller names."""
    from dualtrace.cases.targets import needs_coordinator

    if needs_coordinator(side):
        return
    allowed = "backend:NAME, run:ID"
    message = f"case {case}: its {name} side is {side.target}, which a coordinator cannot open; it can be {allowed}"
    message += f", {instead}" if instead else ""
    raise InvalidArgument(Reason.MALFORMED, message, field=field, allowed=allowed)


def tell_kept(did: str, cases: Sequence[Case], as_json: bool, *, err: bool = False) -> None:
    if as_json:
        from dualtrace.cli.output import write_json

        write_json({"kind": "dualtrace.cases", "cases": [{"did": did, **case_to_json(case)} for case in cases]})
        return
    for case in cases:
        click.echo(f"{did} {case.name} (revision {case.revision})", err=err)
