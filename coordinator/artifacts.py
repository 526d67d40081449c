"""Bytes named by their SHA-256: the very requests and responses that were sent and received.

What has a name is whole: bytes are written under another one, synced, and then renamed. Any fsspec file system will
do; a local folder is the default. It must not know what the bytes mean or who refers to them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import secrets
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import fsspec  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

from coordinator.disk_errors import tell_os_error
from dualtrace.artifacts import digest_of
from dualtrace.problems import Internal, InvalidArgument, NotFound, Reason

log = logging.getLogger(__name__)

PART_BYTES = 256 << 10
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_INCOMING = "incoming"
_KEPT = "sha256"
_SHARDS = frozenset(f"{number:02x}" for number in range(256))

T = TypeVar("T")


@dataclass(frozen=True)
class Staged:
    """Bytes that are safe on the disk and have no name yet. `keep` names them, `drop` takes them away."""

    digest: str
    incoming: str  # path; "" where the same bytes are kept already


class ArtifactStore:
    """Artifacts below one folder of one file system. Everything that waits does so in a thread."""

    def __init__(self, root: str, file_system: Any = None) -> None:
        self._files = LocalFileSystem() if file_system is None else file_system
        self._root = root.rstrip("/")

    @classmethod
    def at(cls, location: str) -> ArtifactStore:
        """By fsspec's way of writing a place: a path, "s3://bucket/folder", "memory://x"."""
        file_system, root = fsspec.core.url_to_fs(location)
        return cls(root, file_system)

    @property
    def is_local(self) -> bool:
        return isinstance(self._files, LocalFileSystem)

    async def prepare(self) -> None:
        """Make the folders, all of them now: one that is made later would have to be synced while somebody waits."""
        await self.run(self._prepare)

    def _prepare(self) -> None:
        for name in (_INCOMING, _KEPT):
            self._files.makedirs(f"{self._root}/{name}", exist_ok=True)
        if self.is_local:
            kept = Path(self._root) / _KEPT
            for shard in _SHARDS - {path.name for path in kept.iterdir()}:
                (kept / shard).mkdir(exist_ok=True)
            _sync_folder(kept)

    async def put(self, data: bytes) -> str:
        """Keep the bytes and return their digest. The same bytes are kept once."""
        return await self.run(self._put, data)

    def _put(self, data: bytes) -> str:
        staged = self._stage(data)
        self._keep([staged])
        return staged.digest

    async def stage(self, data: bytes) -> Staged:
        """Write the bytes and sync them: most of what `put` does, while it is not yet known whether they are kept."""
        return await self.run(self._stage, data)

    async def keep(self, staged: Sequence[Staged]) -> None:
        """Name what was staged. From now on it can be read, and survives whatever happens."""
        await self.run(self._keep, staged)

    async def drop(self, staged: Sequence[Staged]) -> None:
        """Take away what was staged and not kept."""
        for one in staged:
            if one.incoming:
                await self.run(self.remove, one.incoming)

    def _stage(self, data: bytes) -> Staged:
        digest = digest_of(data)
        if self._files.exists(self.path_of(digest)):
            return Staged(digest, "")
        staged = Staged(digest, f"{self._root}/{_INCOMING}/{secrets.token_hex(16)}")
        try:
            with contextlib.closing(self.open_new(staged.incoming)) as file:
                file.write(data)
                self.sync(file)
        except BaseException:
            self.remove(staged.incoming)
            raise
        return staged

    def _keep(self, staged: Sequence[Staged]) -> None:
        for one in staged:
            if one.incoming:
                self._rename(one.incoming, self.path_of(one.digest))
        if self.is_local:
            # Also of bytes that were there: whoever named them may not have come to this yet.
            for folder in {Path(self.path_of(one.digest)).parent for one in staged}:
                _sync_folder(folder)

    def writer(self) -> ArtifactWriter:
        """For what comes in parts. Leaving it without `finish` leaves nothing."""
        return ArtifactWriter(self, f"{self._root}/{_INCOMING}/{secrets.token_hex(16)}")

    async def has(self, digest: str) -> bool:
        return bool(await self.run(self._files.exists, self.path_of(digest)))

    async def read(self, digest: str) -> AsyncGenerator[bytes, None]:
        """The bytes in parts. Bytes that no longer have their digest end in a Problem, after the last part."""
        path = self.path_of(digest)
        try:
            file = await self.run(self._files.open, path, "rb")
        except NotFound:
            message = f"there is no artifact {digest}; a stored run names those that there are"
            raise NotFound(Reason.NOT_FOUND, message, field="digest") from None
        hasher = hashlib.sha256()
        try:
            while part := await self.run(file.read, PART_BYTES):
                hasher.update(part)  # 256 KiB: a fifth of a millisecond
                yield part
        finally:
            await asyncio.to_thread(file.close)
        if f"sha256:{hasher.hexdigest()}" != digest:
            message = f"the bytes kept as {digest} have another digest: the file was damaged; restore it from a backup"
            raise Internal(Reason.ARTIFACT_CORRUPT, message, field="digest")

    async def find_others(self, known: Collection[str]) -> frozenset[str]:
        """The digests that are kept here beside these."""
        return await self.run(lambda: frozenset(self._list_kept()) - frozenset(known))

    async def sweep(self, unwanted: Collection[str]) -> int:
        """Remove what a crash left: unfinished bytes, and these whole ones. How many went."""
        return await self.run(self._sweep, unwanted)

    def _sweep(self, unwanted: Collection[str]) -> int:
        left = [str(path) for path in self._files.find(f"{self._root}/{_INCOMING}")]
        left += [self.path_of(digest) for digest in unwanted]
        for path in left:
            self.remove(path)
        return len(left)

    def _list_kept(self) -> list[str]:
        """A file that is not ours is none of it."""
        names = (f"sha256:{str(path).rpartition('/')[2]}" for path in self._files.find(f"{self._root}/{_KEPT}"))
        return [name for name in names if _DIGEST.fullmatch(name)]

    def path_of(self, digest: str) -> str:
        match = _DIGEST.fullmatch(digest)
        if match is None:
            message = f"{digest!r:.80} is no digest; one is sha256: and 64 hexadecimal digits in lower case"
            raise InvalidArgument(Reason.MALFORMED, message, field="digest", allowed=_DIGEST.pattern)
        return f"{self._root}/{_KEPT}/{match[1][:2]}/{match[1]}"

    async def run(self, work: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Run what waits in a thread; its failures become Problems."""
        try:
            return await asyncio.to_thread(work, *arguments, **options)
        except FileNotFoundError as error:
            log.warning("there is no %s", error.filename)
            raise NotFound(Reason.NOT_FOUND, "a file of the data folder is not there; the log names it") from error
        except OSError as error:
            raise tell_os_error(error, self._root) from error

    def open_new(self, path: str) -> Any:
        return self._files.open(path, "wb")

    def remove(self, path: str) -> None:
        """Harmless when it is gone: a caller that left may have named it in the same moment."""
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(path)

    def sync(self, file: Any) -> None:
        """An object store keeps what it shows, and shows a file when it is closed."""
        file.flush()
        if self.is_local:
            os.fsync(file.fileno())

    def finish(self, file: Any, staged: Staged) -> None:
        """Sync what was written in parts, close it, keep it."""
        self.sync(file)
        file.close()
        self._keep([staged])

    def _rename(self, incoming: str, kept: str) -> None:
        if self.is_local:
            os.replace(incoming, kept)
        else:
            self._files.mv(incoming, kept)


class ArtifactWriter:
    """Takes bytes in parts: `async with store.writer() as w: await w.write(...); digest = await w.finish()`."""

    def __init__(self, store: ArtifactStore, incoming: str) -> None:
        self._store, self._incoming = store, incoming
        self._hasher = hashlib.sha256()
        self._file: Any = None

    async def __aenter__(self) -> ArtifactWriter:
        self._file = await self._store.run(self._store.open_new, self._incoming)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            await self._store.run(self._discard, self._file)

    async def write(self, data: bytes) -> None:
        await self._store.run(self._write, data)

    async def finish(self) -> str:
        """The digest, under which the bytes can be read from now on."""
        staged = Staged(f"sha256:{self._hasher.hexdigest()}", self._incoming)
        await self._store.run(self._store.finish, self._file, staged)
        self._file = None
        return staged.digest

    def _write(self, data: bytes) -> None:
        self._hasher.update(data)
        self._file.write(data)

    def _discard(self, file: Any) -> None:
        try:
            file.close()
        finally:
            self._store.remove(self._incoming)


def _sync_folder(folder: Path) -> None:
    """A rename is safe from a power cut only when the folder has been synced too."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
