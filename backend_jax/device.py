"""The process side of JAX: threads of the CPU client, the rules under which functions are traced, the compile cache.

It knows what can be set only before the client starts. It must not know models.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from dualtrace.problems import FailedPrecondition, InvalidArgument, Reason, Unsupported

PRECISION = "highest"  # of float32 matrix products; accelerators would otherwise round their inputs

_starting = threading.Lock()
_started_with: int | None = None  # threads that this module started the CPU client with


@contextmanager
def house_rules() -> Iterator[None]:
    """How every function of this backend is traced and called, without touching the process's own JAX settings.

    64-bit types exist, so that sums over the vocabulary can be float64 in a float32 model; nothing is promoted
    silently, so none of it spreads.
    """
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.default_matmul_precision(PRECISION),
    ):
        yield


def start_client(device: str, threads: int) -> jax.Device:
    """The device. The CPU client reads its number of threads from NPROC when it starts, once in a process."""
    if threads < 1:
        raise InvalidArgument(
            Reason.OUT_OF_RANGE, f"{threads} threads asked; at least 1", field="threads", allowed="1 or more"
        )
    kind, _, index = (device or "cpu").partition(":")
    number = int(index) if index.isdecimal() else 0
    if kind not in {"cpu", "gpu", "cuda", "tpu"} or (index and not index.isdecimal()):
        raise InvalidArgument(
            Reason.OUT_OF_RANGE, f"device {device!r} asked", field="device", allowed="cpu, gpu, cuda:0, tpu"
        )
    with _starting:
        _set_threads(threads)
        try:
            found = jax.devices(kind)
        except RuntimeError as error:
            raise Unsupported(
                Reason.MODEL_UNSUPPORTED, f"device {device!r} asked; JAX finds none here: {error}", field="device"
            ) from error
    if number >= len(found):
        message = f"device {device!r} asked; JAX finds {len(found)} of the kind {kind}"
        raise Unsupported(Reason.MODEL_UNSUPPORTED, message, field="device", allowed=f"{kind}:0-{len(found) - 1}")
    return found[number]


def _set_threads(threads: int) -> None:
    global _started_with
    if _started_with is None and not _client_runs():
        before = os.environ.get("NPROC")
        os.environ["NPROC"] = str(threads)
        try:
            jax.devices("cpu")
        finally:
            if before is None:
                del os.environ["NPROC"]
            else:
                os.environ["NPROC"] = before
        _started_with = threads
    if _started_with != threads:
        has = "an unknown number of" if _started_with is None else _started_with
        raise FailedPrecondition(
            Reason.CONFLICT,
            f"{threads} threads asked, but JAX already runs in this process with {has} threads, which it cannot "
            "change; ask for the same number, or use a process of its own",
            field="threads",
        )


def _client_runs() -> bool:
    from jax._src import xla_bridge  # no public name says whether asking for devices would start the client

    return bool(xla_bridge.backends_are_initialized())


def keep_compiled(folder: Path) -> None:
    """Keep every compiled function in `folder`, for the next process; a folder that the user chose is left alone."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder.mkdir(parents=True, exist_ok=True)
        update: Callable[[str, object], None] = jax.config.update  # it has no types of its own
        update("jax_compilation_cache_dir", str(folder))
        update("jax_persistent_cache_min_compile_time_secs", 0.0)
        update("jax_persistent_cache_min_entry_size_bytes", -1)
