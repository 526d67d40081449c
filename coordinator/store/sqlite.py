"""SQLite, and all that is peculiar to it: how it is opened, how a writer begins, what its errors mean.

No other module of the store knows which database it speaks to. This one must not know tables.
"""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

from sqlalchemy import URL, Connection, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from coordinator.disk_errors import DATA_FOLDER
from dualtrace.problems import Exhausted, FailedPrecondition, Internal, Problem, Reason, Unavailable

log = logging.getLogger(__name__)

FILE = "dualtrace.db"
READERS = 4


def create_writer(path: Path, busy_timeout_seconds: float) -> AsyncEngine:
    """One connection, for every write: SQLite has one writer at a time anyway, and who waits here waits awake."""
    return _create(path, busy_timeout_seconds, 1, writes=True)


def create_readers(path: Path, busy_timeout_seconds: float) -> AsyncEngine:
    """A few connections that cannot write. Under WAL they neither wait for the writer nor hold it up."""
    return _create(path, busy_timeout_seconds, READERS, writes=False)


def _create(path: Path, busy_timeout_seconds: float, connections: int, *, writes: bool) -> AsyncEngine:
    url = URL.create("sqlite+aiosqlite", database=str(path))
    engine = create_async_engine(url, pool_size=connections, max_overflow=0, hide_parameters=True)
    settings = (
        f"busy_timeout={int(busy_timeout_seconds * 1000)}",
        "foreign_keys=ON",
        # FULL: each commit is synced. A kill alone would be survived with NORMAL too, a power cut would take the
        # last commits with it; and a run costs seconds, a sync milliseconds.
        *(("journal_mode=WAL", "synchronous=FULL") if writes else ("query_only=ON",)),
    )

    def prepare(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
        connection.isolation_level = None  # the driver begins no transaction of its own
        cursor = connection.cursor()
        for setting in settings:
            cursor.execute(f"PRAGMA {setting}")
        cursor.close()

    def begin(connection: Connection) -> None:
        # IMMEDIATE: the place of the writer is taken at the start. A reader that turns writer midway would fail at
        # once, however long it was willing to wait.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    event.listen(engine.sync_engine, "connect", prepare)
    event.listen(engine.sync_engine, "begin", begin)
    return engine


def explain(error: DBAPIError, path: Path) -> Problem:
    """What an error of the database means to whoever called. Where it stands and what it said is for the log."""
    original = error.orig
    log.error("%s: %s", path, original)
    code = getattr(original, "sqlite_errorcode", 0) & 0xFF  # the rest is detail
    why = getattr(original, "sqlite_errorname", type(original).__name__)
    where = f"the database in {DATA_FOLDER}"
    match code:
        case sqlite3.SQLITE_FULL:
            return Exhausted(Reason.STORAGE_FULL, f"no room is left for {where}; free some and ask again")
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            message = f"{where} is locked by another program; end it or wait, and ask again"
            return Unavailable(Reason.STORAGE_BUSY, message)
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM | sqlite3.SQLITE_CANTOPEN:
            message = f"{where} cannot be opened for writing ({why}); give this user the right to write there"
            return FailedPrecondition(Reason.STORAGE_UNUSABLE, message)
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            message = f"{where} is damaged or no database ({why}); put it aside and restore a backup"
            return FailedPrecondition(Reason.STORAGE_UNUSABLE, message)
        case sqlite3.SQLITE_IOERR:
            message = f"{where} cannot be read or written ({why}); look at the disk and its free room"
            return Unavailable(Reason.STORAGE_UNUSABLE, message)
    return Internal(Reason.BUG, f"the database refused ({why}); the coordinator's log has the details")
