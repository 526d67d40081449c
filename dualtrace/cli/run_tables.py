"""Stored runs, comparisons, jobs and backends as tables. Pure: plain values in, rich renderables out.

It must not know where they are kept or how they were asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from dualtrace.cli.tables import ABSENT, count, figures, number, pairs_table, plain_table
from dualtrace.cli.visible import show_line
from dualtrace.compare.report import Verdict
from dualtrace.library import Backend, BenchmarkFigures, ComparisonSummary, Job, RunMode, RunRecord, RunSummary
from dualtrace.runs.run import Run

SHORT = 48
ROOMY = 110  # characters from which on a list of ids needs no saving
VERDICT_STYLES = {Verdict.PASS: "green", Verdict.INCOMPARABLE: "yellow"}


def runs_table(runs: Sequence[RunSummary], width: int = ROOMY) -> Table:
    fixed = [Column(name, no_wrap=True) for name in ("run", "created", "mode")]
    folded = ("target", *(("model", "question") if width >= ROOMY else ()), "")
    table = plain_table([*fixed, *(Column(name, overflow="fold") for name in folded)])
    tighten(table, width)
    for run in runs:
        marks = [word for word, is_so in (("synthetic", run.synthetic), ("incomplete", not run.complete)) if is_so]
        cells = [run.run_id, short_time(run.created, width), run.mode.lower(), run.target]
        if width >= ROOMY:
            cells += [f"{run.model_id} · {run.framework}", question_word(run.question_kind)]
        told = [Text(show_line(cell, SHORT)) for cell in cells]
        table.add_row(*told, Text(", ".join(marks), "yellow"))
    return table


def short_time(created: str, width: int = ROOMY) -> str:
    """To the second, in UTC; where there is little room to the minute, without the year."""
    told = created[:19] if width >= ROOMY else created[5:16]
    return show_line(told.replace("T", " "), SHORT)


def question_word(kind: str) -> str:
    """A kind of question by its short name, which is that of case files."""
    return {"ROLLING_LOGPROB": "rolling", "NEXT_TOKEN_DIST": "next token", "MASKED_FORWARD": "masked"}.get(
        kind, kind.lower().replace("_", " ")
    )


def tighten(table: Table, width: int) -> None:
    """On a narrow terminal the gaps go first: ids must stay whole, to be copied."""
    if width < ROOMY:
        table.padding = (0, 0)


def comparisons_table(comparisons: Sequence[ComparisonSummary], width: int = ROOMY) -> Table:
    """Where no comparison is of a case there is no column for it."""
    has_cases = any(one.case for one in comparisons)
    fixed = [Column(name, no_wrap=True) for name in ("comparison", "created", "verdict")]
    names = ("left", "right", *(("question",) if width >= ROOMY else ()), *(("case",) if has_cases else ()))
    folded = [Column(name, overflow="fold") for name in names]
    table = plain_table([*fixed, *folded, figures("first"), figures("max diff")])
    tighten(table, width)
    for one in comparisons:
        known = {"left": one.left, "right": one.right, "question": question_word(one.question_kind), "case": one.case}
        difference = Text(ABSENT if one.max_token_abs_diff is None else f"{one.max_token_abs_diff:.3g}")
        verdict = Text(str(one.verdict), VERDICT_STYLES.get(one.verdict, "red"))
        first = [Text(one.comparison_id), Text(short_time(one.created, width)), verdict]
        told = [Text(show_line(known[name], SHORT)) for name in names]
        table.add_row(*first, *told, count(one.first_divergence_index), difference)
    return table


def backends_table(backends: Sequence[Backend]) -> Table:
    columns = [Column("backend", no_wrap=True), Column("health", no_wrap=True), figures("replicas")]
    table = plain_table([*columns, Column("model", overflow="fold"), Column("trouble", overflow="fold")])
    for backend in backends:
        serving = sum(replica.serving for replica in backend.replicas)
        health = Text("healthy", "green") if backend.healthy else Text("not healthy", "red")
        trouble = backend.problem or "; ".join(one.problem for one in backend.replicas if one.problem)
        cells = [Text(backend.name), health, Text(f"{serving}/{len(backend.replicas)}"), Text(_model(backend))]
        table.add_row(*cells, Text(show_line(trouble, 160), "yellow"))
    return table


def _model(backend: Backend) -> str:
    if backend.card is None:
        return ABSENT
    known = backend.card.provenance
    told = show_line(f"{known.model_id} · {known.framework} · {known.dtype}", SHORT)
    return told + (" (synthetic)" if backend.synthetic else "")


def replicas_table(backend: Backend) -> Table:
    table = plain_table([Column("replica", no_wrap=True), Column("serving"), Column("problem", overflow="fold")])
    for replica in backend.replicas:
        serving = Text("yes", "green") if replica.serving else Text("no", "red")
        table.add_row(Text(show_line(replica.address, SHORT)), serving, Text(show_line(replica.problem, 300)))
    return table


def job_table(job: Job) -> Table:
    pairs: list[tuple[str, RenderableType]] = [("job", Text(job.job_id)), ("state", Text(job.state.lower()))]
    pairs += [("request", Text(show_line(job.request_id, 100))), ("events", count(job.last_sequence))]
    pairs += [("run", Text(job.run_id))] if job.run_id else []
    pairs += [("comparison", Text(job.comparison_id))] if job.comparison_id else []
    if job.problem is not None:
        pairs.append(("failed", Text(show_line(f"{job.problem.reason}: {job.problem.message}", 300), "red")))
    return pairs_table(pairs)


def record_tables(record: RunRecord) -> Iterator[RenderableType]:
    """What is kept of a run beside its answer, then the answer."""
    pairs: list[tuple[str, RenderableType]] = [("run", Text(record.run_id)), ("target", Text(record.target))]
    pairs += [("mode", Text(record.mode.lower())), ("created", Text(show_line(record.run.created, SHORT)))]
    pairs += [("config", Text(record.config_hash)), ("input", Text(record.input_hash))]
    if record.mask_hash:
        pairs.append(("mask", Text(f"{record.mask_hash} {record.mask_shape}")))
    pairs += [("mean 1/rank", number(record.mrr)), ("rank-1 share", number(record.rank1_share))]
    raw = [("raw request", record.raw_request_ref), ("raw response", record.raw_response_ref)]
    pairs += [(name, Text(ref)) for name, ref in raw if ref]
    yield pairs_table(pairs)
    if record.synthetic:
        yield Text("synthetic: no model stands behind these numbers", "yellow")
    yield Text("")
    if record.mode is RunMode.BENCHMARK and record.benchmark is not None:
        yield benchmark_table(record.benchmark)
        return
    yield from run_tables(record.run)
    if record.token_debug is not None:
        yield Text("\nThe items' own tokens", "bold")
        yield from run_tables(record.token_debug)


def benchmark_table(figures: BenchmarkFigures) -> Table:
    calls = len(figures.latencies_ms) + figures.failures
    pairs: list[tuple[str, RenderableType]] = [
        ("source", Text(figures.source, "" if figures.source == "real" else "yellow")),
        ("calls", Text(f"{calls}, {figures.concurrency} at a time, after {len(figures.warm_up_ms)} to warm up")),
        ("failures", Text(f"{figures.failures} ({figures.failure_rate:.1%})")),
    ]
    pairs += [(f"p{share} ms", number(value, 3)) for share, value in (
        (50, figures.p50_ms), (95, figures.p95_ms), (99, figures.p99_ms),
    )]  # fmt: skip
    pairs += [("calls/s", number(figures.calls_per_second, 1)), ("tokens/s", number(figures.tokens_per_second, 1))]
    if figures.first_failure is not None:
        told = f"{figures.first_failure.reason}: {figures.first_failure.message}"
        pairs.append(("first failure", Text(show_line(told, 300), "red")))
    return pairs_table(pairs)


def run_tables(run: Run) -> Iterator[RenderableType]:
    """The answer as the asking command of its question shows it."""
    from dualtrace.cli.asking import Answered
    from dualtrace.cli.logprob import render_logprob
    from dualtrace.cli.next import render_next
    from dualtrace.cli.rolling import render_rolling
    from dualtrace.cli.score import render_score
    from dualtrace.questions.asked import LogprobQuestion, NextTokenQuestion, RollingQuestion, ScoreQuestion

    names = [str(variant.view) for variant in getattr(run.question, "variants", ())]
    answered = Answered(run)
    match run.question:
        case LogprobQuestion():
            yield from render_logprob(answered, run, names)
        case RollingQuestion():
            yield from render_rolling(answered, run, names)
        case NextTokenQuestion():
            yield from render_next(answered, run, names)
        case ScoreQuestion():
            yield from render_score(run, (), names)
        case _:
            yield from _masked_tables(run, names)


def _masked_tables(run: Run, names: Sequence[str]) -> Iterator[RenderableType]:
    """Each variant by itself: what it is to be held against was not asked for."""
    from dualtrace.cli.tables import model_line, usage_line
    from dualtrace.cli.variant_tables import item_tables, items_of, legend, receipts

    yield model_line(run.provenance)
    yield from legend(names)
    for _item, entries in items_of(run):
        yield Text("")
        yield from item_tables(entries, 0, {})
    yield from receipts(run, names)
    yield from usage_line(run)
