"""Boolean arrays from outside: NPY files and JSON matrices, read without trusting a byte of them.

It knows the NPY format, shapes and limits. It must not know what an array will mask. numpy's own reader is not used:
it can unpickle, and it believes the header.
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dualtrace.masks.limits import DEFAULT_LIMITS, ArrayLimits
from dualtrace.problems import InvalidArgument, Reason

Bools = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.generic]

MAGIC = b"\x93NUMPY"
MAX_HEADER_BYTES = 4096  # a plain header is 118 bytes
RANKS = (2, 3, 4)

_ENTRY = re.compile(
    r"""\s*['"](?P<key>\w{1,32})['"]\s*:\s*(?P<value>'[^']{0,64}'|"[^"]{0,64}"|True|False|\([0-9, ]{0,80}\)|\[.*)\s*"""
)
_DESCR = re.compile(r"[<>|=]?(?P<kind>[biuf])(?P<size>[1248])\Z")


@dataclass(frozen=True, eq=False)
class BoolArray:
    """An immutable boolean array with an identity: two are equal when shape and content are."""

    values: Bools  # [Q,K], [H,Q,K] or [L,H,Q,K], C order, read-only

    def __post_init__(self) -> None:
        values = np.ascontiguousarray(self.values)
        if values.dtype != np.bool_:
            raise InvalidArgument(Reason.MALFORMED, f"a mask array must be boolean, got {values.dtype}")
        _require_shape(values.shape)
        if values is self.values and values.flags.writeable:
            values = values.copy()
        values.setflags(write=False)
        object.__setattr__(self, "values", values)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the shape, as "3,3\\n", and one byte 0 or 1 per entry in C order."""
        content = hashlib.sha256((",".join(map(str, self.shape)) + "\n").encode())
        content.update(self.values.view(np.uint8).tobytes())
        return "sha256:" + content.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BoolArray) and self.shape == other.shape and self.digest == other.digest

    def __hash__(self) -> int:
        return hash((self.shape, self.digest))

    def __repr__(self) -> str:
        return f"BoolArray(shape={self.shape}, digest={self.digest!r})"


@dataclass(frozen=True)
class ArrayReading:
    """An array that was read, and what had to be done to make it boolean ("" when nothing)."""

    content: BoolArray
    note: str = ""


def _refuse(message: str, reason: Reason = Reason.MALFORMED, allowed: str = "") -> InvalidArgument:
    return InvalidArgument(reason, message, allowed=allowed)


def _require_shape(shape: tuple[int, ...]) -> None:
    if len(shape) not in RANKS:
        raise _refuse(f"the array has {len(shape)} dimensions", allowed="[Q,K], [H,Q,K] or [L,H,Q,K]")
    if 0 in shape:
        raise _refuse(f"the array of shape {list(shape)} holds nothing", Reason.EMPTY)
    if shape[-1] != shape[-2]:
        raise _refuse(f"the array has {shape[-2]} rows and {shape[-1]} keys", allowed="as many rows as keys")


def read_npy(data: bytes, limits: ArrayLimits = DEFAULT_LIMITS) -> ArrayReading:
    """A boolean array from the bytes of an NPY file. Nothing is allocated before header and size have been checked."""
    if len(data) > limits.array_bytes:
        raise _refuse(f"the NPY file has {len(data)} bytes", Reason.MASK_TOO_LARGE, f"up to {limits.array_bytes} bytes")
    header, offset = _split_header(data)
    descr, shape = _parse_header(header)
    entries = 1
    for extent in shape:
        entries *= extent
    if entries > limits.array_entries:
        raise _refuse(
            f"shape {list(shape)} has {entries} entries", Reason.MASK_TOO_LARGE, f"up to {limits.array_entries}"
        )
    _require_shape(shape)
    dtype = np.dtype(descr)
    if len(data) - offset != entries * dtype.itemsize:
        raise _refuse(
            f"the header promises {entries * dtype.itemsize} bytes for shape {list(shape)} of {descr}; "
            f"{len(data) - offset} follow it"
        )
    if dtype == np.bool_:
        raw = np.frombuffer(data, np.uint8, offset=offset)
        if raw.max() > 1:
            raise _refuse("a boolean array must hold bytes 0 and 1 only")
        return ArrayReading(BoolArray(raw.astype(np.bool_).reshape(shape)))
    return _convert(np.frombuffer(data, dtype, offset=offset).reshape(shape))


def _split_header(data: bytes) -> tuple[str, int]:
    """The header's text and the offset of the data behind it."""
    if data[:6] != MAGIC or len(data) < 10:
        raise _refuse("not an NPY file: the magic bytes are missing")
    version = (data[6], data[7])
    if version == (1, 0):
        size, start = struct.unpack_from("<H", data, 8)[0], 10
    elif version in ((2, 0), (3, 0)) and len(data) >= 12:
        size, start = struct.unpack_from("<I", data, 8)[0], 12
    else:
        raise _refuse(f"NPY version {version[0]}.{version[1]} is not known", allowed="1.0, 2.0, 3.0")
    if size > MAX_HEADER_BYTES or start + size > len(data):
        raise _refuse(
            f"the NPY header says it has {size} bytes; the file has {len(data) - start} left",
            allowed=f"up to {MAX_HEADER_BYTES}",
        )
    try:
        return data[start : start + size].decode("ascii"), start + size
    except UnicodeDecodeError:
        raise _refuse("the NPY header is not plain ASCII") from None


def _parse_header(header: str) -> tuple[str, tuple[int, ...]]:
    """The element type and the shape. A regular expression, not an evaluator: the header is a stranger's text."""
    text = header.strip()
    if not (text.startswith("{") and text.endswith("}")):
        raise _refuse("the NPY header is not a dictionary")
    rest, found = text[1:-1].strip(), dict[str, str]()
    while rest:
        match = _ENTRY.match(rest)
        if match is None:
            raise _refuse("the NPY header cannot be parsed")
        key, value = match["key"], match["value"]
        if key in found or key not in ("descr", "fortran_order", "shape"):
            raise _refuse(f"the NPY header has an unexpected {key!r}")
        if value.startswith("["):
            raise _refuse("an array of records cannot be a mask", allowed="bool, or numbers 0/1 or 0/-inf")
        found[key] = value
        rest = rest[match.end() :]
        if rest and not rest.startswith(","):
            raise _refuse("the NPY header cannot be parsed")
        rest = rest[1:].strip()
    if len(found) != 3:
        raise _refuse("the NPY header lacks one of descr, fortran_order, shape")
    if found["fortran_order"] != "False":
        raise _refuse("the array is in Fortran order", allowed="C order: numpy.ascontiguousarray(array)")
    return _element_type(found["descr"]), _shape(found["shape"])


def _element_type(quoted: str) -> str:
    descr = quoted.strip("'\"")
    if "O" in descr:
        raise _refuse("the array holds pickled objects; they are never unpickled", allowed="bool")
    match = _DESCR.match(descr)
    sizes = {"b": "1", "f": "248", "i": "1248", "u": "1248"}
    if match is None or match["size"] not in sizes[match["kind"]]:
        raise _refuse(f"the element type {descr!r} cannot be a mask", allowed="bool, or numbers 0/1 or 0/-inf")
    return descr


def _shape(text: str) -> tuple[int, ...]:
    if not text.startswith("("):
        raise _refuse("the NPY header's shape is not a tuple")
    parts = [part.strip() for part in text[1:-1].split(",")]
    if parts and not parts[-1]:
        parts.pop()
    if not all(re.fullmatch(r"[0-9]{1,12}", part) for part in parts):
        raise _refuse("the NPY header's shape cannot be parsed")
    return tuple(int(part) for part in parts)


def _convert(values: Numbers) -> ArrayReading:
    """Numbers to booleans. What could mean two things is refused."""
    ones, zeros = values == 1, values == 0
    if values.dtype.kind == "f":
        cut = np.isneginf(values.astype(np.float64, copy=False))
        if bool((zeros | cut).all()):
            if not cut.any():
                raise _refuse(
                    "an all-zero float array could mean all cut (0/1) or none (0/-inf); send booleans", Reason.CONFLICT
                )
            return ArrayReading(BoolArray(zeros), f"converted from {values.dtype.name}: 0 = may see, -inf = cut")
    if not bool((zeros | ones).all()):
        raise _refuse(
            "the array holds numbers that are neither 0/1 nor 0/-inf; send booleans", allowed="bool, 0/1, or 0/-inf"
        )
    return ArrayReading(BoolArray(ones), f"converted from {values.dtype.name}: 1 = may see, 0 = cut")


def read_json_matrix(value: object, limits: ArrayLimits = DEFAULT_LIMITS) -> ArrayReading:
    """A boolean array from nested lists of true/false, or of 0/1."""
    shape: list[int] = []
    level: list[object] = [value]
    while level and isinstance(level[0], list):
        if len(shape) == max(RANKS):
            raise _refuse("the matrix is nested deeper than [L,H,Q,K]", Reason.NESTED_TOO_DEEP)
        extent, flat = len(level[0]), list[object]()
        if extent * len(level) > limits.array_entries:
            raise _refuse("the matrix is too large", Reason.MASK_TOO_LARGE, f"up to {limits.array_entries} entries")
        for row in level:
            if not isinstance(row, list) or len(row) != extent:
                raise _refuse("the rows of the matrix differ in length or depth")
            flat.extend(row)
        shape.append(extent)
        level = flat
    _require_shape(tuple(shape))
    kinds = {type(entry) for entry in level}
    if kinds == {bool}:
        return ArrayReading(BoolArray(np.array(level, np.bool_).reshape(shape)))
    if kinds == {int} and all(entry in (0, 1) for entry in level):
        content = BoolArray(np.array(level, np.bool_).reshape(shape))
        return ArrayReading(content, "converted from integers: 1 = may see, 0 = cut")
    raise _refuse("the matrix must hold true and false only, or 0 and 1 only", allowed="true, false; or 0, 1")


def npy_bytes(values: Bools) -> bytes:
    """The NPY file of a boolean array: version 1.0, C order, the same bytes for the same array."""
    shape = ", ".join(str(extent) for extent in values.shape)
    header = f"{{'descr': '|b1', 'fortran_order': False, 'shape': ({shape}), }}"
    padding = -(len(MAGIC) + 4 + len(header) + 1) % 64
    text = (header + " " * padding + "\n").encode("ascii")
    return MAGIC + b"\x01\x00" + struct.pack("<H", len(text)) + text + np.ascontiguousarray(values).tobytes()
