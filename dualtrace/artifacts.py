"""Large inputs sent ahead and named by digest: a bounded store in memory, the least recently used goes first.

It knows bytes, digests and mask arrays. It must not know the wire or who sent them.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

from dualtrace.masks.arrays import BoolArray, read_npy
from dualtrace.problems import InvalidArgument, NotFound, Reason

DEFAULT_STORE_BYTES = 256 << 20
MAX_ARTIFACT_BYTES = 64 << 20
PART_BYTES = 1 << 20


class ArtifactStore:
    """Thread-safe: calls put while planning threads fetch."""

    def __init__(self, store_bytes: int = DEFAULT_STORE_BYTES) -> None:
        self._store_bytes = store_bytes
        self._held = 0
        self._arrays: OrderedDict[str, BoolArray] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, data: bytes, digest: str) -> int:
        """Keep an NPY array, checked now so that nothing broken is kept. Returns its size in bytes."""
        actual = digest_of(data)
        if actual != digest:
            message = f"the bytes have digest {actual}, not {digest} as announced; send them again"
            raise InvalidArgument(Reason.ARTIFACT_CORRUPT, message, field="digest")
        array = read_npy(data).content
        size = int(array.values.nbytes)
        if size > self._store_bytes:
            message = f"the array has {size} bytes; this server keeps {self._store_bytes} in all"
            raise InvalidArgument(Reason.MASK_TOO_LARGE, message, allowed=f"up to {self._store_bytes} bytes")
        with self._lock:
            if digest in self._arrays:
                self._arrays.move_to_end(digest)
                return len(data)
            while self._held + size > self._store_bytes:
                _oldest, dropped = self._arrays.popitem(last=False)
                self._held -= int(dropped.values.nbytes)
            self._arrays[digest] = array
            self._held += size
        return len(data)

    def fetch(self, digest: str) -> BoolArray:
        with self._lock:
            if digest not in self._arrays:
                message = f"no artifact {digest} here (any more); send it with PutArtifact and ask again"
                raise NotFound(Reason.NOT_FOUND, message, field="artifact_digest")
            self._arrays.move_to_end(digest)
            return self._arrays[digest]


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
