"""EdgePatch as MaskedForward variants: each chunk cut from the answer's rows, with KL against the uncut run."""

from __future__ import annotations

import time
from collections.abc import Callable

from benchmarks import bare
from benchmarks.asking import Answer, Caller, caller
from benchmarks.quiet import rounds, tell_others
from benchmarks.shapes import ChunkedText, chunked_text
from benchmarks.sidecars import model_sidecar
from benchmarks.table import Missing, Row, largest_difference, ratio, spread

REPEATS = 5
NAIVE_CHUNKS = 3
WORDS = "736 tokens, 24 chunks, 32 answer tokens, all layers, query_shift 1, KL"


def measure() -> list[Row]:
    text = chunked_text()
    rows: list[Row] = []
    for engine in ("torch", "jax"):
        try:
            with model_sidecar(engine) as sidecar, caller(sidecar.address) as ours:
                rows += _against_limit(engine, ours, text)
                if engine == "torch":
                    rows += _against_full_forwards(ours, text)
        except Missing as reason:
            rows.append(Row(f"EdgePatch, {engine}", WORDS, "not measured", note=str(reason)))
    return rows


def _against_limit(engine: str, ours: Caller, text: ChunkedText) -> list[Row]:
    """The limit as the design states it, and the fewest rows that do: base rows before the cut, then 25 × 32."""
    question = text.question()
    figures = rounds(
        {
            "ours": lambda: ours.ask(question).seconds,
            "limit": lambda: bare.body_seconds((1, 735), (25, 32)),
            "one row": lambda: bare.body_seconds((1, 735 + 25 * 32)),
        },
        REPEATS,
    )
    execution = ours.ask(question).execution
    note = f"{execution.computed_tokens} tokens computed, {execution.shared_tokens} shared; {tell_others(figures)}"
    target = "<= 1.50" if engine == "torch" else ""
    return [
        Row(f"EdgePatch, {engine}", WORDS, spread(figures["ours"]), note=note),
        Row("  bare body", "1 × 735 and 25 × 32", spread(figures["limit"])),
        Row("  time over limit", "1 × 735 and 25 × 32", ratio(figures["ours"], figures["limit"]), target),
        Row("  time over one row", "1 × 1535", ratio(figures["ours"], figures["one row"])),
    ]


def _against_full_forwards(ours: Caller, text: ChunkedText) -> list[Row]:
    question = text.question()
    answers: list[Answer] = []
    found: dict[str, tuple[list[float], list[float]]] = {}

    def ask() -> float:
        answers.append(ours.ask(question))
        return answers[-1].seconds

    def naive(attention: str) -> Callable[[], float]:
        def run() -> float:
            begun = time.perf_counter()
            found[attention] = bare.knock_out(text, text.chunks[:NAIVE_CHUNKS], attention)
            seconds = time.perf_counter() - begun
            return seconds / (NAIVE_CHUNKS + 1) * (len(text.chunks) + 1)  # the uncut run is one more

        return run

    figures = rounds({"ours": ask, "eager": naive("eager"), "sdpa": naive("sdpa")}, 2, warm_up=1)
    sums, kl = answers[-1].sums()[:NAIVE_CHUNKS], [answers[-1].kl[0, n] for n in range(NAIVE_CHUNKS)]
    rows = []
    for attention, target in (("eager", ">= 14"), ("sdpa", ">= 9")):
        their_sums, their_kl = found[attention]
        note = (
            f"{spread(figures[attention], 's', 1)}, {NAIVE_CHUNKS} chunks and the base measured, scaled to 24; "
            f"sums: {largest_difference(sums, their_sums)}, KL: {largest_difference(kl, their_kl)}"
        )
        what = f"  {attention}, full forward a chunk, over ours"
        rows.append(Row(what, "", ratio(figures[attention], figures["ours"]), target, note))
    return rows
