"""`dualtrace case`: saved parity tests, in files and in the coordinator's store.

It maps options onto cases. Running them is `case_running`'s, telling how they went `case_results`'s.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dualtrace.cli.case_create import create_command
from dualtrace.cli.case_library import (
    SET,
    delete_command,
    export_command,
    get_command,
    import_command,
    list_command,
    list_kept,
    update_command,
)
from dualtrace.cli.coordinator_link import Link, link_options
from dualtrace.cli.inputs import FOLDER, parse_adapters, read_token
from dualtrace.problems import NotFound, Reason

if TYPE_CHECKING:
    from dualtrace.cli.case_results import Ended
    from dualtrace.cli.case_running import Planned
    from dualtrace.library import Case
    from dualtrace.targets import TargetOptions

PATH = click.Path(exists=True, path_type=Path)
CASE_SECONDS = 600.0


@click.group()
def case() -> None:
    """Saved parity tests: run them, and keep them in files or in the coordinator."""


@case.command("run", epilog="""\b
Examples:
  dualtrace case run cases/ --tag smoke --set MODEL=/models/small --junit out.xml
  dualtrace case run --coordinator 127.0.0.1:50050 --tag nightly
""")  # fmt: skip
@click.argument("paths", nargs=-1, type=PATH)
@click.option("--tag", "tags", multiple=True, help="Only cases with this tag; repeat it for any of several.")
@click.option("--name", "names", multiple=True, help="Only the case of this name; repeat it for several.")
@SET
@click.option(
    "--junit",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.xml",
    help="Also write the results as JUnit XML.",
)
@click.option("--fail-fast", is_flag=True, help="Run nothing more after the first case that does not pass.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of each engine.")
@click.option("--dtype", default="", help="Number type of engines; default: their own.")
@click.option("--device", default="", help="Where engines compute; default: cpu.")
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=DIR", help="PEFT adapter of engines; repeat it.")
@click.option("--tokenizer", type=FOLDER, help="Folder with the tokenizer.json of targets that have none.")
@link_options(f"Give up a case after so long.  [default: {CASE_SECONDS:g}]")
def run_command(
    link: Link, paths: tuple[Path, ...], tags: tuple[str, ...], names: tuple[str, ...], values: tuple[str, ...],
    junit: Path | None, fail_fast: bool, as_json: bool, **engine: Any,
) -> None:  # fmt: skip
    """Run cases from FILES or folders, or, without any, those that the coordinator keeps.

    Targets in files that are engines (torch:DIR, jax:DIR) are started here, each once, as processes of their own;
    relative folders are meant from where the file stands. backend:NAME and run:ID are asked through the coordinator.
    Ends with 0 when all passed, 1 when one did not, 2 for wrong usage (no case matched), 3 when a backend was
    unavailable.
    """
    from dualtrace.cli.case_results import sum_up

    planned = _plan(link, paths, tags, names, values, _repeat_engine(**engine))
    begun = time.monotonic()
    results = _run_all(planned, link, fail_fast, _target_options(link, **engine), show=not as_json)
    _finish(results, time.monotonic() - begun, junit, as_json)
    click.get_current_context().exit(sum_up(results))


def _target_options(
    link: Link, threads: int, dtype: str, device: str, adapters: tuple[str, ...], tokenizer: Path | None
) -> TargetOptions:
    from dualtrace.targets import TargetOptions

    return TargetOptions(
        threads=threads,
        dtype=dtype,
        device=device,
        adapters=parse_adapters(adapters),
        tokenizer=tokenizer,
        token=None if link.token_file is None else read_token(link.token_file),
        ca_file=link.ca_file,
        certificate_file=link.certificate,
        key_file=link.key,
        coordinator=link.address,
    )


def _repeat_engine(
    threads: int, dtype: str, device: str, adapters: tuple[str, ...], tokenizer: Path | None
) -> tuple[str, ...]:
    """The engine's flags as a command that is to be repeated needs them."""
    flags = ["--threads", str(threads)] if threads != 1 else []
    for flag, value in (("--dtype", dtype), ("--device", device), ("--tokenizer", tokenizer)):
        flags += [flag, str(value)] if value else []
    for adapter in adapters:
        flags += ["--adapter", adapter]
    return tuple(flags)


