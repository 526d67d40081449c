"""From the schema of any released version to this one, by Alembic and without its files outside this package.

`versions/` holds one module a step. It knows a connection and the order of the steps. It must not know what is kept.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext, RevisionStep
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

from dualtrace.problems import FailedPrecondition, Reason


@cache
def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(Path(__file__).parent))


def newest_revision() -> str:
    head = _scripts().get_current_head()
    assert head is not None, "there is no migration at all"
    return head


def find_revision(connection: Connection) -> str | None:
    """The revision of this database; None for an empty one. What is no store of ours, or a later one, is refused."""
    found = MigrationContext.configure(connection).get_current_revision()
    if found is None:
        if tables := inspect(connection).get_table_names():
            message = f"the database holds the tables {', '.join(tables)[:200]} and is no store of dualtrace"
            raise FailedPrecondition(Reason.STORAGE_UNUSABLE, f"{message}; name another folder")
        return None
    known = [script.revision for script in _scripts().walk_revisions()]
    if found not in known:
        message = f"the store is of revision {found}, made by a later version of dualtrace than this one"
        raise FailedPrecondition(
            Reason.SCHEMA_VERSION,
            f"{message}, which knows up to {newest_revision()}; use that version, or restore a backup",
            allowed=", ".join(reversed(known)),
        )
    return found


def upgrade(connection: Connection) -> bool:
    """Bring the database to the newest revision, within the caller's transaction. Whether there was anything to do."""
    if find_revision(connection) == newest_revision():
        return False
    _migrate(connection, newest_revision())
    return True


def require_newest(connection: Connection) -> None:
    """Refuse a database that `upgrade` would change."""
    found = find_revision(connection)
    if found != newest_revision():
        message = f"the store is of revision {found or 'none'}; this version needs {newest_revision()}"
        raise FailedPrecondition(Reason.SCHEMA_VERSION, f"{message}: open it once with migrations allowed")


def _migrate(connection: Connection, target: str) -> None:
    scripts = _scripts()

    def list_steps(revision: tuple[str, ...], _context: MigrationContext) -> list[RevisionStep]:
        return scripts._upgrade_revs(target, revision)  # type: ignore[arg-type]

    # transactional_ddl: SQLite can take back DDL, and the store begins its transactions itself, so a migration that
    # fails or is killed leaves the database as it was.
    with EnvironmentContext(Config(), scripts, fn=list_steps, destination_rev=target) as context:
        context.configure(connection=connection, transactional_ddl=True)
        context.run_migrations()
