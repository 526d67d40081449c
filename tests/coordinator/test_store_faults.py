"""A store in trouble: full, locked, taken, damaged, of a later version. Each says so, and what was kept stays."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from coordinator import migrations
from coordinator.store import Store
from coordinator.store.database import Database
from coordinator.store.sqlite import FILE
from dualtrace.problems import Exhausted, FailedPrecondition, Internal, Problem, Reason, Unavailable
from dualtrace.runs.kept import record_to_text
from tests.support.stored import make_case, make_record


async def refusal(folder: Path, **options: Any) -> Problem:
    with pytest.raises(Problem) as caught:
        await Store.open(folder, **options)
    return caught.value


async def filled(folder: Path) -> str:
    """A store with one run, closed again. The run's id."""
    store = await Store.open(folder)
    record = make_record()
    await store.add_run(record)
    await store.close()
    return record.run_id


def change(folder: Path, *statements: str) -> None:
    with closing(sqlite3.connect(folder / FILE)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


async def run_of(folder: Path, run_id: str) -> str:
    store = await Store.open(folder)
    try:
        return await store.get_run_text(run_id)
    finally:
        await store.close()


# Full


async def limit_pages(database: Database, spare: int) -> None:
    """As if the disk had room for so many pages more."""

    async def limit(connection: AsyncConnection) -> None:
        pages = await connection.scalar(text("PRAGMA page_count"))
        await connection.execute(text(f"PRAGMA max_page_count = {int(pages or 0) + spare}"))

    await database.write(limit)


async def test_a_full_disk_is_told_and_leaves_no_half_run(tmp_path: Path) -> None:
    store = await Store.open(tmp_path)
    kept, large = make_record(), make_record(tokens=20_000)
    await store.add_run(kept)
    await limit_pages(store._database, 20)
    with pytest.raises(Exhausted, match="no room") as caught:
        await store.add_run(large)
    listed = [entry.run_id for entry in (await store.list_runs()).entries]
    await store.close()
    assert (caught.value.reason, listed) == (Reason.STORAGE_FULL, [kept.run_id])


async def test_when_there_is_room_again_the_same_run_is_kept(tmp_path: Path) -> None:
    store = await Store.open(tmp_path)
    large = make_record(tokens=20_000)
    await limit_pages(store._database, 20)
    with pytest.raises(Exhausted):
        await store.add_run(large)
    await limit_pages(store._database, 100_000)
    await store.add_run(large)
    found = await store.get_run_text(large.run_id)
    await store.close()
    assert found == record_to_text(large)


# Locked


async def test_a_locked_database_is_told_and_reading_goes_on(tmp_path: Path) -> None:
    store = await Store.open(tmp_path, busy_timeout_seconds=0.05)
    await store.add_run(make_record())
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable, match="locked by another program") as caught:
            await store.create_case(make_case())
        listed = await store.list_runs()
        other.execute("ROLLBACK")
    await store.create_case(make_case())
    await store.close()
    assert (caught.value.reason, len(listed.entries)) == (Reason.STORAGE_BUSY, 1)


async def test_while_a_write_waits_for_the_lock_the_event_loop_goes_on(tmp_path: Path) -> None:
    store = await Store.open(tmp_path, busy_timeout_seconds=0.3)
    ticks = 0
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        writing = asyncio.ensure_future(store.create_case(make_case()))
        while not writing.done():
            await asyncio.sleep(0.01)
            ticks += 1
        with pytest.raises(Unavailable):
            await writing
    await store.close()
    assert ticks >= 5  # of about 30: a loop that is held would count 1


async def test_a_second_coordinator_on_one_folder_is_refused_with_the_firsts_process(tmp_path: Path) -> None:
    first = await Store.open(tmp_path)
    problem = await refusal(tmp_path)
    await first.close()
    assert (type(problem), problem.reason) == (Unavailable, Reason.STORAGE_BUSY)
    assert f"process {os.getpid()}" in problem.detail.message


async def test_a_store_that_could_not_be_opened_lets_the_folder_go(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database" * 500)
    first = await refusal(tmp_path)
    second = await refusal(tmp_path)
    assert (first.reason, second.reason) == (Reason.STORAGE_UNUSABLE, Reason.STORAGE_UNUSABLE)


# Not to be used


async def test_a_file_where_the_folder_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    problem = await refusal(tmp_path / "file")
    assert (type(problem), problem.reason) == (FailedPrecondition, Reason.STORAGE_UNUSABLE)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EROFS, Reason.STORAGE_UNUSABLE),
        (errno.EACCES, Reason.STORAGE_UNUSABLE),
        (errno.ENOSPC, Reason.STORAGE_FULL),
    ],
)
async def test_a_folder_that_cannot_be_written_is_told_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: Reason
) -> None:
    def fail(path: object, *_arguments: object) -> int:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", fail)  # a real one would not stop root, who runs tests in containers
    problem = await refusal(tmp_path)
    assert (problem.reason, str(tmp_path) in problem.detail.message) == (reason, True)


