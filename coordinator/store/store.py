"""The store: everything that a coordinator keeps, behind one class.

It opens a folder, orders transactions and sends what takes long into threads. It must not know SQL or who asks.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from coordinator import migrations
from coordinator.artifacts import ArtifactStore
from coordinator.store import cases, comparisons, jobs, references, runs, sqlite
from coordinator.store.database import Database
from coordinator.store.folder import FolderLock
from coordinator.store.jobs import JobEnd
from coordinator.store.pages import DEFAULT_PAGE_SIZE, PageRequest, open_page
from coordinator.store.rows import read_document
from coordinator.store.tables import FactRow
from dualtrace.compare.report import Verdict
from dualtrace.json_text import FloatTexts
from dualtrace.library import (
    Case,
    ComparisonRecord,
    ComparisonSummary,
    Job,
    JobEvent,
    JobState,
    Page,
    RunRecord,
    RunSummary,
)
from dualtrace.problems import FailedPrecondition, InvalidArgument, Problem, Reason
from dualtrace.runs.kept import read_record

_TOKEN_KEY = "page_token_key"  # noqa: S105 - the name of the fact, not its value


class Store:
    """What is kept in one folder: a database, artifacts, and the lock that makes this process its only owner."""

    def __init__(self, lock: FolderLock, database: Database, artifacts: ArtifactStore, secret: bytes) -> None:
        """Use `open`."""
        self._lock, self._database, self._secret = lock, database, secret
        self.artifacts = artifacts

    @classmethod
    async def open(
        cls, folder: Path, *, migrate: bool = True, artifacts: ArtifactStore | None = None,
        busy_timeout_seconds: float = 5.0,
    ) -> Store:  # fmt: skip
        """Take the folder, bring its schema up to date, sweep what a crash left. `migrate=False`: an old schema is
        refused instead."""
        lock = await asyncio.to_thread(FolderLock, folder)
        database = Database(folder / sqlite.FILE, busy_timeout_seconds)
        try:
            secret = await database.write(lambda connection: _prepare(connection, migrate))
            artifacts = artifacts or ArtifactStore(str(folder / "artifacts"))
            await artifacts.prepare()
            await _sweep(database, artifacts)
        except BaseException:
            await database.close()
            lock.release()
            raise
        return cls(lock, database, artifacts, secret)

    async def close(self) -> None:
        """Finish what is being written and give the folder back. Harmless when done before."""
        await self._database.close()
        self._lock.release()

    # Runs

    async def add_run(self, record: RunRecord, end: JobEnd | None = None) -> None:
        """Keep a run whole, and with it the end of the job that made it. The artifacts that it names must be there."""
        row = await asyncio.to_thread(runs.make_row, record)
        await self._require_artifacts([row])

        async def add(connection: AsyncConnection) -> None:
            await runs.add(connection, row)
            if end is not None:
                await jobs.end(connection, end, run_id=record.run_id)

        await self._database.write(add)

    async def _require_artifacts(self, rows: Sequence[Mapping[str, object]]) -> None:
        named = [(name, row[name]) for row in rows for name in ("raw_request_ref", "raw_response_ref")]
        for name, digest in dict.fromkeys((name, str(digest)) for name, digest in named if digest is not None):
            if not await self.artifacts.has(digest):
                message = f"{name} {digest} is not among the artifacts; put it there first"
                raise FailedPrecondition(Reason.NOT_FOUND, message, field=name)

    async def get_run(self, run_id: str) -> RunRecord:
        text = await self.get_run_text(run_id)
        return await asyncio.to_thread(read_document, read_record, text, f"run {run_id}")

    async def require_run(self, run_id: str) -> None:
        """Refuse an unknown run without reading a known one."""
        await self._database.read(lambda connection: runs.require(connection, run_id, "run_id"))

    async def get_run_text(self, run_id: str) -> str:
        """The document as it was stored, byte for byte."""
        return await self._database.read(lambda connection: runs.read_text(connection, run_id))

    async def list_runs(
        self, page_size: int = DEFAULT_PAGE_SIZE, page_token: str = "", identity: str = "", target: str = ""
    ) -> Page[RunSummary]:
        """Newest first."""
        page = self._open_page("runs", (identity, target), page_size, page_token)
        return await self._database.read(lambda connection: runs.list_page(connection, page))

    # Comparisons

    async def add_comparison(
        self, record: ComparisonRecord, report_text: str | None = None, new_runs: Sequence[RunRecord] = (),
        end: JobEnd | None = None, texts: FloatTexts | None = None,
    ) -> None:  # fmt: skip
        """Keep a comparison, the runs that it brings and the end of the job that made it: all of them, or nothing.

        `report_text`: the report as text, where the caller has it already; `texts`: of the numbers in it.
        """

        def make_rows() -> tuple[list[dict[str, object]], dict[str, object]]:
            return [runs.make_row(run, texts) for run in new_runs], comparisons.make_row(record, report_text)

        run_rows, row = await asyncio.to_thread(make_rows)
        await self._require_artifacts(run_rows)

        async def add(connection: AsyncConnection) -> None:
            for one in run_rows:
                await runs.add(connection, one)
            await comparisons.add(connection, row)
            if end is not None:
                await jobs.end(connection, end, comparison_id=record.comparison_id)

        await self._database.write(add)

    async def get_comparison(self, comparison_id: str) -> ComparisonRecord:
        parts = await self._database.read(lambda connection: comparisons.read_parts(connection, comparison_id))
        return await asyncio.to_thread(comparisons.make_record, parts)

    async def get_comparison_text(self, comparison_id: str) -> str:
        """The report as it was stored, byte for byte."""
        return await self._database.read(lambda connection: comparisons.read_text(connection, comparison_id))

    async def list_comparisons(
        self, page_size: int = DEFAULT_PAGE_SIZE, page_token: str = "", case: str = "", verdict: Verdict | None = None
    ) -> Page[ComparisonSummary]:
        """Newest first."""
        page = self._open_page("comparisons", (case, verdict.value if verdict else ""), page_size, page_token)
        return await self._database.read(lambda connection: comparisons.list_page(connection, page))

    # Cases

    async def create_case(self, case: Case) -> Case:
        text = await asyncio.to_thread(cases.case_to_text, case)
        return await self._database.write(lambda connection: cases.create(connection, case, text))

    async def get_case(self, name: str) -> Case:
        parts = await self._database.read(lambda connection: cases.read_row(connection, name))
        return await asyncio.to_thread(cases.make_case, parts)

    async def update_case(self, case: Case, expected_revision: int) -> Case:
        """Replace the whole case. Its own `revision` field says nothing: `expected_revision` does."""
        text = await asyncio.to_thread(cases.case_to_text, case)
        return await self._database.write(
            lambda connection: cases.replace_case(connection, case, text, expected_revision)
        )

    async def delete_case(self, name: str, expected_revision: int) -> None:
        await self._database.write(lambda connection: cases.remove(connection, name, expected_revision))

    async def list_cases(self, page_size: int = DEFAULT_PAGE_SIZE, page_token: str = "", tag: str = "") -> Page[Case]:
        """By name."""
        page = self._open_page("cases", (tag,), page_size, page_token)
        rows = await self._database.read(lambda connection: cases.list_rows(connection, page))
        return await asyncio.to_thread(cases.make_page, rows, page)

    # Jobs

    async def start_job(self, request_id: str, work: str) -> tuple[Job, bool]:
        """The job of this request id, and whether it was made now. Other work under a known id is refused."""
        try:
            return await self._database.write(lambda connection: jobs.insert_new(connection, request_id, work)), True
        except IntegrityError:
            known = await self.started_job(request_id, work)
            assert known is not None, "its id is taken"
            return known, False

    async def started_job(self, request_id: str, work: str) -> Job | None:
        """The job that this request id started; None when it started none. Other work is refused."""
        return await self._database.read(lambda connection: jobs.find_started(connection, request_id, work))

    async def job(self, job_id: str) -> Job:
        return await self._database.read(lambda connection: jobs.get(connection, job_id))

    async def job_work(self, job_id: str) -> str:
        return await self._database.read(lambda connection: jobs.read_work(connection, job_id))

    async def add_job_event(
        self, job_id: str, state: JobState, message: str = "", done: int = 0, total: int = 0, unit: str = "",
        run_id: str | None = None, comparison_id: str | None = None, problem: Problem | None = None,
    ) -> JobEvent:  # fmt: skip
        """The next event of a job, and the job as it stands from now on. What is None stays as it was."""
        told = JobEvent(0, Job(job_id, "", state, 0, run_id, comparison_id), message, done, total, unit)
        return await self._database.write(lambda connection: jobs.add_event(connection, job_id, told, problem))

    async def job_events(self, job_id: str, after_sequence: int = 0) -> tuple[JobEvent, ...]:
        """A page of them, in order; more follow while the last one's number is below the job's `last_sequence`."""
        if after_sequence < 0:
            message = f"after_sequence {after_sequence} asked; events are numbered from 1, 0 asks for all"
            raise InvalidArgument(Reason.OUT_OF_RANGE, message, field="after_sequence", allowed=">= 0")
        return await self._database.read(lambda connection: jobs.list_events(connection, job_id, after_sequence))

    async def most_done(self, job_id: str, unit: str) -> int:
        """The highest `done` that the job told in this unit; 0 when it told none."""
        return await self._database.read(lambda connection: jobs.find_most_done(connection, job_id, unit))

    async def unfinished_jobs(self) -> tuple[Job, ...]:
        """Oldest first: what a coordinator that starts again has to take up."""
        return await self._database.read(jobs.list_unfinished)

    def _open_page(self, name: str, filters: tuple[str, ...], page_size: int, page_token: str) -> PageRequest:
        return open_page(self._secret, name, filters, page_size, page_token)


async def _sweep(database: Database, artifacts: ArtifactStore) -> None:
    """Remove what a crash left: unfinished bytes, and whole ones that nothing names."""
    others = await artifacts.find_others(await database.read(references.list_in_columns))
    named = (
        await database.read(lambda connection: references.find_in_documents(connection, others)) if others else set()
    )
    await artifacts.sweep(others - named)


async def _prepare(connection: AsyncConnection, migrate: bool) -> bytes:
    """The schema up to date, and the secret of this store's page tokens."""
    if migrate:
        await connection.run_sync(migrations.upgrade)
    else:
        await connection.run_sync(migrations.require_newest)
    found = await connection.scalar(select(FactRow.value).where(FactRow.name == _TOKEN_KEY))
    if found is None:
        found = secrets.token_hex(32)
        await connection.execute(insert(FactRow).values(name=_TOKEN_KEY, value=found))
    return bytes.fromhex(found)
