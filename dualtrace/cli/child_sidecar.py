"""Sidecars as child processes: started on free ports, waited for, and always ended, however the parent ends.

It knows the command line of `dualtrace serve`. It must not know what is asked of a sidecar.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dualtrace.cli.child_process import START_SECONDS, ChildProcess, end_all

READY = re.compile(r"listening on (\S+)")


@dataclass(frozen=True)
class ChildSpec:
    """What `dualtrace serve` is told."""

    engine: str
    model: Path | None  # None for the fake engine, which has none
    threads: int = 1
    dtype: str = ""  # "" is the engine's own
    device: str = ""
    adapters: tuple[tuple[str, Path], ...] = ()
    tokenizer: Path | None = None  # None: the model's own
    more: tuple[str, ...] = ()  # other flags of `dualtrace serve`

    def command(self) -> list[str]:
        own = [sys.executable, "-m", "dualtrace.cli", "serve", self.engine]
        own += ["--host", "127.0.0.1", "--port", "0", "--drain-seconds", "1", "--stop-with-stdin", "--no-warm-up"]
        own += ["--threads", str(self.threads)]
        for flag, value in (
            ("--model", self.model), ("--dtype", self.dtype), ("--device", self.device), ("--tokenizer", self.tokenizer)
        ):  # fmt: skip
            own += [flag, str(value)] if value else []
        for name, folder in self.adapters:
            own += ["--adapter", f"{name}={folder}"]
        return [*own, *self.more]


class ChildSidecar(ChildProcess):
    """One sidecar as a child."""

    def __init__(self, spec: ChildSpec) -> None:
        super().__init__(f"{spec.engine} sidecar", spec.command(), READY)
        self.spec = spec

    def await_ready(self, timeout_seconds: float = START_SECONDS) -> str:
        """Where it listens, HOST:PORT. The time counts from its start."""
        return self.match_ready(timeout_seconds)[1]


@contextmanager
def child_sidecars(specs: Sequence[ChildSpec]) -> Iterator[tuple[ChildSidecar, ...]]:
    """All started at once, none waited for; all ended with the block."""
    children: list[ChildSidecar] = []
    try:
        for spec in specs:
            children.append(ChildSidecar(spec))
        yield tuple(children)
    finally:
        end_all(children)


@contextmanager
def child_sidecar(model: Path, *, engine: str = "reference", timeout_seconds: float = START_SECONDS) -> Iterator[str]:
    """One sidecar over `model` for as long as the block lasts; gives its target."""
    with child_sidecars([ChildSpec(engine, model)]) as (child,):
        yield f"grpc://{child.await_ready(timeout_seconds)}"
