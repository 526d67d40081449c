"""Bytes named by their SHA-256: the very requests and responses that were sent and received.

What has a name is whole: bytes are written under another one, synced, and then renamed. Any fsspec file system will
do; a local folder is the default. It must not know what the bytes mean or who refers to them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import fsspec  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

from coordinator.disk_errors import explain_os_error
from dualtrace.artifacts import digest_of
from dualtrace.problems import Internal, InvalidArgument, NotFound, Reason

PART_BYTES = 256 << 10
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_INCOMING = "incoming"
_KEPT = "sha256"

T = TypeVar("T")


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
        """Make the folders."""
        for name in (_INCOMING, _KEPT):
            await self.run(self._files.makedirs, f"{self._root}/{name}", exist_ok=True)

    async def put(self, data: bytes) -> str:
        """Keep the bytes and return their digest. The same bytes are kept once."""
        digest = await asyncio.to_thread(digest_of, data)
        if await self.has(digest):
            return digest
        async with self.writer() as writer:
            await writer.write(data)
            return await writer.finish()

    def writer(self) -> ArtifactWriter:
        """For what comes in parts. Leaving it without `finish` leaves nothing."""
        return ArtifactWriter(self, f"{self._root}/{_INCOMING}/{secrets.token_hex(16)}")

    async def has(self, digest: str) -> bool:
        return bool(await self.run(self._files.exists, self.path_of(digest)))

    async def read(self, digest: str) -> AsyncIterator[bytes]:
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

    async def sweep(self, wanted: Collection[str]) -> int:
        """Remove what a crash left: unfinished bytes, and whole ones that nothing refers to. How many went."""
        return await self.run(self._sweep, wanted)

    def _sweep(self, wanted: Collection[str]) -> int:
        left = [str(path) for path in self._files.find(f"{self._root}/{_INCOMING}")]
        for path in self._files.find(f"{self._root}/{_KEPT}"):
            name = f"sha256:{str(path).rpartition('/')[2]}"
            if _DIGEST.fullmatch(name) and name not in wanted:  # a file that is not ours is left alone
                left.append(str(path))
        for path in left:
            self._files.rm_file(path)
        return len(left)

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
            raise NotFound(Reason.NOT_FOUND, f"there is no {error.filename}") from error
        except OSError as error:
            raise explain_os_error(error, self._root) from error

    def open_new(self, path: str) -> Any:
        return self._files.open(path, "wb")

    def remove(self, path: str) -> None:
        """Harmless when it is gone: a caller that left may have named it in the same moment."""
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(path)

    def keep(self, file: Any, incoming: str, digest: str) -> None:
        """Sync the bytes, give them their name, sync the name."""
        file.flush()
        if self.is_local:
            os.fsync(file.fileno())
        file.close()
        kept = Path(self.path_of(digest))
        if not self.is_local:
            # An object store shows a file when it is whole, and keeps what it has shown.
            self._files.mv(incoming, str(kept))
            return
        new_folder = not kept.parent.is_dir()
        kept.parent.mkdir(exist_ok=True)
        os.replace(incoming, kept)
        _sync_folder(kept.parent)
        if new_folder:
            _sync_folder(kept.parent.parent)


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
        digest = f"sha256:{self._hasher.hexdigest()}"
        await self._store.run(self._store.keep, self._file, self._incoming, digest)
        self._file = None
        return digest

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
