"""Peak memory of a sidecar above its loaded model, while it scores at all positions."""

from __future__ import annotations

from benchmarks import shapes
from benchmarks.asking import caller
from benchmarks.sidecars import model_sidecar
from benchmarks.table import Missing, Row

SHAPES = ((4, 128, "<= 130 MB"), (4, 512, ""), (1, 2048, ""))


def measure() -> list[Row]:
    rows: list[Row] = []
    for engine in ("torch", "jax"):
        for texts, tokens, target in SHAPES:
            shape = f"{texts} × {tokens} scored"
            try:
                above, loaded = _peak_above_model(engine, texts, tokens)
            except Missing as reason:
                rows.append(Row(f"peak memory, {engine}", shape, "not measured", note=str(reason)))
                continue
            note = f"{loaded:.0f} MB resident when ready; a fresh process, its first call"
            aim = target if engine == "torch" else ""
            rows.append(Row(f"peak memory above the model, {engine}", shape, f"{above:.0f} MB", aim, note))
    return rows


def _peak_above_model(engine: str, texts: int, tokens: int) -> tuple[float, float]:
    with model_sidecar(engine) as sidecar, caller(sidecar.address) as ours:
        sidecar.forget_peak()
        loaded = sidecar.resident_megabytes()
        ours.ask(shapes.rolling(50, texts, tokens))
        return sidecar.peak_megabytes() - loaded, loaded
