"""JAX beside torch where nearly all is the body: one row of each prompt is read."""

from __future__ import annotations

from benchmarks import bare, shapes
from benchmarks.asking import Caller, caller
from benchmarks.quiet import rounds, tell_others
from benchmarks.sidecars import model_sidecar
from benchmarks.table import Row, ratio, spread

REPEATS = 7
SHAPES = ((8, 128, "<= 1.15"), (1, 512, "<= 1.25"))


def measure() -> list[Row]:
    with (
        model_sidecar("torch") as left,
        model_sidecar("jax") as right,
        caller(left.address) as torch,
        caller(right.address) as jax,
    ):
        return [row for shape in SHAPES for row in _measure_shape(torch, jax, *shape)]


def _measure_shape(torch: Caller, jax: Caller, prompts: int, tokens: int, target: str) -> list[Row]:
    question = shapes.next_token(60, prompts, tokens)
    figures = rounds(
        {
            "torch": lambda: torch.seconds(question),
            "jax": lambda: jax.seconds(question),
            "body": lambda: bare.body_seconds((prompts, tokens)),
        },
        REPEATS,
        warm_up=2,
    )
    shape = f"{prompts} × {tokens}, one row read of each"
    return [
        Row("next token, torch", shape, spread(figures["torch"]), note=f"bare body {spread(figures['body'])}"),
        Row("next token, jax", shape, spread(figures["jax"]), note=tell_others(figures)),
        Row("  jax over torch", "", ratio(figures["jax"], figures["torch"]), target),
        Row("  torch over the bare body", "", ratio(figures["torch"], figures["body"])),
    ]
