"""A comparison as one self-contained page for a bug report: no script, no network, everything escaped.

Pure: reports and pairs in, text out. It must not know files or terminals.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from dualtrace import __version__
from dualtrace.cli.compare_findings import summary_lines
from dualtrace.cli.compare_tables import BAD, STATUS_WORD, choose_items, item_label
from dualtrace.cli.pair_book import ItemPairs, PairBook
from dualtrace.cli.tables import name_engine
from dualtrace.cli.trace_svg import trace_svg
from dualtrace.cli.visible import show_piece, show_text
from dualtrace.compare.figures import DistributionReport
from dualtrace.compare.report import CompareReport, SideReport
from dualtrace.view_form import write_view

MAX_ROWS = 20_000  # of one page: beyond that a browser is no fun
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """
:root{color-scheme:light dark;--bad:#c0202b;--ok:#1a7f37;--warn:#9a6700;--dim:#6e7781;--line:#d0d7de;--l:#0969da;
--r:#bf5af2}
@media(prefers-color-scheme:dark){:root{--bad:#ff7b72;--ok:#56d364;--warn:#e3b341;--dim:#8b949e;--line:#30363d;
--l:#58a6ff;--r:#d2a8ff}}
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;margin:.5rem 0}
th,td{padding:.15rem .7rem;text-align:left;border-bottom:1px solid var(--line);vertical-align:top;
overflow-wrap:anywhere}
th,td:first-child{overflow-wrap:normal}
th{white-space:nowrap}th.w{white-space:normal}
h2{overflow-wrap:anywhere}
th{color:var(--dim);font-weight:600}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;font-family:ui-monospace,monospace;white-space:nowrap}
code,pre,td.p{font-family:ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
td.p{min-width:9ch;max-width:32ch}
pre{padding:.7rem;border:1px solid var(--line);border-radius:6px}
tr.bad td{background:color-mix(in srgb,var(--bad) 12%,transparent)}
tr.first td{border-top:3px solid var(--bad)}
.bad{color:var(--bad)}.ok{color:var(--ok)}.warn{color:var(--warn)}.dim{color:var(--dim)}
.verdict{font-size:1.3rem;font-weight:700}
.scroll{max-height:32rem;overflow:auto;border:1px solid var(--line);border-radius:6px}
.scroll thead th{position:sticky;top:0;background:Canvas}
.scroll td:last-child{white-space:nowrap}
.plot{overflow-x:auto}
svg{width:100%;min-width:640px;height:auto}
@media(max-width:600px){body{margin:1rem auto}th,td{padding:.15rem .4rem}}
"""
TONE = {"PASS": "ok", "FAIL": "bad", "ERROR": "bad", "INCOMPARABLE": "warn", "INCONCLUSIVE": "warn"}


def comparison_to_html(report: CompareReport, book: PairBook) -> str:
    title = f"dualtrace: {report.verdict.value}, {report.left.target} and {report.right.target}"
    parts = [
        _heading(report),
        _sides(report),
        _differences(report),
        *(_item(report, book, item) for item in choose_items(book)),
        *(_distribution(report, line) for line in report.distributions),
        _labels(report),
        _summary(report),
        _gates(report),
        _reproduce(report),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_esc(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(part for part in parts if part) + "\n"
        f'<p class="dim">dualtrace {_esc(__version__)}, {_esc(report.created)}</p>\n</body></html>\n'
    )


def _esc(text: str) -> str:
    """Text from anywhere: nothing in it is markup, and nothing invisible stays so."""
    return html.escape(show_text(text), quote=True)


def _heading(report: CompareReport) -> str:
    tone = TONE.get(report.verdict.value, "")
    reasons = "".join(f"<li>{_esc(reason)}</li>" for reason in report.reasons)
    return f'<h1>Do these two agree?</h1>\n<p class="verdict {tone}">{_esc(report.verdict.value)}</p>' + (
        f"<ul>{reasons}</ul>" if reasons else ""
    )


def _sides(report: CompareReport) -> str:
    rows = [("left, the baseline", report.left), ("right", report.right)]
    cells = [(f'<th class="w">{name}</th>', f"<td>{_side(side)}</td>") for name, side in rows]
    rule = report.tolerance
    told = "none was chosen" if rule is None else (
        f"{rule.name}: |l - r| <= {rule.abs_epsilon:g} + {rule.rel_epsilon:g} · max(|l|, |r|) nats ({rule.source})"
    )  # fmt: skip
    body = "".join(f"<tr>{head}{cell}</tr>" for head, cell in cells)
    return f"<table>{body}<tr><th>tolerance</th><td>{_esc(told)}</td></tr></table>"


def _side(side: SideReport) -> str:
    parts = [f"<code>{_esc(side.target)}</code>"]
    if not side.variant.view.is_plain:
        parts.append(f"view <code>{_esc(write_view(side.variant.view))}</code>")
    if side.variant.mask is not None:
        parts.append(f"mask <code>{_esc(side.variant.mask.name or '(unnamed)')}</code>")
    known = side.provenance
    if known is not None:
        who = f"{known.model_id} · {name_engine(known)} · {known.dtype} · {known.device}"
        parts.append(f'<span class="dim">{_esc(who)}</span>')
        if known.synthetic:
            parts.append('<span class="warn">synthetic: no model stands behind these numbers</span>')
    if side.total_seconds is not None:
        parts.append(f'<span class="dim">answered in {side.total_seconds:.2f} s</span>')
    if side.problem is not None:
        parts.append(f'<span class="bad">failed: {_esc(side.problem.message)}</span>')
    return "<br>".join(parts)


def _differences(report: CompareReport) -> str:
    if not report.provenance_differences:
        return '<h2>Provenance</h2><p class="dim">the same on both sides</p>'
    rows = [[_esc(one.field), _esc(one.left), _esc(one.right)] for one in report.provenance_differences]
    return "<h2>Provenance differs</h2>" + _table(("field", "left", "right"), rows)


def _item(report: CompareReport, book: PairBook, item: int) -> str:
    pairs = book.items[item]
    title = f"Item {item}: {_esc(item_label(report, item))}" if len(book.items) > 1 else "Tokens"
    rows = [_token_row(pairs, place) for place in range(min(len(pairs), MAX_ROWS))]
    names = ("#", "id", "piece", "left", "right", "right-left", "rank", "status")
    head = "".join(f'<th class="{"p" if name in {"piece", "status"} else "n"}">{name}</th>' for name in names)
    cut = f'<p class="dim">{len(pairs) - MAX_ROWS} more tokens are not shown</p>' if len(pairs) > MAX_ROWS else ""
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    drawn = trace_svg(pairs)
    return f"<h2>{title}</h2>" + (f'<div class="plot">{drawn}</div>' if drawn else "") + table + cut


def _token_row(pairs: ItemPairs, place: int) -> str:
    status = pairs.statuses[place]
    index, token_id = pairs.indices[place], pairs.token_ids[place]
    first = pairs.divergence is not None and pairs.divergence.index == index
    kinds = ["bad"] * (status in BAD) + ["first"] * first
    ranks = (pairs.left_ranks[place], pairs.right_ranks[place])
    rank = (
        ""
        if ranks[0] is None or ranks[1] is None
        else str(ranks[0])
        if ranks[0] == ranks[1]
        else f"{ranks[0]}→{ranks[1]}"
    )
    numbers = [
        _number(pairs.left_logprobs[place]),
        _number(pairs.right_logprobs[place]),
        _delta(pairs.delta(place)),
        rank,
    ]
    cells = [f'<td class="n">{index}</td><td class="n">{token_id if token_id >= 0 else ""}</td>']
    cells += [f'<td class="p">{html.escape(show_piece(pairs.pieces[place]))}</td>']
    cells += [f'<td class="n">{cell}</td>' for cell in numbers]
    note = STATUS_WORD[status] + (" ← first divergence" if first else "")
    mark = f' class="{" ".join(kinds)}"' if kinds else ""
    return f"<tr{mark}>{''.join(cells)}<td>{note}</td></tr>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def _delta(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:+.2e}" if math.isfinite(value) else str(value)


def _distribution(report: CompareReport, line: DistributionReport) -> str:
    rows = []
    for place, token_id in enumerate(line.token_ids):
        own = None if line.tokens is None else line.tokens[place]
        left, right = line.left_logprobs[place], line.right_logprobs[place]
        shown = "" if own is None else html.escape(show_piece(own))
        rows.append([str(token_id), f"<code>{shown}</code>", _number(left), _number(right), _delta(right - left)])
    bounds = (
        ("KL(left||right) at least", line.kl_left_right_lower),
        ("KL(right||left) at least", line.kl_right_left_lower),
        ("Jensen-Shannon at least", line.js_lower),
        ("Jensen-Shannon at most", line.js_upper),
    )
    told = "; ".join(f"{name} {value:.3g} nats" for name, value in bounds if value is not None)
    title = f"After {_esc(item_label(report, line.item))}: {STATUS_WORD[line.status]}"
    return f"<h2>{title}</h2>" + _table(("id", "piece", "left", "right", "right-left"), rows) + f"<p>{_esc(told)}</p>"


def _labels(report: CompareReport) -> str:
    rows = []
    for line in report.labels:
        for label, left, right in zip(line.label_token_ids, line.left_scores, line.right_scores, strict=False):
            rows.append([
                str(line.item), _esc(item_label(report, line.item)), str(label), _number(left), _number(right),
                _delta(right - left), STATUS_WORD[line.status],
            ])  # fmt: skip
    names = ("item", "text", "label", "left", "right", "right-left", "status")
    return "<h2>Scores</h2>" + _table(names, rows) if rows else ""


def _summary(report: CompareReport) -> str:
    if report.tokens is None or not report.tokens.aligned_count:
        return ""
    return "<h2>Summary</h2>" + _table((), [[_esc(name), _esc(text)] for name, text in summary_lines(report.tokens)])


def _gates(report: CompareReport) -> str:
    rows = []
    for gate in report.gates:
        word = gate.verdict.value.lower().replace("_", " ")
        numbers = ["" if value is None else f"{value:.4g}" for value in (gate.value, gate.threshold)]
        name = gate.gate.value.lower().replace("_", " ")
        verdict = f'<span class="{TONE.get(gate.verdict.value, "dim")}">{word}</span>'
        rows.append([name, verdict, *numbers, _esc(gate.reason)])
    return "<h2>Gates</h2>" + _table(("gate", "verdict", "value", "threshold", "reason"), rows)


def _reproduce(report: CompareReport) -> str:
    return f"<h2>Reproduce</h2><pre>{_esc(report.reproduce)}</pre>" if report.reproduce else ""


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are markup already."""
    numbers = {"id", "left", "right", "right-left", "value", "threshold", "item", "label"}
    kinds = ["n" if name in numbers and "field" not in names else "" for name in names]
    head = "".join(f'<th class="{kind}">{name}</th>' for name, kind in zip(names, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f'<td class="{kinds[i] if kinds else ""}">{cell}</td>' for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if names else ''}<tbody>{body}</tbody></table>"
