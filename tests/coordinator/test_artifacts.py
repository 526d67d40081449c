"""Artifacts: named by what they are, whole or not there at all, swept when nothing refers to them."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

from coordinator.artifacts import PART_BYTES, ArtifactStore, Staged
from coordinator.recording import RawBytes
from coordinator.store import Store
from coordinator.work import work_to_text
from dualtrace.library import JobState, RunPlan, SideSpec
from dualtrace.masks.spec import Array, MaskSpec
from dualtrace.problems import Exhausted, Internal, InvalidArgument, NotFound, Problem, Reason
from dualtrace.questions.asked import Input, RollingQuestion, Variant
from dualtrace.tape import Tape
from tests.support.stored import make_case, make_record, make_run

DATA = bytes(range(256)) * 3000  # 768,000 bytes: three parts
DIGEST = "sha256:" + hashlib.sha256(DATA).hexdigest()


@pytest.fixture
async def artifacts(tmp_path: Path) -> ArtifactStore:
    made = ArtifactStore(str(tmp_path / "artifacts"))
    await made.prepare()
    return made


async def read(artifacts: ArtifactStore, digest: str) -> list[bytes]:
    return [part async for part in artifacts.read(digest)]


def list_files(tmp_path: Path) -> list[str]:
    folder = tmp_path / "artifacts"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class FullDisk(LocalFileSystem):  # type: ignore[misc]
    """A disk without room for what is written."""

    cachable = False

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super().open(path, mode, **options)
        return _Full(file) if "w" in mode else file


class _Full:
    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self._file.close()


async def test_bytes_are_named_by_their_digest_and_come_back_in_parts(artifacts: ArtifactStore) -> None:
    assert await artifacts.put(DATA) == DIGEST
    parts = await read(artifacts, DIGEST)
    assert b"".join(parts) == DATA
    assert [len(part) for part in parts] == [PART_BYTES, PART_BYTES, len(DATA) - 2 * PART_BYTES]


async def test_no_bytes_at_all_are_an_artifact_too(artifacts: ArtifactStore) -> None:
    assert await read(artifacts, await artifacts.put(b"")) == []


async def test_the_same_bytes_are_kept_once(artifacts: ArtifactStore, tmp_path: Path) -> None:
    assert len({await artifacts.put(DATA) for _ in range(3)}) == 1
    assert len(list_files(tmp_path)) == 1


async def test_the_same_bytes_put_many_times_at_once_are_kept_once(artifacts: ArtifactStore, tmp_path: Path) -> None:
    await asyncio.gather(*(artifacts.put(DATA) for _ in range(20)))
    assert list_files(tmp_path) == [f"sha256/{DIGEST[7:9]}/{DIGEST[7:]}"]


async def test_a_stream_is_named_when_it_ends(artifacts: ArtifactStore) -> None:
    async with artifacts.writer() as writer:
        for start in range(0, len(DATA), 100_000):
            await writer.write(DATA[start : start + 100_000])
        assert not await artifacts.has(DIGEST)
        assert await writer.finish() == DIGEST
    assert b"".join(await read(artifacts, DIGEST)) == DATA


async def test_a_stream_that_breaks_off_leaves_nothing(artifacts: ArtifactStore, tmp_path: Path) -> None:
    async def break_off() -> None:
        async with artifacts.writer() as writer:
            await writer.write(DATA)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await break_off()
    assert list_files(tmp_path) == []


async def test_an_unknown_artifact_is_not_found(artifacts: ArtifactStore) -> None:
    with pytest.raises(NotFound, match=DIGEST):
        await read(artifacts, DIGEST)


@pytest.mark.parametrize("digest", ["", "sha256:", DIGEST.upper(), DIGEST + "\n", "sha256:../../../etc/passwd"])
async def test_what_is_no_digest_is_refused_before_any_file_is_looked_at(artifacts: ArtifactStore, digest: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await read(artifacts, digest)
    assert caught.value.detail.field == "digest"


async def test_damaged_bytes_end_in_a_problem(artifacts: ArtifactStore, tmp_path: Path) -> None:
    await artifacts.put(DATA)
    path = tmp_path / "artifacts" / list_files(tmp_path)[0]
    path.write_bytes(DATA[:-1] + b"!")
    with pytest.raises(Internal, match="damaged") as caught:
        await read(artifacts, DIGEST)
    assert caught.value.reason is Reason.ARTIFACT_CORRUPT


async def test_what_is_staged_has_no_name_until_it_is_kept(artifacts: ArtifactStore) -> None:
    staged = await artifacts.stage(DATA)
    assert (staged.digest, await artifacts.has(DIGEST)) == (DIGEST, False)
    await artifacts.keep([staged])
    assert b"".join(await read(artifacts, DIGEST)) == DATA


async def test_what_is_staged_and_dropped_leaves_nothing(artifacts: ArtifactStore, tmp_path: Path) -> None:
    await artifacts.drop([await artifacts.stage(DATA)])
    assert list_files(tmp_path) == []


def raw_bytes(artifacts: ArtifactStore) -> RawBytes:
    tape = Tape()
    tape.start(None, "/Score", b"request")
    tape.add_response(None, b"response")
    return RawBytes(artifacts, tape)


def left_behind(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def test_a_tape_that_fills_after_its_comparison_is_not_written_away(
    artifacts: ArtifactStore, tmp_path: Path
) -> None:
    raw = raw_bytes(artifacts)
    await raw.close()
    raw.begin()
    await asyncio.sleep(0.05)
    assert left_behind(tmp_path) == []


async def test_who_is_cancelled_while_bytes_are_dropped_leaves_none(artifacts: ArtifactStore, tmp_path: Path) -> None:
    raw = raw_bytes(artifacts)
    raw.begin()
    closing = asyncio.create_task(raw.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait({closing})
    for _ in range(100):
        if not left_behind(tmp_path):
            break
        await asyncio.sleep(0.02)
    assert left_behind(tmp_path) == []


async def test_where_one_half_cannot_be_written_the_other_goes_too(
    artifacts: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = artifacts.stage

    async def fail_on_responses(data: bytes) -> Staged:
        if data.endswith(b"response"):
            raise Exhausted(Reason.STORAGE_FULL, "no room")
        return await stage(data)

    monkeypatch.setattr(artifacts, "stage", fail_on_responses)
    with pytest.raises(Exhausted):
        await raw_bytes(artifacts).keep()
    assert left_behind(tmp_path) == []


async def test_the_same_bytes_staged_twice_are_kept_once(artifacts: ArtifactStore, tmp_path: Path) -> None:
    staged = [await artifacts.stage(DATA), await artifacts.stage(DATA)]
    await artifacts.keep(staged)
    await artifacts.drop([await artifacts.stage(DATA)])
    assert list_files(tmp_path) == [f"sha256/{DIGEST[7:9]}/{DIGEST[7:]}"]


async def test_a_folder_that_a_backup_left_out_is_made_again(artifacts: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "artifacts" / "sha256" / DIGEST[7:9]).rmdir()
    await artifacts.prepare()
    assert await artifacts.put(DATA) == DIGEST


async def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    artifacts = ArtifactStore(str(tmp_path / "artifacts"), FullDisk())
    await artifacts.prepare()
    with pytest.raises(Exhausted, match="no room") as caught:
        await artifacts.put(DATA)
    assert (caught.value.reason, list_files(tmp_path)) == (Reason.STORAGE_FULL, [])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO, errno.ENOTDIR, errno.ENOENT])
async def test_where_artifacts_stand_is_told_to_the_log_and_to_no_caller(
    artifacts: ArtifactStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "artifacts" / "incoming" / "x"))

    with pytest.raises(Problem) as caught:
        await artifacts.run(fail)
    assert str(tmp_path) not in caught.value.detail.message
    assert str(tmp_path) in caplog.text


async def test_a_sweep_takes_what_it_is_told_to_and_no_more(artifacts: ArtifactStore, tmp_path: Path) -> None:
    await artifacts.put(b"orphan")
    await artifacts.put(DATA)
    (tmp_path / "artifacts" / "incoming" / "half").write_bytes(b"ha")
    (tmp_path / "artifacts" / "sha256" / "README").write_bytes(b"not ours")
    assert await artifacts.sweep(await artifacts.find_others({DIGEST})) == 2
    assert list_files(tmp_path) == ["sha256/README", f"sha256/{DIGEST[7:9]}/{DIGEST[7:]}"]


async def test_opening_a_store_sweeps_what_a_crash_left_and_keeps_what_runs_name(tmp_path: Path) -> None:
    store = await Store.open(tmp_path)
    await store.artifacts.put(b"orphan")
    request, response = await store.artifacts.put(b"request"), await store.artifacts.put(b"response")
    await store.add_run(make_record(raw_request_ref=request, raw_response_ref=response))
    await store.close()
    (tmp_path / "artifacts" / "incoming" / "half").write_bytes(b"ha")
    again = await Store.open(tmp_path)
    kept = [b"".join(await read(again.artifacts, digest)) for digest in (request, response)]
    await again.close()
    assert (kept, len(list_files(tmp_path))) == ([b"request", b"response"], 2)


def masked(digest: str) -> RollingQuestion:
    """A question whose mask names an array that was sent ahead."""
    variant = Variant(mask=MaskSpec(base=Array(artifact_digest=digest)))
    return RollingQuestion((Input(text="a b"),), variants=(variant,))


async def name_in_a_case(store: Store, digest: str) -> None:
    side = SideSpec("backend:a", masked(digest).variants[0])
    await store.create_case(make_case(left=side))


async def name_in_a_run(store: Store, digest: str) -> None:
    await store.add_run(make_record(run=make_run(question=masked(digest))))


async def name_in_the_debug_run(store: Store, digest: str) -> None:
    await store.add_run(make_record(token_debug=make_run(question=masked(digest))))


async def name_in_a_waiting_job(store: Store, digest: str) -> None:
    await store.start_job("request-1", work_to_text(RunPlan(masked(digest), SideSpec("backend:a"))))


async def name_in_an_ended_job(store: Store, digest: str) -> None:
    job, _ = await store.start_job("request-1", work_to_text(RunPlan(masked(digest), SideSpec("backend:a"))))
    await store.add_job_event(job.job_id, JobState.CANCELLED)


@pytest.mark.parametrize(
    ("name", "stays"),
    [
        (name_in_a_case, True),
        (name_in_a_run, True),
        (name_in_the_debug_run, True),
        (name_in_a_waiting_job, True),
        (name_in_an_ended_job, False),
    ],
)
async def test_an_artifact_stays_as_long_as_a_document_names_it(
    tmp_path: Path, name: Callable[[Store, str], Awaitable[None]], stays: bool
) -> None:
    store = await Store.open(tmp_path)
    await name(store, await store.artifacts.put(b"an array"))
    await store.artifacts.put(b"orphan")
    await store.close()
    await (await Store.open(tmp_path)).close()
    assert len(list_files(tmp_path)) == stays


async def test_another_file_system_of_fsspec_will_do() -> None:
    fsspec.filesystem("memory").store.clear()
    artifacts = ArtifactStore.at("memory://dualtrace-test")
    await artifacts.prepare()
    await artifacts.put(b"orphan")
    digest = await artifacts.put(DATA)
    swept = await artifacts.sweep(await artifacts.find_others({digest}))
    assert (b"".join(await read(artifacts, digest)), swept) == (DATA, 1)


async def test_callers_that_leave_while_bytes_are_written_leave_only_whole_artifacts(
    artifacts: ArtifactStore, tmp_path: Path
) -> None:
    puts = [asyncio.ensure_future(artifacts.put(DATA + bytes([number]))) for number in range(40)]
    for number, put in enumerate(puts):
        asyncio.get_running_loop().call_later(number * 0.001, put.cancel)
    await asyncio.gather(*puts, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_default_executor()  # threads cannot be cancelled: let them end
    named = [path for path in (tmp_path / "artifacts" / "sha256").rglob("*") if path.is_file()]
    assert [path.name for path in named if hashlib.sha256(path.read_bytes()).hexdigest() != path.name] == []
