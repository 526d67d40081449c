"""Transactions: many readers, one writer at a time, and every failure told as a Problem.

The database works in threads of its own, so the event loop never waits for a disk. It must not know what is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from coordinator.store import sqlite
from dualtrace.problems import InvalidArgument, Reason, Unavailable

T = TypeVar("T")
Work = Callable[[AsyncConnection], Awaitable[T]]


class Database:
    """One database file. It belongs to the event loop that first used it."""

    def __init__(self, path: Path, busy_timeout_seconds: float = 5.0) -> None:
        self._path = path
        self._writer = sqlite.create_writer(path, busy_timeout_seconds)
        self._readers = sqlite.create_readers(path, busy_timeout_seconds)
        self._writing = asyncio.Lock()
        self._pending: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def read(self, work: Work[T]) -> T:
        """Run `work` on one state of the database."""
        self._require_open()
        return await self._run(self._readers, work)

    async def write(self, work: Work[T]) -> T:
        """Run `work` in one transaction: all of it, or nothing. IntegrityError passes through, for who expects it.

        A caller that is cancelled leaves; what it began is finished, for a connection that is torn out of a commit
        could not say whether it happened.
        """
        self._require_open()
        task = asyncio.ensure_future(self._write_alone(work))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Finish what is being written, then let go of the file."""
        self._closed = True
        while self._pending:
            await asyncio.gather(*self._pending, return_exceptions=True)
        await self._readers.dispose()
        await self._writer.dispose()

    def _require_open(self) -> None:
        if self._closed:
            raise Unavailable(Reason.DRAINING, "the store is closed; ask when the coordinator has started again")

    async def _write_alone(self, work: Work[T]) -> T:
        async with self._writing:
            return await self._run(self._writer, work)

    async def _run(self, engine: AsyncEngine, work: Work[T]) -> T:
        try:
            async with engine.begin() as connection:
                return await work(connection)
        except IntegrityError:
            raise
        except DBAPIError as error:
            raise sqlite.explain(error, self._path) from error
        except UnicodeEncodeError as error:
            message = f"a lone surrogate stands in a text that the store was asked with: {error.object!r:.80}"
            raise InvalidArgument(Reason.INVALID_TEXT, message) from error
        except PoolTimeout as error:
            message = "too many questions to the store wait already; ask again"
            raise Unavailable(Reason.STORAGE_BUSY, message) from error