async def test_a_database_that_may_only_be_read_is_told(tmp_path: Path) -> None:
    store = await Store.open(tmp_path)

    async def forbid(connection: AsyncConnection) -> None:
        await connection.execute(text("PRAGMA query_only = ON"))

    await store._database.write(forbid)
    with pytest.raises(FailedPrecondition, match="right to write") as caught:
        await store.create_case(make_case())
    await store.close()
    assert caught.value.reason is Reason.STORAGE_UNUSABLE


@pytest.mark.parametrize("content", [b"no database" * 500, b"SQLite format 3\0" + b"\xff" * 8000])
async def test_a_damaged_database_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    problem = await refusal(tmp_path)
    assert (problem.reason, "damaged" in problem.detail.message) == (Reason.STORAGE_UNUSABLE, True)
    assert (tmp_path / FILE).read_bytes() == content


async def test_a_damaged_page_is_told_when_it_is_read(tmp_path: Path) -> None:
    run_id = await filled(tmp_path)
    data = bytearray((tmp_path / FILE).read_bytes())
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'runs'").fetchone()
    data[(page - 1) * 4096 : page * 4096] = b"\xff" * 4096
    (tmp_path / FILE).write_bytes(data)
    with pytest.raises(FailedPrecondition, match="damaged"):
        await run_of(tmp_path, run_id)


async def test_where_the_database_stands_is_told_to_the_log_and_to_no_caller(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = await Store.open(tmp_path)
    await limit_pages(store._database, 0)
    with pytest.raises(Exhausted) as caught:
        await store.add_run(make_record(tokens=20_000))
    await store.close()
    assert str(tmp_path) not in caught.value.detail.message
    assert "the data folder" in caught.value.detail.message
    assert str(tmp_path) in caplog.text


async def test_what_the_database_said_is_told_to_the_log_and_to_no_caller(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = await Store.open(tmp_path)
    with pytest.raises(Internal) as caught:
        await store._database.read(lambda connection: connection.execute(text("SELECT hush FROM nowhere")))
    await store.close()
    assert "nowhere" not in caught.value.detail.message
    assert "nowhere" in caplog.text


async def test_another_programs_database_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    change(tmp_path, "CREATE TABLE theirs (x)")
    before = (tmp_path / FILE).read_bytes()
    problem = await refusal(tmp_path)
    assert (problem.reason, "theirs" in problem.detail.message) == (Reason.STORAGE_UNUSABLE, True)
    assert sqlite3.connect(tmp_path / FILE).execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]
    assert len(before) > 0


async def test_a_document_that_was_changed_is_the_stores_fault(tmp_path: Path) -> None:
    run_id = await filled(tmp_path)
    change(tmp_path, """UPDATE runs SET document = replace(document, '"llama"', '"gpt2"')""")
    store = await Store.open(tmp_path)
    with pytest.raises(Internal, match=run_id) as caught:
        await store.get_run(run_id)
    await store.close()
    assert caught.value.reason is Reason.ARTIFACT_CORRUPT


# Schemas


async def test_a_store_of_a_later_version_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    run_id = await filled(tmp_path)
    change(tmp_path, "UPDATE alembic_version SET version_num = '9999'")
    problem = await refusal(tmp_path)
    assert (type(problem), problem.reason) == (FailedPrecondition, Reason.SCHEMA_VERSION)
    assert "made by a later version" in problem.detail.message
    change(tmp_path, f"UPDATE alembic_version SET version_num = '{migrations.newest_revision()}'")
    assert run_id in await run_of(tmp_path, run_id)


async def test_without_migrating_an_old_schema_is_refused(tmp_path: Path) -> None:
    problem = await refusal(tmp_path, migrate=False)
    assert (problem.reason, "revision none" in problem.detail.message) == (Reason.SCHEMA_VERSION, True)


async def test_without_migrating_the_newest_schema_is_opened(tmp_path: Path) -> None:
    run_id = await filled(tmp_path)
    store = await Store.open(tmp_path, migrate=False)
    found = await store.get_run(run_id)
    await store.close()
    assert found.run_id == run_id


# What is promised of every commit


async def test_every_commit_is_synced_to_the_disk_and_links_are_checked(tmp_path: Path) -> None:
    store = await Store.open(tmp_path)

    async def ask(connection: AsyncConnection) -> list[object]:
        names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        return [await connection.scalar(text(f"PRAGMA {name}")) for name in names]

    found = await store._database.write(ask)
    await store.close()
    assert found == ["wal", 2, 1, 5000]  # 2: FULL


async def test_a_reader_cannot_write(tmp_path: Path) -> None:
    store = await Store.open(tmp_path)
    with pytest.raises(FailedPrecondition, match="right to write"):
        await store._database.read(lambda connection: connection.execute(text("DELETE FROM facts")))
    await store.close()
