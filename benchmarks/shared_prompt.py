"""Many completions on one prompt: against the bare body on the rows needed, and against other tools."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

from benchmarks import bare, peers
from benchmarks.asking import Answer, Caller, caller
from benchmarks.quiet import rounds, tell_others
from benchmarks.shapes import SharedPrompt, shared_prompt
from benchmarks.sidecars import model_sidecar
from benchmarks.table import Missing, Row, largest_difference, ratio, spread

REPEATS = 7
PEER_REPEATS = 3


def measure() -> list[Row]:
    shape = shared_prompt()
    words = f"32 completions of 8-24 on 256; {shape.naive_tokens} naive tokens, {shape.rows_needed} rows needed"
    rows: list[Row] = []
    with ExitStack() as stack:
        torch = stack.enter_context(caller(stack.enter_context(model_sidecar("torch")).address))
        rows += _against_body("torch", torch, shape, words)
        rows += _against_peers(torch, shape, words, stack)
    try:
        with model_sidecar("jax") as sidecar, caller(sidecar.address) as jax:
            rows += _against_body("jax", jax, shape, words)
    except Missing as reason:
        rows.append(Row("shared prompt, jax", words, "not measured", note=str(reason)))
    return rows


def _against_body(engine: str, ours: Caller, shape: SharedPrompt, words: str) -> list[Row]:
    question = shape.question()
    figures = rounds(
        {
            "ours": lambda: ours.ask(question).seconds,
            "body": lambda: bare.body_seconds((1, shape.rows_needed)),
        },
        REPEATS,
        warm_up=2,
    )
    execution = ours.ask(question).execution
    note = f"{execution.computed_tokens} tokens computed, {execution.shared_tokens} shared; {tell_others(figures)}"
    target = "<= 1.30" if engine == "torch" else ""
    return [
        Row(f"shared prompt, {engine}", words, spread(figures["ours"]), note=note),
        Row("  bare body, one row", f"1 × {shape.rows_needed}", spread(figures["body"])),
        Row("  time over limit", "", ratio(figures["ours"], figures["body"]), target),
    ]


def _against_peers(ours: Caller, shape: SharedPrompt, words: str, stack: ExitStack) -> list[Row]:
    openers: dict[str, Callable[[], peers.Score]] = {
        "lm-eval HFLM, batch 8": peers.open_lm_eval,
        "transformers, one by one": lambda: bare.score_one_by_one,
        "minicons, batch 8": peers.open_minicons,
        "CTranslate2, batch 8": lambda: stack.enter_context(peers.open_ctranslate2()),
    }
    rows: list[Row] = []
    question, answer = shape.question(), Answer()
    sums: dict[str, list[float]] = {}

    def ask() -> float:
        nonlocal answer
        answer = ours.ask(question)
        return answer.seconds

    def timed(name: str, score: peers.Score) -> Callable[[], float]:
        def run() -> float:
            begun = time.perf_counter()
            sums[name] = score(shape.prompt, shape.completions)
            return time.perf_counter() - begun

        return run

    functions: dict[str, Callable[[], float]] = {"ours": ask}
    for name, opener in openers.items():
        try:
            functions[name] = timed(name, opener())
        except Missing as reason:
            rows.append(Row(f"  {name}", words, "not measured", note=str(reason)))
    figures = rounds(functions, PEER_REPEATS, warm_up=0)
    for name in functions:
        if name != "ours":
            target = ">= 10" if name.startswith(("lm-eval", "transformers")) else ""
            times = ratio(figures[name], figures["ours"])
            note = f"{spread(figures[name], 's', 1)}; sums: {largest_difference(sums[name], answer.sums())}"
            rows.append(Row(f"  {name}, over ours", "", times, target, note))
    return rows
