"""The runs: added whole and once, read back as they were, listed without their documents.

It must not know jobs or comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from coordinator.store.ids import check_id
from coordinator.store.pages import PageRequest
from coordinator.store.rows import check_document, check_text, clean_text, cut_page
from coordinator.store.tables import RunRow
from dualtrace.json_text import FloatTexts
from dualtrace.library import Page, RunMode, RunRecord, RunSummary
from dualtrace.problems import AlreadyExists, NotFound, Reason
from dualtrace.runs.kept import record_to_text

_SUMMARY = (
    RunRow.run_id, RunRow.created, RunRow.mode, RunRow.target, RunRow.model_id, RunRow.framework,
    RunRow.question_kind, RunRow.identity, RunRow.complete, RunRow.synthetic,
)  # fmt: skip


def make_row(record: RunRecord, texts: FloatTexts | None = None) -> dict[str, object]:
    """The columns of a run. Takes a while for a long one: it belongs into a thread."""
    run = record.run
    # What a sidecar calls itself must not take the run of it along: these columns are only for lists.
    told = {"model_id": run.provenance.model_id, "framework": run.provenance.framework}
    return {
        **{name: clean_text(text) for name, text in told.items()},
        "created": check_text(run.created, "created"),
        "target": check_text(record.target, "target"),
        "run_id": check_id(record.run_id, "run", "run_id"),
        "mode": record.mode.value,
        "question_kind": run.question.kind.value,
        "identity": run.identity,
        "complete": run.complete,
        "synthetic": record.synthetic,
        "raw_request_ref": record.raw_request_ref or None,
        "raw_response_ref": record.raw_response_ref or None,
        "document": check_document(record_to_text(record, texts), "the run"),
    }


async def add(connection: AsyncConnection, row: dict[str, object]) -> None:
    try:
        await connection.execute(insert(RunRow).values(**row))
    except IntegrityError as error:
        message = f"there is a run {row['run_id']} already; a run is stored once and never changed"
        raise AlreadyExists(Reason.ALREADY_EXISTS, message, field="run_id") from error


async def read_text(connection: AsyncConnection, run_id: str) -> str:
    text = await connection.scalar(select(RunRow.document).where(RunRow.run_id == run_id))
    if text is None:
        raise _missing(run_id, "run_id")
    return text


async def require(connection: AsyncConnection, run_id: str, field: str) -> None:
    if await connection.scalar(select(RunRow.run_id).where(RunRow.run_id == run_id)) is None:
        raise _missing(run_id, field)


def _missing(run_id: str, field: str) -> NotFound:
    return NotFound(Reason.NOT_FOUND, f"there is no run {run_id:.100}; list the runs to see all", field=field)


async def list_page(connection: AsyncConnection, page: PageRequest) -> Page[RunSummary]:
    """Newest first. The page's filters are the identity and the target; "" is any."""
    identity, target = page.filters
    query = select(*_SUMMARY).order_by(RunRow.run_id.desc()).limit(page.size + 1)
    if identity:
        query = query.where(RunRow.identity == identity)
    if target:
        query = query.where(RunRow.target == target)
    if page.after is not None:
        query = query.where(RunRow.run_id < page.after)
    rows = (await connection.execute(query)).all()
    return cut_page(rows, page, _summarise, lambda row: row[0])


def _summarise(row: Sequence[Any]) -> RunSummary:
    run_id, created, mode, target, model_id, framework, question_kind, identity, complete, synthetic = row
    return RunSummary(
        run_id, created, RunMode(mode), target, model_id, framework, question_kind, identity, complete, synthetic
    )
