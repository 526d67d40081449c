"""`dualtrace run`: answers of one side that a coordinator stores, from the asking to the saved file."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dualtrace.cli.compare_question import QuestionAsked, question_options
from dualtrace.cli.coordinator_link import Link, link_options, with_coordinator
from dualtrace.cli.inputs import STDIN_OR_FILE
from dualtrace.problems import InvalidArgument, NotFound, Reason

if TYPE_CHECKING:
    from dualtrace.coordinator_client import CoordinatorClient
    from dualtrace.library import BenchmarkPlan, Job, RunPlan, RunRecord, RunSummary
    from dualtrace.questions.asked import ForwardQuestion, Variant

OUTPUT = click.Path(dir_okay=False, path_type=Path)
LISTED = 50


@click.group()
def run() -> None:
    """Stored answers of one side: ask and keep, list, show, compare, replay, save."""


@run.command("start", epilog="""\b
Examples:
  dualtrace run start backend:torch --text 'The capital of France is Paris.'
  dualtrace run start backend:jax --query 'Good? ' --item 'yes' --labels 5,6 --token-debug
  dualtrace run start backend:torch --next 'Once' --mode benchmark --repeats 50 --fallback auto
""")  # fmt: skip
@click.argument("backend")
@click.option(
    "--mode",
    type=click.Choice(["score", "benchmark"]),
    default="score",
    show_default=True,
    help="One answer of a real backend, or many, timed.",
)
@click.option("--token-debug", is_flag=True, help="Of a label question: score the items' own tokens too.")
@click.option("--view", help="Whose weights, as `dualtrace compare` says.")
@click.option("--mask", type=STDIN_OR_FILE, metavar="FILE.json", help="Who may see whom, as docs/masks.md says.")
@click.option("--allow-leak", is_flag=True, help="Read rows that see the token they predict.")
@click.option("--repeats", type=int, help="Timed calls of a benchmark.  [default: 20]")
@click.option("--warm-up", type=int, help="Calls before them, timed apart.  [default: 3]")
@click.option("--concurrency", type=int, help="Calls at a time.  [default: 1]")
@click.option(
    "--fallback",
    type=click.Choice(["none", "auto", "mock", "bench"]),
    help="What may stand in for the backend, in a benchmark alone.  [default: none]",
)
@click.option(
    "--call-timeout",
    "call_seconds",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Give up on one call of the backend after so long; default: the coordinator's own limit.",
)
@click.option("--request-id", help="Makes the start safe to repeat: the same id and question are the same job.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Watch the job until it ends.")
@question_options
@link_options("Stop watching after so long; the job goes on.")
def start_command(
    link: Link, asked: QuestionAsked, backend: str, request_id: str | None, wait: bool, as_json: bool, **given: Any
) -> None:
    """Ask BACKEND (backend:NAME) a question and keep the answer."""
    from dualtrace.cli.coordinator_texts import complete
    from dualtrace.cli.job import show_job, watch

    written = _read_asked(asked)
    make = _plan(backend, **given)

    async def work(client: CoordinatorClient) -> Job:
        plan = make(await complete(asked, written, client, [backend], link.deadline))
        job = await client.start_job(request_id or f"cli-{secrets.token_hex(12)}", plan)
        if not wait:
            return job
        click.echo(f"job {job.job_id} started", err=True)
        return await watch(client, job)

    job = with_coordinator(link, work)
    show_job(job, as_json)
    if not wait or job.run_id is None:
        return
    if not as_json:
        _show_record(with_coordinator(link, lambda client: client.get_run(job.run_id or "")), as_json=False)


def _read_asked(asked: QuestionAsked) -> ForwardQuestion:
    """What is wrong with the question is told before anybody is asked. Read once: standard input has no second time."""
    if asked.is_empty:
        message = "nothing to ask; give --text, --completion, --next or --query with their like"
        raise InvalidArgument(Reason.MISSING, message, field="--text")
    return asked.read()


def _plan(
    backend: str, mode: str, token_debug: bool, view: str | None, mask: str | None, allow_leak: bool,
    call_seconds: float | None, **options: Any,
) -> Callable[[ForwardQuestion], RunPlan]:  # fmt: skip
    """All but the question, which may need the backend's tokenizer."""
    from dualtrace.library import RunMode, RunPlan, SideSpec

    if not backend.startswith("backend:"):
        message = f"{backend!r:.80} asked; runs are made by a coordinator's backends: write backend:NAME"
        raise InvalidArgument(Reason.MALFORMED, message, field="backend")
    side = SideSpec(backend, _read_variant(view, mask, allow_leak))
    benchmark = _read_benchmark(mode, options)
    return lambda question: RunPlan(question, side, RunMode(mode.upper()), token_debug, benchmark, call_seconds)


def _read_variant(view: str | None, mask: str | None, allow_leak: bool) -> Variant:
    from dualtrace.cli.mask_files import read_mask
    from dualtrace.questions.asked import Variant
    from dualtrace.view_form import parse_view
    from dualtrace.views import BASE

    spec = None if mask is None else read_mask(mask).usual()
    return Variant(BASE if view is None else parse_view(view), spec, allow_leak)


