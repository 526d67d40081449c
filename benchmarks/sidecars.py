"""Sidecars as processes of their own, and the real model they serve.

It knows the command line and the kernel's account of a process. It must not know what is asked.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.table import Missing
from dualtrace.models.cache import cache_directory

THREADS = 2
MODEL = "smollm2-135m-q4_1-f32"


@dataclass(frozen=True)
class Sidecar:
    address: str
    pid: int
    ready_seconds: float  # from its start until it said that it listens, model checked

    def resident_megabytes(self) -> float:
        return self._status("VmRSS")

    def peak_megabytes(self) -> float:
        return self._status("VmHWM")

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def _status(self, name: str) -> float:
        return int(Path(f"/proc/{self.pid}/status").read_text().split(f"{name}:")[1].split()[0]) * 1024 / 1e6


@contextmanager
def sidecar(*arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[Sidecar]:
    """A sidecar process on a free port. Always ended; one that cannot be had is `Missing`, with its own words."""
    command = [sys.executable, "-m", "dualtrace.cli", "serve", *arguments, "--port", "0", "--stop-with-stdin"]
    with tempfile.TemporaryFile("w+") as talk:
        begun = time.perf_counter()
        # Its stdin closes with this process, however that ends: no sidecar is left behind.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=talk,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("listening on "):
                    yield Sidecar(line.split()[-1], process.pid, time.perf_counter() - begun)
                    break
            else:
                process.wait(30)
                talk.seek(0)
                raise Missing(f"`serve {arguments[0]}` ended: {talk.read().strip().splitlines()[-1:]}")
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def model_sidecar(engine: str, *more: str, environment: Mapping[str, str] | None = None) -> Iterator[Sidecar]:
    """The real model behind an engine."""
    arguments = (engine, "--model", str(model_folder()), "--threads", str(THREADS), *more)
    with sidecar(*arguments, environment=environment) as started:
        yield started


def model_folder() -> Path:
    folder = cache_directory() / "models" / MODEL
    if not folder.is_dir():
        raise Missing("the real model is not here; `dualtrace model fetch smollm2` fetches it")
    return folder
