"""Rolling logprobs of whole texts, every row read: against the bare body and the head at all positions."""

from __future__ import annotations

from benchmarks import bare, shapes
from benchmarks.asking import Caller, caller
from benchmarks.quiet import rounds, tell_others
from benchmarks.sidecars import model_sidecar
from benchmarks.table import Missing, Row, ratio, spread

REPEATS = 7
TEXTS, TOKENS = 8, 128


def measure() -> list[Row]:
    rows: list[Row] = []
    for engine in ("torch", "jax"):
        try:
            with model_sidecar(engine) as sidecar, caller(sidecar.address) as ours:
                rows += _measure_engine(engine, ours)
        except Missing as reason:
            rows.append(Row(f"rolling, {engine}", f"{TEXTS} × {TOKENS}", "not measured", note=str(reason)))
    return rows


def _measure_engine(engine: str, ours: Caller) -> list[Row]:
    question = shapes.rolling(30, TEXTS, TOKENS)
    figures = rounds(
        {
            "ours": lambda: ours.ask(question).seconds,
            "limit": lambda: bare.body_seconds((TEXTS, TOKENS), head=True),
        },
        REPEATS,
        warm_up=2,
    )
    shape = f"{TEXTS} × {TOKENS}"
    note = f"{ours.ask(question).execution.computed_tokens} tokens computed; {tell_others(figures)}"
    return [
        Row(f"rolling, {engine}", shape, spread(figures["ours"]), note=note),
        Row("  bare body + head", shape, spread(figures["limit"])),
        Row("  time over limit", "", ratio(figures["ours"], figures["limit"]), "<= 1.10" if engine == "torch" else ""),
    ]