def _read_benchmark(mode: str, options: dict[str, Any]) -> BenchmarkPlan | None:
    from dualtrace.library import BenchmarkPlan, Fallback

    given = {name: value for name, value in options.items() if value is not None}
    if mode != "benchmark":
        if given:
            flag = "--" + next(iter(given)).replace("_", "-")
            raise InvalidArgument(Reason.CONFLICT, f"{flag} is for --mode benchmark; leave it out", field=flag)
        return None
    if "fallback" in given:
        given["fallback"] = Fallback(given["fallback"].upper())
    return BenchmarkPlan(**given)


@run.command("list")
@click.option("--target", default="", help="Only runs of this target, backend:NAME.")
@click.option("--identity", default="", help="Only runs of this identity: the same model and question.")
@click.option("--limit", type=click.IntRange(min=1), default=LISTED, show_default=True, help="At most so many.")
@link_options()
def list_command(link: Link, target: str, identity: str, limit: int, as_json: bool) -> None:
    """Stored runs, the newest first."""
    from dualtrace.cli.output import output_console, show, write_json
    from dualtrace.cli.run_tables import runs_table
    from dualtrace.records import to_json

    async def work(client: CoordinatorClient) -> list[RunSummary]:
        found: list[RunSummary] = []
        token = ""
        while len(found) < limit:
            page = await client.list_runs(min(limit - len(found), 1000), token, identity=identity, target=target)
            found += page.entries
            token = page.next_page_token
            if not token:
                break
        return found

    runs = with_coordinator(link, work)
    if as_json:
        write_json({"kind": "dualtrace.runs", "runs": to_json(tuple(runs))})
    elif runs:
        show([runs_table(runs, output_console().width)])
    else:
        click.echo("no run is kept", err=True)


@run.command("show")
@click.argument("run_id")
@link_options()
def show_command(link: Link, run_id: str, as_json: bool) -> None:
    """One stored run: what is kept of it, and its answer."""
    if as_json:
        from dualtrace.cli.output import put

        put(with_coordinator(link, lambda client: client.get_run_text(_bare(run_id))) + "\n")
        return
    _show_record(with_coordinator(link, lambda client: client.get_run(_bare(run_id))), as_json)


def _show_record(record: RunRecord, as_json: bool) -> None:
    from dualtrace.cli.output import put, show
    from dualtrace.cli.run_tables import record_tables
    from dualtrace.runs.kept import record_to_text

    if as_json:
        put(record_to_text(record) + "\n")
    else:
        show(record_tables(record))


@run.command("export")
@click.argument("run_id")
@click.argument("file", type=OUTPUT)
@click.option(
    "--raw",
    type=click.Choice(["request", "response"]),
    help="Instead: the very bytes that were sent to, or came from, the backend.",
)
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@link_options()
def export_command(link: Link, run_id: str, file: Path, raw: str | None, force: bool, as_json: bool) -> None:
    """Save a run to FILE.json, which is a target for every command that compares."""
    from dualtrace.cli.output import write_json
    from dualtrace.runs.run import run_to_text

    if file.exists() and not force:
        raise InvalidArgument(Reason.ALREADY_EXISTS, f"{file} is there; give --force to replace it", field="--force")

    async def work(client: CoordinatorClient) -> bytes:
        record = await client.get_run(_bare(run_id))
        if raw is None:
            return (run_to_text(record.run) + "\n").encode()
        digest = record.raw_request_ref if raw == "request" else record.raw_response_ref
        if not digest:
            raise NotFound(Reason.NOT_FOUND, f"of run {run_id} no raw {raw} is kept", field="--raw")
        return await client.fetch_artifact(digest)

    data = with_coordinator(link, work)
    file.write_bytes(data)
    if as_json:
        write_json({"kind": "dualtrace.export", "run_id": run_id, "file": str(file), "bytes": len(data)})
    else:
        click.echo(file)


@run.command("compare")
@click.argument("left")
@click.argument("right")
@link_options()
def compare_command(link: Link, left: str, right: str, as_json: bool) -> None:
    """Compare two stored runs by their ids. No backend is asked."""
    _compare_there(link, f"run:{_bare(left)}", f"run:{_bare(right)}", as_json)


@run.command("replay")
@click.argument("run_id")
@click.argument("backend")
@link_options()
def replay_command(link: Link, run_id: str, backend: str, as_json: bool) -> None:
    """Ask BACKEND (backend:NAME) a stored run's question again and compare: today against then."""
    if not backend.startswith("backend:"):
        message = (
            f"{backend!r:.80} asked; write backend:NAME, or save the run with `dualtrace run export` and give the file "
            "to `dualtrace compare`"
        )
        raise InvalidArgument(Reason.MALFORMED, message, field="backend")
    _compare_there(link, f"run:{_bare(run_id)}", backend, as_json)


def _bare(run_id: str) -> str:
    return run_id.removeprefix("run:")


def _compare_there(link: Link, left: str, right: str, as_json: bool) -> None:
    """By the coordinator, with the very question that the left run holds."""
    from dualtrace.cli.comparison import compare_kept, present_report

    judged = with_coordinator(link, lambda client: compare_kept(client, link, left, right, as_json))
    present_report(judged, as_json)
