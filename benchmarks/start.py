"""How long a sidecar with the real model takes from its start until it is ready, preflight included."""

from __future__ import annotations

import tempfile

from benchmarks.sidecars import model_sidecar
from benchmarks.table import Missing, Row, spread

REPEATS = 3


def measure() -> list[Row]:
    rows: list[Row] = []
    for engine in ("torch", "jax"):
        target = "< 8 s" if engine == "torch" else ""
        try:
            again = [_seconds(engine, None) for _ in range(REPEATS)]
            with tempfile.TemporaryDirectory() as cache:
                first = _seconds(engine, cache)
        except Missing as reason:
            rows.append(Row(f"start to ready, {engine}", "", "not measured", note=str(reason)))
            continue
        rows.append(Row(f"start to ready, {engine}", "135M, float32", spread(again, "s", 1), target))
        rows.append(Row("  with an empty cache", "", f"{first:.2f} s", note="digests of weights, compiled programs"))
    return rows


def _seconds(engine: str, cache: str | None) -> float:
    environment = {} if cache is None else {"DUALTRACE_CACHE": cache}
    with model_sidecar(engine, environment=environment) as sidecar:
        return sidecar.ready_seconds
