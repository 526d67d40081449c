"""EdgePatch as MaskedForward variants: each chunk cut from the answer's rows in turn, with KL against the uncut run and
without it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import bare
from benchmarks.asking import Answer, Caller, caller
from benchmarks.quiet import rounds, tell_others
from benchmarks.shapes import ChunkedText, chunked_text
from benchmarks.sidecars import model_sidecar
from benchmarks.table import Missing, Row, largest_difference, ratio, spread

REPEATS = 5
NAIVE_CHUNKS = 3


@dataclass(frozen=True, eq=False)
class Case:
    """A question and the bodies, [rows, tokens] each, that are its limit: what all variants share, then what none."""

    text: ChunkedText
    bodies: tuple[tuple[int, int], tuple[int, int]]

    @property
    def words(self) -> str:
        measured = "KL" if self.text.kl else "no KL, the uncut run beside them"
        return f"736 tokens, 24 chunks, 32 answer tokens, all layers, query_shift {self.text.query_shift}, {measured}"

    @property
    def one_row(self) -> tuple[int, int]:
        return 1, sum(rows * tokens for rows, tokens in self.bodies)


CASES = (  # as the design states their limits
    Case(chunked_text(1, kl=True), ((1, 735), (25, 32))),
    Case(chunked_text(0, kl=False), ((1, 736), (24, 31))),
)


def measure() -> list[Row]:
    rows: list[Row] = []
    for engine in ("torch", "jax"):
        try:
            with model_sidecar(engine) as sidecar, caller(sidecar.address) as ours:
                for case in CASES:
                    rows += _against_limit(engine, ours, case)
                    if engine == "torch":
                        rows += _against_full_forwards(ours, case.text)
        except Missing as reason:
            rows.append(Row(f"EdgePatch, {engine}", CASES[0].words, "not measured", note=str(reason)))
    return rows


def _against_limit(engine: str, ours: Caller, case: Case) -> list[Row]:
    question = case.text.question()
    figures = rounds(
        {
            "ours": lambda: ours.ask(question).seconds,
            "limit": lambda: bare.body_seconds(*case.bodies),
            "one row": lambda: bare.body_seconds(case.one_row),
        },
        REPEATS,
    )
    execution = ours.ask(question).execution
    note = f"{execution.computed_tokens} tokens computed, {execution.shared_tokens} shared; {tell_others(figures)}"
    target = "<= 1.50" if engine == "torch" else ""
    bodies = " and ".join(f"{rows} × {tokens}" for rows, tokens in case.bodies)
    return [
        Row(f"EdgePatch, {engine}", case.words, spread(figures["ours"]), note=note),
        Row("  bare body", bodies, spread(figures["limit"])),
        Row("  time over limit", bodies, ratio(figures["ours"], figures["limit"]), target),
        Row("  time over one row", f"1 × {case.one_row[1]}", ratio(figures["ours"], figures["one row"])),
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
    sums = answers[-1].sums()[:NAIVE_CHUNKS]
    kl = [answers[-1].kl[0, number] for number in range(NAIVE_CHUNKS)] if text.kl else []
    rows = []
    for attention, target in (("eager", ">= 14"), ("sdpa", ">= 9")):
        their_sums, their_kl = found[attention]
        note = (
            f"{spread(figures[attention], 's', 1)}, {NAIVE_CHUNKS} chunks and the base measured, scaled to 24; "
            f"sums: {largest_difference(sums, their_sums)}"
        )
        if text.kl:
            note += f", KL: {largest_difference(kl, their_kl)}"
        what = f"  {attention}, full forward a chunk, over ours"
        rows.append(Row(what, "", ratio(figures[attention], figures["ours"]), target, note))
    return rows
