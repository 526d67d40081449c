"""The jobs and their events, which are numbered without gaps. It must not know what a job does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NoReturn

from sqlalchemy import func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from coordinator.store import runs
from coordinator.store.ids import new_job_id
from coordinator.store.rows import check_document, clean_text, now, read_document
from coordinator.store.tables import ComparisonRow, JobEventRow, JobRow
from dualtrace.library import Job, JobEvent, JobState, check_name
from dualtrace.problems import AlreadyExists, FailedPrecondition, NotFound, Problem, Reason
from dualtrace.records import from_json, parse_json, to_json
from dualtrace.runs.run import StoredProblem, store_problem

_JOB = (
    JobRow.job_id, JobRow.request_id, JobRow.state, JobRow.last_sequence, JobRow.run_id, JobRow.comparison_id,
    JobRow.problem,
)  # fmt: skip
_EVENT = (
    JobEventRow.sequence, JobEventRow.state, JobEventRow.run_id, JobEventRow.comparison_id, JobEventRow.problem,
    JobEventRow.message, JobEventRow.done, JobEventRow.total, JobEventRow.unit,
)  # fmt: skip
ENDS = tuple(state.value for state in JobState if state.is_end)
EVENT_PAGE = 1000  # events read at once: a long benchmark has tens of thousands


@dataclass(frozen=True)
class JobEnd:
    """The last event of a job, to be kept in one transaction with what the job made."""

    job_id: str
    state: JobState
    message: str
    problem: Problem | None = None  # it failed, whatever was made


async def insert_new(connection: AsyncConnection, request_id: str, work: str) -> Job:
    """Raises IntegrityError where the request id is taken: the database decides that, for every caller at once."""
    check_name(request_id, "request_id")
    check_document(work, "the work")
    job = Job(new_job_id(), request_id, JobState.WAITING, 0)
    row = {"job_id": job.job_id, "request_id": request_id, "created": now(), "state": job.state.value}
    await connection.execute(insert(JobRow).values(**row, last_sequence=0, work=work))
    return job


async def find_started(connection: AsyncConnection, request_id: str, work: str) -> Job | None:
    """The job that the request id started before; None when it started none."""
    query = select(*_JOB, JobRow.work).where(JobRow.request_id == request_id)
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        return None
    job, known = _make(*row[:-1]), row[-1]
    if known != work:
        message = f"request_id {request_id} started job {job.job_id} with other content; choose another id"
        raise AlreadyExists(Reason.ALREADY_EXISTS, message, field="request_id")
    return job


async def get(connection: AsyncConnection, job_id: str) -> Job:
    row = (await connection.execute(select(*_JOB).where(JobRow.job_id == job_id))).first()
    return _missing(job_id) if row is None else _make(*row)


async def read_work(connection: AsyncConnection, job_id: str) -> str:
    work = await connection.scalar(select(JobRow.work).where(JobRow.job_id == job_id))
    return _missing(job_id) if work is None else work


async def list_unfinished(connection: AsyncConnection) -> tuple[Job, ...]:
    """Oldest first."""
    query = select(*_JOB).where(JobRow.state.not_in(ENDS)).order_by(JobRow.job_id)
    return tuple(_make(*row) for row in await connection.execute(query))


async def add_event(connection: AsyncConnection, job_id: str, told: JobEvent, problem: Problem | None) -> JobEvent:
    """`told` as the next event: its number and what its job leaves open come from the job as it stands."""
    query = select(*_JOB).where(JobRow.job_id == job_id).with_for_update()
    row = (await connection.execute(query)).first()
    before = _missing(job_id) if row is None else _make(*row)
    if before.state.is_end:
        message = f"job {job_id} has ended ({before.state.value}); nothing is added to it"
        raise FailedPrecondition(Reason.CONFLICT, message, field="job_id")
    await _check_results(connection, told.job)
    job = Job(
        job_id, before.request_id, told.job.state, before.last_sequence + 1,
        told.job.run_id or before.run_id, told.job.comparison_id or before.comparison_id,
        before.problem if problem is None else store_problem(problem),
    )  # fmt: skip
    columns = {
        "state": job.state.value, "run_id": job.run_id, "comparison_id": job.comparison_id,
        "problem": _problem_to_text(job.problem),
    }  # fmt: skip
    await connection.execute(
        update(JobRow).where(JobRow.job_id == job_id).values(**columns, last_sequence=job.last_sequence)
    )
    event = JobEvent(job.last_sequence, job, clean_text(told.message), told.done, told.total, told.unit)
    row_values = {"message": event.message, "done": event.done, "total": event.total, "unit": event.unit}
    await connection.execute(
        insert(JobEventRow).values(job_id=job_id, sequence=event.sequence, **columns, **row_values)
    )
    return event


async def end(
    connection: AsyncConnection, told: JobEnd, *, run_id: str | None = None, comparison_id: str | None = None
) -> None:
    """The job's last event. A job that has ended refuses it, and then its results are not kept either."""
    job = Job(told.job_id, "", told.state, 0, run_id, comparison_id)
    await add_event(connection, told.job_id, JobEvent(0, job, told.message, 0, 0, ""), told.problem)


async def find_most_done(connection: AsyncConnection, job_id: str, unit: str) -> int:
    """The highest `done` among the job's events of this unit; 0 without one."""
    query = select(func.max(JobEventRow.done)).where(JobEventRow.job_id == job_id, JobEventRow.unit == unit)
    return await connection.scalar(query) or 0


async def list_events(connection: AsyncConnection, job_id: str, after_sequence: int) -> tuple[JobEvent, ...]:
    """One page of them, in order. There are more where the last one's number is below the job's."""
    job = await get(connection, job_id)
    query = (
        select(*_EVENT)
        .where(JobEventRow.job_id == job_id, JobEventRow.sequence > after_sequence)
        .order_by(JobEventRow.sequence)
        .limit(EVENT_PAGE)
    )
    events = []
    for row in await connection.execute(query):
        sequence, state, run_id, comparison_id, problem, message, done, total, unit = row
        then = _make(job_id, job.request_id, state, sequence, run_id, comparison_id, problem)
        events.append(JobEvent(sequence, then, message, done, total, unit))
    return tuple(events)


async def _check_results(connection: AsyncConnection, job: Job) -> None:
    if job.run_id:
        await runs.require(connection, job.run_id, "run_id")
    if job.comparison_id:
        query = select(ComparisonRow.comparison_id).where(ComparisonRow.comparison_id == job.comparison_id)
        if await connection.scalar(query) is None:
            message = f"there is no comparison {job.comparison_id:.100}; store it first"
            raise NotFound(Reason.NOT_FOUND, message, field="comparison_id")


def _make(
    job_id: str, request_id: str, state: str, sequence: int, run_id: str | None, comparison_id: str | None,
    problem: str | None,
) -> Job:  # fmt: skip
    return Job(job_id, request_id, JobState(state), sequence, run_id, comparison_id, _problem_of_text(problem, job_id))


def _problem_to_text(problem: StoredProblem | None) -> str | None:
    return None if problem is None else json.dumps(to_json(problem), ensure_ascii=True)


def _problem_of_text(text: str | None, job_id: str) -> StoredProblem | None:
    if text is None:
        return None
    what = f"the problem of job {job_id}"
    return read_document(lambda raw: from_json(StoredProblem, parse_json(raw, what), newer=True), text, what)


def _missing(job_id: str) -> NoReturn:
    raise NotFound(Reason.NOT_FOUND, f"there is no job {job_id:.100}; start one", field="job_id")
