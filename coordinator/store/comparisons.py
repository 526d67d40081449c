"""The comparisons: a report and the ids of two runs. It must not know how a report is made or what is in a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from coordinator.store import runs
from coordinator.store.ids import check_id
from coordinator.store.pages import PageRequest
from coordinator.store.rows import check_document, check_text, cut_page, read_document
from coordinator.store.tables import ComparisonRow
from dualtrace.compare.report import Verdict, read_report, report_to_text
from dualtrace.library import ComparisonRecord, ComparisonSummary, Page, check_name
from dualtrace.problems import AlreadyExists, NotFound, Reason

_SUMMARY = (
    ComparisonRow.comparison_id, ComparisonRow.created, ComparisonRow.left_target, ComparisonRow.right_target,
    ComparisonRow.question_kind, ComparisonRow.verdict, ComparisonRow.case_name,
    ComparisonRow.first_divergence_index, ComparisonRow.max_token_abs_diff,
)  # fmt: skip


def make_row(record: ComparisonRecord, report_text: str | None) -> dict[str, object]:
    """The columns of a comparison. Takes a while for a long one: it belongs into a thread."""
    report = record.report
    tokens = report.tokens
    texts = {"created": report.created, "left_target": report.left.target, "right_target": report.right.target}
    return {
        **{name: check_text(text, name) for name, text in texts.items()},
        "comparison_id": check_id(record.comparison_id, "cmp", "comparison_id"),
        "left_run_id": record.left_run_id or None,
        "right_run_id": record.right_run_id or None,
        "question_kind": report.question.kind.value,
        "verdict": report.verdict.value,
        "case_name": record.case and check_name(record.case, "case"),
        "first_divergence_index": tokens.first_divergence_index if tokens else None,
        "max_token_abs_diff": tokens.max_token_abs_diff if tokens else None,
        "document": check_document(report_to_text(report) if report_text is None else report_text, "the report"),
    }


async def add(connection: AsyncConnection, row: dict[str, object]) -> None:
    for name in ("left_run_id", "right_run_id"):
        if run_id := row[name]:
            await runs.require(connection, str(run_id), name)
    try:
        await connection.execute(insert(ComparisonRow).values(**row))
    except IntegrityError as error:
        message = f"there is a comparison {row['comparison_id']} already; it is stored once and never changed"
        raise AlreadyExists(Reason.ALREADY_EXISTS, message, field="comparison_id") from error


async def read_text(connection: AsyncConnection, comparison_id: str) -> str:
    query = select(ComparisonRow.document).where(ComparisonRow.comparison_id == comparison_id)
    text = await connection.scalar(query)
    return _missing(comparison_id) if text is None else text


Parts = tuple[str, str | None, str | None, str, str]


async def read_parts(connection: AsyncConnection, comparison_id: str) -> Parts:
    query = select(
        ComparisonRow.comparison_id, ComparisonRow.left_run_id, ComparisonRow.right_run_id, ComparisonRow.case_name,
        ComparisonRow.document,
    ).where(ComparisonRow.comparison_id == comparison_id)  # fmt: skip
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        _missing(comparison_id)
    name, left, right, case, text = row
    return name, left, right, case, text


def make_record(parts: Parts) -> ComparisonRecord:
    """Takes a while for a long report: it belongs into a thread."""
    comparison_id, left, right, case, text = parts
    report = read_document(read_report, text, f"comparison {comparison_id}")
    return ComparisonRecord(comparison_id, left or "", right or "", case, report)


async def list_page(connection: AsyncConnection, page: PageRequest) -> Page[ComparisonSummary]:
    """Newest first. The page's filters are the case and the verdict; "" is any."""
    case, verdict = page.filters
    query = select(*_SUMMARY).order_by(ComparisonRow.comparison_id.desc()).limit(page.size + 1)
    if case:
        query = query.where(ComparisonRow.case_name == case)
    if verdict:
        query = query.where(ComparisonRow.verdict == verdict)
    if page.after is not None:
        query = query.where(ComparisonRow.comparison_id < page.after)
    rows = (await connection.execute(query)).all()
    return cut_page(rows, page, _summarise, lambda row: row[0])


def _summarise(row: Sequence[Any]) -> ComparisonSummary:
    comparison_id, created, left, right, question_kind, verdict, case, first, largest = row
    return ComparisonSummary(comparison_id, created, left, right, question_kind, Verdict(verdict), case, first, largest)


def _missing(comparison_id: str) -> NoReturn:
    message = f"there is no comparison {comparison_id:.100}; list the comparisons to see all"
    raise NotFound(Reason.NOT_FOUND, message, field="comparison_id")
