"""The bounds of the mask language. It knows numbers and their reasons, and must not know how masks are made."""

from __future__ import annotations

from dataclasses import dataclass

INDEX_MAX = 2**31 - 1  # indices are int32 on the wire
VERSION = 1

MAX_EDGES = 4096
MAX_DEPTH = 16  # expressions inside expressions
MAX_NODES = 256  # expressions in one mask
MAX_LENGTH = 131_072  # rows of one sequence

# A toggle is one start or end of a run, eight bytes. Both bounds are there so that no mask can hang or eat the host.
MAX_TOGGLES = 24_000_000  # kept by one plan: 192 MB
MAX_WORK = 48_000_000  # toggles read and written while compiling: a few seconds
MAX_LEAK_WORK = 300_000_000  # runs and rows visited by the leak analysis: a few seconds

MAX_PICTURE_TOKENS = 256  # a picture of more tokens needs an explicit opt-in


@dataclass(frozen=True)
class ArrayLimits:
    """What a server accepts as array content. A sidecar may lower these; it names them in its limits."""

    array_bytes: int = 64 * 1024 * 1024  # one NPY file, header included
    array_entries: int = 64 * 1024 * 1024  # booleans after conversion
    inline_bytes: int = 1024 * 1024  # an NPY file inside a JSON mask, before base64
    json_bytes: int = 8 * 1024 * 1024  # the whole JSON text of a mask


DEFAULT_LIMITS = ArrayLimits()
