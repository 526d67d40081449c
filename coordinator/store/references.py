"""Which artifacts kept documents name: what a sweep must leave. It must not know where artifacts are.

Runs name the raw bytes of their calls in columns. Masks name arrays inside documents: of a run, a comparison, a case,
or the work of a job that is still to be done.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Collection
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncConnection

from coordinator.store.jobs import ENDS
from coordinator.store.tables import CaseRow, ComparisonRow, JobRow, RunRow

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


async def list_in_columns(connection: AsyncConnection) -> set[str]:
    """The digests that runs name in columns."""
    found: set[str] = set()
    for column in (RunRow.raw_request_ref, RunRow.raw_response_ref):
        found.update(digest for digest in await connection.scalars(select(column).distinct()) if digest)
    return found


async def find_in_documents(connection: AsyncConnection, digests: Collection[str]) -> set[str]:
    """Those of the digests that stand in a document. It reads them all: ask for what no column names, and rarely."""
    open_ones = set(digests)
    async for document in _documents(connection):
        if not open_ones:
            break
        open_ones.difference_update(_DIGEST.findall(document))
    return set(digests) - open_ones


async def _documents(connection: AsyncConnection) -> AsyncIterator[str]:
    queries: tuple[Select[Any], ...] = (
        select(JobRow.work).where(JobRow.state.not_in(ENDS)),
        select(CaseRow.document),
        select(RunRow.document).order_by(RunRow.run_id.desc()),
        select(ComparisonRow.document).order_by(ComparisonRow.comparison_id.desc()),
    )
    for query in queries:
        async for document in await connection.stream_scalars(query):
            yield str(document)
