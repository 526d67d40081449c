"""`dualtrace job`: long work of a coordinator, watched from any number on, and stopped."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

import click

from dualtrace.cli.coordinator_link import Link, link_options, with_coordinator

if TYPE_CHECKING:
    from dualtrace.coordinator_client import CoordinatorClient
    from dualtrace.library import Job, JobEvent


@click.group()
def job() -> None:
    """Long work that a coordinator does: how it stands, its events, stopping it."""


@job.command("show")
@click.argument("job_id")
@link_options()
def show_command(link: Link, job_id: str, as_json: bool) -> None:
    """How a job stands."""
    show_job(with_coordinator(link, lambda client: client.get_job(job_id)), as_json, exits=False)


@job.command("watch")
@click.argument("job_id")
@click.option(
    "--after", type=click.IntRange(min=0), default=0, show_default=True, help="Only events after this number."
)
@link_options("Stop watching after so long; the job goes on.")
def watch_command(link: Link, job_id: str, after: int, as_json: bool) -> None:
    """A job's events until it ends. Ctrl-C stops the watching, not the job."""

    async def work(client: CoordinatorClient) -> Job:
        return await watch(client, await client.get_job(job_id), after)

    show_job(with_coordinator(link, work), as_json)


@job.command("cancel")
@click.argument("job_id")
@link_options()
def cancel_command(link: Link, job_id: str, as_json: bool) -> None:
    """Stop a job; harmless when it has ended."""
    show_job(with_coordinator(link, lambda client: client.cancel_job(job_id)), as_json, exits=False)


async def watch(client: CoordinatorClient, job: Job, after: int = 0) -> Job:
    """The job as it ended; its events are told on standard error."""
    from dualtrace.cli.output import waiting

    with waiting(f"job {job.job_id}") as tell:
        async with aclosing(client.watch_job(job.job_id, after)) as events:
            async for event in events:
                job = event.job
                tell(tell_event(event))
                _say(event)
    return job


def tell_event(event: JobEvent) -> str:
    done = (
        f"{event.done} of {event.total} {event.unit}"
        if event.total
        else f"{event.done} {event.unit}" * bool(event.done)
    )
    return "  ".join(part for part in (event.job.state.lower(), done, event.message) if part)


def _say(event: JobEvent) -> None:
    """A line an event, where no terminal shows the latest one."""
    import sys

    from dualtrace.cli.visible import show_text

    if not sys.stderr.isatty():
        click.echo(f"{event.sequence:5}  {show_text(tell_event(event))}", err=True)


def show_job(job: Job, as_json: bool, *, exits: bool = True) -> None:
    """How it stands, as data. With `exits`, a job that failed or was cancelled ends the command like its problem."""
    from dualtrace.cli.exits import FAILED, exit_code
    from dualtrace.cli.output import show, write_json
    from dualtrace.cli.run_tables import job_table
    from dualtrace.library import JobState
    from dualtrace.records import to_json
    from dualtrace.runs.run import restore_problem

    if as_json:
        write_json({"kind": "dualtrace.job", **to_json(job)})
    else:
        show([job_table(job)])
    if exits and job.problem is not None:
        click.get_current_context().exit(exit_code(restore_problem(job.problem)))
    if exits and job.state is JobState.CANCELLED:
        click.get_current_context().exit(FAILED)
