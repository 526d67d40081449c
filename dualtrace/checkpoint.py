"""A model directory, opened safely: `config.json` and the tensors of its safetensors files, memory-mapped.

It knows bytes, shapes and dtypes. It must not know model families, engines or frameworks. Every byte of a checkpoint
may come from a stranger, so a safetensors header is checked against the file before one of its offsets is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from dualtrace.problems import InvalidArgument, NotFound, Problem, Reason, Unsupported

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_JSON_BYTES = 64 * 1024 * 1024  # config.json and the shard index are a few hundred KB at most
DIGEST_BLOCK_BYTES = 4 * 1024 * 1024
CACHED_FROM_BYTES = 64 * 1024 * 1024  # below this, hashing is faster than looking a digest up is worth
SETTLED_SECONDS = 2.0  # a file younger than this may change again within one tick of its time stamp

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip

Bytes = npt.NDArray[np.uint8]
Float = TypeVar("Float", np.float32, np.float64)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: what it is and where its bytes lie."""

    name: str
    dtype: str  # the safetensors name: "F32", "BF16", ...
    shape: tuple[int, ...]
    file: Path
    start: int  # byte offset in the file
    stop: int


class Checkpoint:
    """A directory's config and tensors. Values handed out may be views of the mapped files: do not write to them."""

    def __init__(self, directory: Path, config: dict[str, Any], tensors: Mapping[str, TensorEntry]) -> None:
        self.directory = directory
        self.config = config
        self.tensors = dict(sorted(tensors.items()))
        self._mapped: dict[Path, Bytes] = {}

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted({entry.file for entry in self.tensors.values()}))

    def raw(self, name: str) -> Bytes:
        """The bytes of a tensor as a read-only view of the mapped file, [bytes] uint8."""
        entry = self._entry(name)
        if entry.start == entry.stop:
            return np.empty(0, np.uint8)
        if entry.file not in self._mapped:
            self._mapped[entry.file] = np.memmap(entry.file, dtype=np.uint8, mode="r")
        return self._mapped[entry.file][entry.start : entry.stop]

    def values(self, name: str, dtype: type[Float]) -> npt.NDArray[Float]:
        """A float tensor in float32 or float64. F16, BF16 and F32 are upcast exactly; F64 to float32 is refused."""
        entry = self._entry(name)
        wide = _as_float(self.raw(name), entry)
        if wide.dtype.itemsize > np.dtype(dtype).itemsize:
            raise Unsupported(
                Reason.MODEL_UNSUPPORTED,
                f"tensor {name!r} is {entry.dtype}, which {np.dtype(dtype)} cannot hold exactly; ask for float64.",
            )
        return wide.astype(dtype, copy=False).reshape(entry.shape)

    def close(self) -> None:
        """Let go of the mapped files (the memory goes when the last view of it does)."""
        self._mapped.clear()

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.tensors:
            raise InvalidArgument(Reason.MODEL_INVALID, f"{self.directory} has no tensor {name!r}.")
        return self.tensors[name]


def open_checkpoint(directory: Path) -> Checkpoint:
    """Open a model directory. Nothing is read but `config.json`, the shard index and the safetensors headers."""
    if not directory.is_dir():
        raise NotFound(Reason.NOT_FOUND, f"{directory} is not a directory; give the folder that holds config.json.")
    config = _read_json_object(directory / "config.json", "a model directory needs its config.json")
    tensors: dict[str, TensorEntry] = {}
    for file, expected in _weight_files(directory).items():
        found = read_safetensors_header(file)
        if expected is not None and set(found) != expected:
            odd = sorted(set(found) ^ expected)
            _refuse(file, f"does not hold the tensors that the index assigns to it; first difference: {odd[0]!r}")
        if twice := sorted(set(found) & set(tensors)):
            _refuse(file, f"repeats tensor {twice[0]!r} of {tensors[twice[0]].file.name}")
        tensors.update(found)
    return Checkpoint(directory, config, tensors)


def read_safetensors_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, every offset checked against the file's size and against each other."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                _refuse(file, f"is truncated or no safetensors file: {size} bytes, a header of {length} announced")
            header = _parse_json(stream.read(length), file)
    except OSError as error:
        _refuse(file, f"cannot be read: {error.strerror}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(file, "has a __metadata__ that is not a map of strings")
    entries = [_header_entry(file, name, fields, 8 + length, size) for name, fields in header.items()]
    _check_layout(file, entries, 8 + length, size)
    return {entry.name: entry for entry in entries}


def weights_digest(checkpoint: Checkpoint, cache: Path | None = None) -> str:
    """SHA-256 over the tensors sorted by name, each as [name, dtype, shape, SHA-256 of its bytes] in compact JSON.

    With `cache` (the user's cache folder) the digest of large weights is kept there and found again while no file's
    size or time stamps changed. A cache that cannot be read or written only costs time, so it is never an error.
    """
    large = sum(entry.stop - entry.start for entry in checkpoint.tensors.values()) >= CACHED_FROM_BYTES
    if cache is None or not large:
        return _hash_weights(checkpoint)
    state = _file_states(checkpoint)
    place = cache / "digests" / (hashlib.sha256(os.fsencode(checkpoint.directory.resolve())).hexdigest() + ".json")
    if (known := _recall_digest(place, state)) is not None:
        return known
    digest = _hash_weights(checkpoint)
    newest_ns = max(max(file[2], file[3]) for file in state)
    if state == _file_states(checkpoint) and time.time_ns() - newest_ns > SETTLED_SECONDS * 1e9:
        _keep_digest(place, state, digest)
    return digest


FileState = tuple[str, int, int, int]  # (name, bytes, mtime_ns, ctime_ns)


def _file_states(checkpoint: Checkpoint) -> list[FileState]:
    stats = [(file.name, file.stat()) for file in checkpoint.files]
    return [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]


def _recall_digest(place: Path, state: list[FileState]) -> str | None:
    with suppress(OSError, ValueError):
        kept = json.loads(place.read_text())
        if isinstance(kept, dict) and kept.get("files") == [list(file) for file in state]:
            digest = kept.get("weights_digest")
            if isinstance(digest, str) and digest.startswith("sha256:") and len(digest) == 71:
                return digest
    return None


def _keep_digest(place: Path, state: list[FileState], digest: str) -> None:
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=".digest-")
        try:
            with os.fdopen(handle, "w") as stream:
                json.dump({"files": state, "weights_digest": digest}, stream)
            os.replace(temporary, place)
        except BaseException:
            os.unlink(temporary)
            raise


