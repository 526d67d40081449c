"""How long a sidecar with the real model takes from its start until it is ready, preflight included."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping

from benchmarks.sidecars import model_sidecar
from benchmarks.table import Missing, Row, spread

REPEATS = 3


def measure() -> list[Row]:
    rows: list[Row] = []
    for engine in ("torch", "jax"):
        target = "< 8 s" if engine == "torch" else ""
        with tempfile.TemporaryDirectory() as kept:
            caches = {"DUALTRACE_CACHE": f"{kept}/cache", "PYTHONPYCACHEPREFIX": f"{kept}/bytecode"}
            try:
                first, *again = [_seconds(engine, caches) for _ in range(1 + REPEATS)]
            except Missing as reason:
                rows.append(Row(f"start to ready, {engine}", "", "not measured", note=str(reason)))
                continue
        rows.append(Row(f"start to ready, {engine}", "135M, float32", spread(again, "s", 1), target))
        empty = "digests of weights, compiled programs, Python's own bytecode: made here and kept"
        rows.append(Row("  with empty caches", "", f"{first:.2f} s", note=empty))
    return rows


def _seconds(engine: str, caches: Mapping[str, str]) -> float:
    # Some images and installers keep no bytecode; then Python compiles all of torch and transformers at each start.
    with model_sidecar(engine, environment={**caches, "PYTHONDONTWRITEBYTECODE": ""}) as sidecar:
        return sidecar.ready_seconds
