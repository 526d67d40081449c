"""The cases: as they are now, by name, each change counted by a revision. It must not know how a case is run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from coordinator.store.pages import PageRequest
from coordinator.store.rows import check_document, read_document
from coordinator.store.tables import CaseRow, CaseTagRow, RetiredCaseRow
from dualtrace.compare.gates import GatePolicy
from dualtrace.compare.tolerance import Tolerance
from dualtrace.library import Case, Page, SideSpec
from dualtrace.problems import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Reason
from dualtrace.records import from_json, malformed, parse_json, to_json
from dualtrace.runs.run import check_version, question_to_json, read_question

KIND = "dualtrace.case"
SCHEMA_VERSION = "1.0"

_PARTS = (CaseRow.name, CaseRow.revision, CaseRow.document)
CaseParts = tuple[str, int, str]
Listed = tuple[Sequence[Sequence[Any]], bool]
"""The rows of a page, and whether there are more."""

PAGE_CHARS = 2 << 20
"""Of the documents of one page, unless its first is larger. As messages they are below the 4 MiB that gRPC takes: what
grows most is a number, from five characters at least to eight bytes."""


@dataclass(frozen=True)
class _Head:
    """The fields of a Case beside its question and its revision, which stands in its own column."""

    name: str
    left: SideSpec
    right: SideSpec
    tolerance: Tolerance | None
    policy: GatePolicy
    tags: tuple[str, ...]
    description: str


def case_to_text(case: Case) -> str:
    head = _Head(**{field.name: getattr(case, field.name) for field in fields(_Head)})
    document = {
        "kind": KIND,
        "case_schema_version": SCHEMA_VERSION,
        "question": question_to_json(case.question),
        **to_json(head),
    }
    return check_document(json.dumps(document, allow_nan=False, ensure_ascii=True), "the case")


def read_case(text: str) -> Case:
    document = parse_json(text, "the case")
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise malformed("kind", "not that of a case", f'an object with "kind": "{KIND}"')
    newer = check_version(document.get("case_schema_version"), SCHEMA_VERSION, "the case")
    apart = {"kind", "case_schema_version", "question"}
    head = from_json(_Head, {name: value for name, value in document.items() if name not in apart}, newer=newer)
    question = read_question(document.get("question"), newer=newer)
    return Case(question=question, **{field.name: getattr(head, field.name) for field in fields(_Head)})


async def create(connection: AsyncConnection, case: Case, text: str) -> Case:
    if case.revision:
        message = f"revision {case.revision} given; a new case has none yet: leave it 0, or update the case"
        raise InvalidArgument(Reason.CONFLICT, message, field="revision", allowed="0")
    # A name goes on counting: an expected revision of a case that was deleted fits no later one by chance.
    last = await connection.scalar(select(RetiredCaseRow.revision).where(RetiredCaseRow.name == case.name))
    revision = (last or 0) + 1
    try:
        await connection.execute(insert(CaseRow).values(name=case.name, revision=revision, document=text))
    except IntegrityError as error:
        message = f"there is a case {case.name} already; update it, or choose another name"
        raise AlreadyExists(Reason.ALREADY_EXISTS, message, field="name") from error
    await _set_tags(connection, case)
    return replace(case, revision=revision)


async def read_row(connection: AsyncConnection, name: str) -> CaseParts:
    row = (await connection.execute(select(*_PARTS).where(CaseRow.name == name))).one_or_none()
    if row is None:
        _missing(name)
    name, revision, text = row
    return name, revision, text


def make_case(parts: Sequence[Any]) -> Case:
    """Takes a while for a long question: it belongs into a thread."""
    name, revision, text = parts
    return replace(read_document(read_case, text, f"case {name}"), revision=revision)


def make_page(listed: Listed, page: PageRequest) -> Page[Case]:
    """Likewise."""
    rows, has_more = listed
    token = page.token_after(str(rows[-1][0])) if has_more else ""
    return Page(tuple(make_case(row) for row in rows), token)


async def replace_case(connection: AsyncConnection, case: Case, text: str, expected_revision: int) -> Case:
    await _expect(connection, case.name, expected_revision)
    revision = expected_revision + 1
    await connection.execute(update(CaseRow).where(CaseRow.name == case.name).values(revision=revision, document=text))
    await connection.execute(delete(CaseTagRow).where(CaseTagRow.case_name == case.name))
    await _set_tags(connection, case)
    return replace(case, revision=revision)


async def remove(connection: AsyncConnection, name: str, expected_revision: int) -> None:
    await _expect(connection, name, expected_revision)
    await connection.execute(delete(CaseRow).where(CaseRow.name == name))
    await connection.execute(delete(RetiredCaseRow).where(RetiredCaseRow.name == name))
    await connection.execute(insert(RetiredCaseRow).values(name=name, revision=expected_revision))


async def list_rows(connection: AsyncConnection, page: PageRequest) -> Listed:
    """By name. The page's filter is a tag; "" is any. A page ends early where its documents become large."""
    (tag,) = page.filters
    query = select(CaseRow.name, func.length(CaseRow.document)).order_by(CaseRow.name).limit(page.size + 1)
    if tag:
        query = query.join(CaseTagRow, CaseTagRow.case_name == CaseRow.name).where(CaseTagRow.tag == tag)
    if page.after is not None:
        query = query.where(CaseRow.name > page.after)
    found = (await connection.execute(query)).all()
    totals = itertools.accumulate(length for _name, length in found[: page.size])
    fitting = max(1, sum(total <= PAGE_CHARS for total in totals))
    names = [name for name, _length in found[:fitting]]
    parts = select(*_PARTS).where(CaseRow.name.in_(names)).order_by(CaseRow.name)
    return (await connection.execute(parts)).all(), len(found) > fitting


async def _expect(connection: AsyncConnection, name: str, expected_revision: int) -> None:
    # FOR UPDATE where the database has it: nobody else comes between this look and the change.
    query = select(CaseRow.revision).where(CaseRow.name == name).with_for_update()
    found = await connection.scalar(query)
    if found is None:
        _missing(name)
    if found != expected_revision:
        message = f"case {name} is at revision {found}, the change was made from {expected_revision}"
        raise FailedPrecondition(
            Reason.REVISION_CONFLICT, f"{message}; read it again, then retry", field="expected_revision",
            allowed=str(found),
        )  # fmt: skip


async def _set_tags(connection: AsyncConnection, case: Case) -> None:
    if case.tags:
        rows = [{"tag": tag, "case_name": case.name} for tag in case.tags]
        await connection.execute(insert(CaseTagRow), rows)


def _missing(name: str) -> NoReturn:
    raise NotFound(Reason.NOT_FOUND, f"there is no case {name:.100}; list the cases to see all", field="name")