def _plan(
    link: Link, paths: Sequence[Path], tags: Sequence[str], names: Sequence[str], values: Sequence[str],
    engine: tuple[str, ...],
) -> tuple[Planned, ...]:  # fmt: skip
    from dualtrace.cases.targets import parse_values

    given = parse_values(values)
    planned = _plan_files(link, paths, names, tags, given, engine) if paths else _plan_kept(link, tags, names)
    if not planned:
        where = ", ".join(map(str, paths)) if paths else f"the coordinator at {link.address}"
        wanted = [f"tag {tag}" for tag in tags] + [f"name {name}" for name in names]
        message = f"no case matched in {where}" + (f" ({' or '.join(wanted)})" if wanted else "")
        raise NotFound(Reason.NOT_FOUND, message, field="--tag" if tags else "--name" if names else "paths")
    return planned


def _plan_files(
    link: Link, paths: Sequence[Path], names: Sequence[str], tags: Sequence[str], given: dict[str, str],
    engine: tuple[str, ...],
) -> tuple[Planned, ...]:  # fmt: skip
    from dualtrace.cases.files import find_cases
    from dualtrace.cases.targets import fill_case, used_names
    from dualtrace.cli.case_running import Planned, write_command

    found = find_cases(paths)
    _refuse_unknown(names, [filed.case for filed in found])
    planned = []
    for filed in found:
        if not is_wanted(filed.case, tags, names):
            continue
        known = {**os.environ, **given}
        command: list[str] = ["case", "run", str(filed.file), "--name", filed.case.name]
        for name in used_names(filed.case):
            command += ["--set", f"{name}={known[name]}"] if name in known else []
        filled = Planned(fill_case(filed.case, known, filed.file.parent.absolute()), str(filed.file), "")
        command += link.flags if filled.needs_coordinator else ()
        command += ["--timeout", f"{link.timeout_seconds:g}"] if link.timeout_seconds else []
        command += engine
        planned.append(Planned(filled.case, filled.source, write_command(command)))
    return tuple(planned)


def _plan_kept(link: Link, tags: Sequence[str], names: Sequence[str]) -> tuple[Planned, ...]:
    from dualtrace.cli.case_running import Planned, write_command

    cases = list_kept(link)
    _refuse_unknown(names, cases)
    return tuple(
        Planned(
            one, link.address,
            write_command(["case", "run", *link.flags, "--name", one.name]), kept_by_coordinator=True,
        )
        for one in cases
        if is_wanted(one, tags, names)
    )  # fmt: skip


def _refuse_unknown(names: Sequence[str], cases: Sequence[Case]) -> None:
    known = [case.name for case in cases]
    missing = next((name for name in names if name not in known), None)
    if missing is not None:
        allowed = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
        raise NotFound(Reason.NOT_FOUND, f"there is no case {missing!r:.120}", field="--name", allowed=allowed)


def is_wanted(case: Case, tags: Sequence[str], names: Sequence[str]) -> bool:
    return (not tags or bool(set(tags) & set(case.tags))) and (not names or case.name in names)


def _run_all(
    planned: Sequence[Planned], link: Link, fail_fast: bool, options: TargetOptions, *, show: bool
) -> list[Ended]:
    import asyncio

    from dualtrace.cli.case_running import RunOptions, run_cases
    from dualtrace.cli.output import waiting

    run_options = RunOptions(options, link.timeout_seconds or CASE_SECONDS, fail_fast, link.open)

    async def work() -> list[Ended]:
        ended = []
        with waiting("starting what the cases need") as tell:
            async for one in run_cases(planned, run_options, tell):
                ended.append(one)
                if show:
                    _show_line(one)
        return ended

    return asyncio.run(work())


def _show_line(ended: Ended) -> None:
    """One line a case, at once; what went wrong stands below it."""
    from dualtrace.cli.case_results import STYLES, tell_line, tell_more
    from dualtrace.cli.output import colour, put

    word, rest = tell_line(ended)
    style = STYLES.get(ended.verdict, "") if ended.verdict is not None else ""
    put("".join([f"{colour(f'{word:12}', style)} {rest}\n", *(f"    {line}\n" for line in tell_more(ended))]))


def _finish(results: Sequence[Ended], seconds: float, junit: Path | None, as_json: bool) -> None:
    from datetime import UTC, datetime, timedelta

    from dualtrace.cases.junit import write_junit
    from dualtrace.cli.case_results import results_to_json, tell_sum, to_junit
    from dualtrace.cli.output import write_json

    if junit is not None:
        started = datetime.now(UTC) - timedelta(seconds=seconds)
        text = write_junit("dualtrace", [to_junit(one) for one in results], started, seconds)
        junit.write_text(text, encoding="utf-8")
    if as_json:
        write_json(results_to_json(results, seconds))
    else:
        click.echo(tell_sum(results, seconds))


for _command in (list_command, get_command, create_command, update_command, delete_command, import_command,
                 export_command):  # fmt: skip
    case.add_command(_command)
