"""Migrations: from every released schema to the newest, all or nothing, and the models say what the schema is."""

from __future__ import annotations

import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from coordinator import migrations
from coordinator.store import Store
from coordinator.store.sqlite import FILE
from coordinator.store.tables import Table
from dualtrace.library import JobState
from tests.support.schema_dump import CASE, COMPARISON, REQUESTS, RUNS

RELEASED = sorted((Path(__file__).parent / "released").glob("schema_*.sql"))
VERSIONS = Path(migrations.__file__).parent / "versions"
BROKEN = """
from alembic import op
import sqlalchemy as sa
revision, down_revision = "0003", "0002"
def upgrade():
    op.create_table("half", sa.Column("x", sa.Integer()))
    op.drop_table("job_events")
    raise ZeroDivisionError
"""
GOOD = """
from alembic import op
import sqlalchemy as sa
revision, down_revision = "0003", "0002"
def upgrade():
    op.add_column("runs", sa.Column("note", sa.Text(), nullable=False, server_default="none"))
"""


def restore(dump: Path, folder: Path) -> None:
    with closing(sqlite3.connect(folder / FILE)) as connection:
        connection.executescript(dump.read_text(encoding="utf-8"))


def query(folder: Path, statement: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(folder / FILE)) as connection:
        return connection.execute(statement).fetchall()


def plan_next(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str) -> None:
    """As if a later version had one migration more."""
    (folder / "versions").mkdir(parents=True)
    for path in VERSIONS.glob("v*.py"):
        shutil.copy(path, folder / "versions")
    (folder / "versions" / "v0003_next.py").write_text(source)
    scripts = ScriptDirectory(str(folder))
    monkeypatch.setattr(migrations, "_scripts", lambda: scripts)


def differences(metadata: sa.MetaData) -> list[object]:
    """Between the schema that the migrations make and what `metadata` says."""
    engine = sa.create_engine("sqlite://")
    try:
        with engine.begin() as connection:
            migrations.upgrade(connection)
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            found: list[object] = compare_metadata(context, metadata)
            return found
    finally:
        engine.dispose()


def test_the_models_are_the_schema_that_the_migrations_make() -> None:
    assert differences(Table.metadata) == []


def test_a_column_that_no_migration_makes_is_found() -> None:
    planted = sa.MetaData(naming_convention=Table.metadata.naming_convention)
    for table in Table.metadata.tables.values():
        table.to_metadata(planted)
    planted.tables["runs"].append_column(sa.Column("planted", sa.Text()))
    assert "planted" in str(differences(planted))


def test_every_revision_has_a_database_of_its_time() -> None:
    revisions = {script.revision for script in ScriptDirectory(str(VERSIONS.parent)).walk_revisions()}
    assert {path.stem.removeprefix("schema_") for path in RELEASED} == revisions


@pytest.mark.parametrize("dump", RELEASED, ids=lambda path: path.stem)
def test_a_database_of_its_time_is_of_the_revision_it_says(dump: Path) -> None:
    (found,) = re.findall(r'INSERT INTO "alembic_version" VALUES\(\'(\d+)\'\)', dump.read_text(encoding="utf-8"))
    assert dump.stem == f"schema_{found}"


@pytest.mark.parametrize("dump", RELEASED, ids=lambda path: path.stem)
async def test_a_released_database_is_migrated_and_read(dump: Path, tmp_path: Path) -> None:
    restore(dump, tmp_path)
    store = await Store.open(tmp_path)
    runs = [await store.get_run(entry.run_id) for entry in (await store.list_runs()).entries]
    comparison = await store.get_comparison(COMPARISON)
    (case,) = (await store.list_cases(tag="smoke")).entries
    job, is_new = await store.start_job(REQUESTS[0], "the work")
    events = await store.job_events(job.job_id)
    (waiting,) = await store.unfinished_jobs()
    await store.close()
    assert [record.run_id for record in runs] == [RUNS[1], RUNS[0]]
    assert (comparison.left_run_id, comparison.right_run_id, comparison.case) == (*RUNS, CASE)
    assert (case.name, case.revision, case.description) == (CASE, 2, "changed")
    assert (is_new, job.state, [event.job.state for event in events], waiting.request_id) == (
        False, JobState.FAILED, [JobState.RUNNING, JobState.FAILED], REQUESTS[1],
    )  # fmt: skip


async def test_a_migrated_database_has_the_newest_revision(tmp_path: Path) -> None:
    restore(RELEASED[0], tmp_path)
    await (await Store.open(tmp_path)).close()
    assert query(tmp_path, "SELECT version_num FROM alembic_version") == [(migrations.newest_revision(),)]


async def test_a_step_forward_keeps_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restore(RELEASED[0], tmp_path)
    plan_next(monkeypatch, tmp_path / "later", GOOD)
    await (await Store.open(tmp_path)).close()
    assert query(tmp_path, "SELECT run_id, note FROM runs ORDER BY 1") == [(RUNS[0], "none"), (RUNS[1], "none")]
    assert query(tmp_path, "SELECT version_num FROM alembic_version") == [("0003",)]


async def test_a_migration_that_fails_leaves_the_database_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore(RELEASED[0], tmp_path)
    before = query(tmp_path, "SELECT name, sql FROM sqlite_master ORDER BY 1")
    with monkeypatch.context() as later:
        plan_next(later, tmp_path / "later", BROKEN)
        with pytest.raises(ZeroDivisionError):
            await Store.open(tmp_path)
    assert query(tmp_path, "SELECT name, sql FROM sqlite_master ORDER BY 1") == before
    store = await Store.open(tmp_path)
    (job,) = await store.unfinished_jobs()
    await store.close()
    assert job.request_id == REQUESTS[1]