def _hash_weights(checkpoint: Checkpoint) -> str:
    rows = [
        [name, entry.dtype, list(entry.shape), _hash_bytes(checkpoint.raw(name))]
        for name, entry in checkpoint.tensors.items()
    ]
    return "sha256:" + hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def _hash_bytes(raw: Bytes) -> str:
    digest = hashlib.sha256()
    for start in range(0, raw.size, DIGEST_BLOCK_BYTES):
        digest.update(raw[start : start + DIGEST_BLOCK_BYTES].data)
    return digest.hexdigest()


def _as_float(raw: Bytes, entry: TensorEntry) -> npt.NDArray[np.floating[Any]]:
    if entry.dtype == "BF16":  # bfloat16 is the upper half of a float32
        halves = np.frombuffer(raw, dtype="<u2").astype(np.uint32)
        return (halves << np.uint32(16)).view(np.float32)
    codes = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
    if entry.dtype not in codes:
        raise Unsupported(
            Reason.MODEL_UNSUPPORTED,
            f"tensor {entry.name!r} is {entry.dtype}; weights must be F64, F32, F16 or BF16. "
            "Quantised checkpoints have to be dequantised first.",
        )
    return np.frombuffer(raw, dtype=codes[entry.dtype])


def _weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of a directory, with the names each must hold where an index says so."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists() and index.exists():
        _refuse(directory, "holds both model.safetensors and a shard index; keep the one that is meant")
    if single.exists():
        return {single: None}
    if index.exists():
        return dict(_read_index(index))
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        _refuse(
            directory,
            f"holds pickle weights only ({pickles[0]}); loading a pickle can run any code it contains, so it is never "
            "opened. Save the model as safetensors (save_pretrained of a current transformers does) and use that",
        )
    return _refuse(directory, "holds neither model.safetensors nor model.safetensors.index.json")


def _read_index(index: Path) -> Iterator[tuple[Path, set[str]]]:
    assigned = _read_json_object(index, "").get("weight_map")
    if not isinstance(assigned, dict) or not assigned:
        _refuse(index, "has no weight_map")
    shards: dict[str, set[str]] = {}
    for name, shard in assigned.items():
        plain = isinstance(shard, str) and shard == Path(shard).name and shard.endswith(".safetensors")
        if not plain or "\\" in shard or "\0" in shard:
            _refuse(index, f"maps {name!r} to {shard!r}, which is not the plain name of a .safetensors file")
        shards.setdefault(shard, set()).add(name)
    for shard, names in sorted(shards.items()):
        if not (index.parent / shard).is_file():
            _refuse(index, f"names the shard {shard}, which is missing")
        yield index.parent / shard, names


def _header_entry(file: Path, name: str, fields: object, data_start: int, size: int) -> TensorEntry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        _refuse(file, f"describes tensor {name!r} by something else than dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        _refuse(file, f"gives tensor {name!r} the unknown dtype {dtype!r}; known: {', '.join(DTYPE_BYTES)}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        _refuse(file, f"gives tensor {name!r} a shape or offsets that are not lists of counts")
    start, stop = data_start + offsets[0], data_start + offsets[1]
    if not data_start <= start <= stop <= size:
        _refuse(file, f"is truncated or wrong: tensor {name!r} would end at byte {stop}, the file has {size}")
    if math.prod(shape) * DTYPE_BYTES[dtype] != stop - start:
        _refuse(file, f"gives tensor {name!r} ({dtype} {shape}) {stop - start} bytes, which is not its size")
    return TensorEntry(name, dtype, tuple(shape), file, start, stop)


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and len(values) <= 32 and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_layout(file: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    """The tensors must tile the data part exactly: no overlap, no hole, nothing after the last one."""
    at = data_start
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.stop)):
        if entry.start != at:
            _refuse(file, f"has {'an overlap' if entry.start < at else 'a hole'} before tensor {entry.name!r}")
        at = entry.stop
    if at != size:
        _refuse(file, f"holds {size - at} bytes after its last tensor")


def _read_json_object(file: Path, need: str) -> dict[str, Any]:
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            _refuse(file, f"is larger than {MAX_JSON_BYTES} bytes")
        return _parse_json(file.read_bytes(), file)
    except OSError as error:
        _refuse(file, f"cannot be read: {error.strerror}" + (f"; {need}" if need else ""))


def _parse_json(raw: bytes, file: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) != len(pairs):
            [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
            _refuse(file, f"repeats the name {twice!r}")
        return names

    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        _refuse(file, f"is not valid JSON ({str(error)[:120]})")
    if not isinstance(parsed, dict):
        _refuse(file, "is JSON but not an object")
    return parsed


def _refuse(path: Path, complaint: str) -> NoReturn:
    problem: Problem = InvalidArgument(Reason.MODEL_INVALID, f"{path} {complaint}.")
    raise problem
