"""Four views of one model in one batch, against as many rows of the base alone: time and memory."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks import shapes
from benchmarks.asking import Caller, caller
from benchmarks.quiet import rounds, tell_others
from benchmarks.sidecars import Sidecar, model_folder, model_sidecar
from benchmarks.table import Row, ratio, spread
from dualtrace.models.tiny_adapter import write_tiny_adapter
from dualtrace.questions.asked import RollingQuestion, Variant
from dualtrace.views import BASE, Noise, finetuned, null, scaled

REPEATS = 7
TEXTS, TOKENS = 2, 128


def measure() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        usual = write_tiny_adapter(Path(folder) / "usual", model_folder(), rank=8, alpha=16)
        wide = write_tiny_adapter(Path(folder) / "wide", model_folder(), rank=8, alpha=16, targets="all-linear")
        flags = ("--adapter", f"usual={usual}", "--adapter", f"wide={wide}")
        with model_sidecar("torch", *flags) as sidecar, caller(sidecar.address) as ours:
            return [
                _measure_memory(sidecar, ours, "wide", wide),
                *_measure_adapter(ours, "usual", "rank 8, q_proj and v_proj"),
                *_measure_adapter(ours, "wide", "rank 8, all seven linear modules"),
            ]


def _questions(name: str) -> tuple[RollingQuestion, RollingQuestion]:
    """The views mixed, and as many rows of the base alone."""
    views = (BASE, finetuned(name), scaled(name, 0.5), null(name, Noise(seed=1)))
    mixed = shapes.rolling(40, TEXTS, TOKENS, tuple(Variant(view) for view in views))
    return mixed, shapes.rolling(40, TEXTS * len(views), TOKENS)


def _measure_memory(sidecar: Sidecar, ours: Caller, name: str, adapter: Path) -> Row:
    """What four views add to the peak of a call on as many rows of the base; the adapter itself is loaded before."""
    mixed, plain = _questions(name)
    peaks = []
    for question in (plain, plain, mixed):  # the first call alone grows what the process keeps
        sidecar.forget_peak()
        ours.ask(question)
        peaks.append(sidecar.peak_megabytes())
    size = sum(file.stat().st_size for file in adapter.iterdir()) / 1e6
    note = f"the adapter's folder is {size:.1f} MB; null noise is as large again"
    shape = f"{TEXTS} texts × 4 views × {TOKENS}, all seven linear modules"
    return Row(
        "four views, peak memory over the base's",
        shape,
        f"{peaks[2] - peaks[1]:+.0f} MB",
        f"<= {size + 10:.0f} MB",
        note,
    )


def _measure_adapter(ours: Caller, name: str, words: str) -> list[Row]:
    mixed, plain = _questions(name)
    figures = rounds(
        {"mixed": lambda: ours.ask(mixed).seconds, "base": lambda: ours.ask(plain).seconds}, REPEATS, warm_up=2
    )
    tokens = [ours.ask(question).execution.computed_tokens for question in (mixed, plain)]
    shape = f"{TEXTS} texts × 4 views × {TOKENS}"
    note = f"{tokens[1]} tokens computed; {tell_others(figures)}"
    return [
        Row("four views in one batch, torch", shape, spread(figures["mixed"]), note=f"{words}; {tokens[0]} tokens"),
        Row(
            "  base alone",
            f"8 texts × {TOKENS}",
            spread(figures["base"]),
            note=note,
        ),
        Row("  time over base", "", ratio(figures["mixed"], figures["base"]), "<= 1.10"),
    ]
