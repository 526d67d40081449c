"""What a comparison found, for people: who the sides are and in what they differ, the figures, the gates, the verdict.

Pure: a report in, rich renderables out. Everything that came from elsewhere passes through `visible` first. It must not
know tokens one by one, terminals or how the sides were asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from dualtrace.cli.tables import ABSENT, figures, name_engine, pairs_table, plain_table
from dualtrace.cli.visible import show_line, show_text
from dualtrace.compare.events import ProvenanceDifference
from dualtrace.compare.figures import TokenSummary
from dualtrace.compare.gates import GateResult, GateVerdict
from dualtrace.compare.report import CompareReport, Verdict
from dualtrace.compare.tolerance import Tolerance
from dualtrace.model_card import ModelProvenance
from dualtrace.questions.asked import Variant
from dualtrace.view_form import write_view

_DIGEST = re.compile(r"(sha256:[0-9a-f]{12})[0-9a-f]{52}")
VERDICT_STYLE = {
    Verdict.PASS: "bold green",
    Verdict.FAIL: "bold red",
    Verdict.INCOMPARABLE: "bold yellow",
    Verdict.ERROR: "bold red",
}
GATE_STYLE = {
    GateVerdict.PASS: "green",
    GateVerdict.FAIL: "bold red",
    GateVerdict.INCONCLUSIVE: "yellow",
    GateVerdict.NOT_APPLICABLE: "dim",
}


@dataclass(frozen=True)
class Introduced:
    """One side by what is known of it before it answers."""

    target: str
    variant: Variant
    provenance: ModelProvenance | None


def render_opening(
    left: Introduced, right: Introduced, differences: Sequence[ProvenanceDifference], tolerance: Tolerance | None
) -> Iterator[RenderableType]:
    """Who the sides are, in what they differ, and how far they may part: all that is known before the first token."""
    yield pairs_table([("left", _side(left)), ("right", _side(right))])
    if left.provenance is not None and right.provenance is not None:
        yield from difference_tables(differences)
    yield Text("")
    yield tolerance_line(tolerance)


def render_opening_of(report: CompareReport) -> Iterator[RenderableType]:
    left, right = (Introduced(side.target, side.variant, side.provenance) for side in (report.left, report.right))
    yield from render_opening(left, right, report.provenance_differences, report.tolerance)


def _side(side: Introduced) -> Text:
    text = Text(show_line(side.target, 200), "bold")
    text.append(_sight(side.variant))
    known = side.provenance
    if known is not None:
        who = f"{known.model_id} · {name_engine(known)} · {known.dtype} · {known.device}"
        text.append("\n" + show_line(who, 160), "dim")
        if known.synthetic:
            text.append("\nsynthetic: no model stands behind these numbers", "yellow")
    return text


def _sight(variant: Variant) -> str:
    parts = [] if variant.view.is_plain else [f"view {write_view(variant.view)}"]
    parts += [] if variant.mask is None else [f"mask {variant.mask.name or '(unnamed)'}"]
    return show_line(f"  under {', '.join(parts)}", 160) if parts else ""


def difference_tables(differences: Sequence[ProvenanceDifference]) -> Iterator[RenderableType]:
    yield Text("")
    if not differences:
        yield Text("provenance: the same on both sides", "dim")
        return
    table = plain_table([Column("provenance", no_wrap=True), Column("left", overflow="fold"),
                         Column("right", overflow="fold")])  # fmt: skip
    for one in differences:
        shown = (Text(show_line(shorten_digest(value), 60) or ABSENT) for value in (one.left, one.right))
        table.add_row(Text(one.field), *shown)
    yield table


def shorten_digest(text: str) -> str:
    """Twelve digits tell two digests apart; the whole ones stand in the JSON and on the page."""
    return _DIGEST.sub(r"\1…", text)


def tolerance_line(tolerance: Tolerance | None) -> Text:
    if tolerance is None:
        return Text("tolerance: none was chosen, because a side failed first", "dim")
    rule = f"|l - r| <= {tolerance.abs_epsilon:g} + {tolerance.rel_epsilon:g} · max(|l|, |r|) nats"
    return Text(f"tolerance {tolerance.name}: {rule}")


def summary_table(tokens: TokenSummary) -> Table:
    return pairs_table([(name, Text(text)) for name, text in summary_lines(tokens)])


def summary_lines(tokens: TokenSummary) -> Iterator[tuple[str, str]]:
    """What all tokens together come to; lines with nothing to say are left out."""
    yield "compared", f"{tokens.aligned_count} tokens; {tokens.token_mismatch_count} out of tolerance"
    if tokens.max_token_abs_diff:
        item = f"item {tokens.max_token_abs_diff_item}, " if tokens.max_token_abs_diff_item else ""
        yield "largest |Δ|", f"{tokens.max_token_abs_diff:.3g} nats at {item}token {tokens.max_token_abs_diff_index}"
    loss = tokens.token_loss_diff_summary
    if loss is not None:
        yield "|Δ| of nll", f"mean {loss.mean:.3g}, p50 {loss.p50:.3g}, p95 {loss.p95:.3g}, p99 {loss.p99:.3g}"
        yield "bias", f"{loss.signed_mean:+.3g} nats a token, right minus left"
    if tokens.min_abs_epsilon is not None and tokens.token_mismatch_count:
        yield "would pass at", f"abs_epsilon {tokens.min_abs_epsilon * 1.00001:.6g} with the same rel_epsilon"
    ranks = tokens.rank_delta_summary
    if ranks is not None:
        at = f"; worst drop {ranks.worst_rank_drop} at token {ranks.worst_rank_drop_index}"
        told = f"{ranks.changed} changed; mean 1/rank {ranks.mrr_left:.4f} and {ranks.mrr_right:.4f}"
        yield "ranks", told + (at if ranks.worst_rank_drop else "")
    flip = tokens.first_argmax_flip
    if flip is not None:
        ids = f"id {flip.left_top_id} and id {flip.right_top_id}"
        margins = f"margins {_margin(flip.left_margin)} and {_margin(flip.right_margin)} nats"
        yield "most likely", f"first differ at token {flip.index}: {ids}; {margins}"
    for name, kl in (("base || masked", tokens.kl_base_masked_max_abs_diff),
                     ("masked || base", tokens.kl_masked_base_max_abs_diff)):  # fmt: skip
        if kl is not None:
            yield f"KL({name})", f"differs by at most {kl:.3g} nats"
    for name, value in (("not kept", tokens.not_kept_count), ("unavailable", tokens.unavailable_count)):
        if value:
            yield name, f"{value} tokens"


def time_line(report: CompareReport) -> Iterator[RenderableType]:
    """How long each side took to answer; a stored one took no time."""
    sides = (("left", report.left.total_seconds), ("right", report.right.total_seconds))
    told = [f"{name} {seconds:.2f} s" for name, seconds in sides if seconds is not None]
    if told:
        yield Text(f"answered in: {', '.join(told)}", "dim")


def _margin(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3g}"


def gates_table(gates: Sequence[GateResult]) -> Table:
    table = plain_table([Column("gate", no_wrap=True), Column("verdict", no_wrap=True), figures("value"),
                         figures("threshold"), Column("reason", overflow="fold")])  # fmt: skip
    for gate in gates:
        if gate.verdict is not GateVerdict.NOT_APPLICABLE:
            numbers = (Text(ABSENT if value is None else f"{value:.4g}") for value in (gate.value, gate.threshold))
            verdict = Text(_words(gate.verdict.value), GATE_STYLE[gate.verdict])
            table.add_row(Text(_words(gate.gate.value)), verdict, *numbers, Text(show_line(gate.reason, 300)))
    return table


def _words(name: str) -> str:
    return name.lower().replace("_", " ")


def unused_gates_line(gates: Sequence[GateResult]) -> Iterator[RenderableType]:
    unused = [_words(gate.gate.value) for gate in gates if gate.verdict is GateVerdict.NOT_APPLICABLE]
    if unused:
        yield Text(f"not applicable: {', '.join(unused)}", "dim")


def verdict_lines(report: CompareReport) -> Iterator[RenderableType]:
    for reason in report.reasons:
        if not reason.endswith("(synthetic)"):  # that stands with the side
            yield Text(show_line(reason, 500), "dim" if reason.startswith("note:") else "")
    yield Text(f"verdict: {report.verdict.value}", VERDICT_STYLE[report.verdict])


def reproduction_text(report: CompareReport) -> str:
    """The command that asks the same again, for copying: no terminal may break its line. "" where nothing failed."""
    if report.verdict is Verdict.PASS or not report.reproduce:
        return ""
    return f"reproduce with:\n  {show_text(report.reproduce)}\n"
