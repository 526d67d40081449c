"""How cases ended: as lines for people, as JSON, as JUnit results, as one exit code.

Pure: it knows cases and reports. It must not know who ran a case or where its words go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dualtrace.cases.junit import Outcome, Result
from dualtrace.cli.exits import FAILED, UNAVAILABLE, exit_code, tell_problem
from dualtrace.cli.visible import show_line, show_text
from dualtrace.compare.report import CompareReport, Verdict
from dualtrace.library import Case
from dualtrace.problems import Problem
from dualtrace.runs.run import restore_problem

STYLES = {Verdict.PASS: "green", Verdict.FAIL: "red", Verdict.INCOMPARABLE: "yellow", Verdict.ERROR: "red"}
SKIPPED = "SKIPPED"
NAME_WIDTH = 48


@dataclass(frozen=True)
class Ended:
    """One case and how it went."""

    case: Case
    source: str  # the file it stands in, or the coordinator that keeps it
    seconds: float = 0.0
    report: CompareReport | None = None
    problem: Problem | None = None  # why there is no report
    comparison_id: str = ""
    reproduce: str = ""  # the command that runs this case again
    skipped: bool = False

    @property
    def verdict(self) -> Verdict | None:
        """None: it was not run."""
        if self.skipped:
            return None
        return Verdict.ERROR if self.report is None else self.report.verdict

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What the sides failed of."""
        if self.report is None:
            return () if self.problem is None else (self.problem,)
        stored = (self.report.left.problem, self.report.right.problem)
        return tuple(restore_problem(one) for one in stored if one is not None)

    @property
    def max_abs_diff(self) -> float | None:
        report = self.report
        if report is None:
            return None
        if report.tokens is not None:
            return report.tokens.max_token_abs_diff
        if report.scores is not None:
            return report.scores.max_abs_diff
        found = [one.max_abs_diff for one in report.distributions if one.max_abs_diff is not None]
        return max(found, default=None)

    @property
    def first_divergence(self) -> tuple[int, int] | None:
        """Item and token."""
        tokens = None if self.report is None else self.report.tokens
        if tokens is None:
            return None
        if tokens.first_divergence_index is not None and tokens.first_divergence_item is not None:
            return tokens.first_divergence_item, tokens.first_divergence_index
        mismatch = tokens.first_id_mismatch
        return None if mismatch is None else (mismatch.item, mismatch.index)

    @property
    def reasons(self) -> tuple[str, ...]:
        told = () if self.report is None else self.report.reasons
        return told or tuple(problem.detail.message for problem in self.problems)


def tell_line(ended: Ended) -> tuple[str, str]:
    """The verdict and the rest of its line."""
    if ended.verdict is None:
        return SKIPPED, f"{show_line(ended.case.name, NAME_WIDTH)}  not run: an earlier case failed"
    parts = [show_line(ended.case.name, NAME_WIDTH)]
    if ended.max_abs_diff is not None:
        parts.append(f"max diff {ended.max_abs_diff:.3g}")
    if ended.first_divergence is not None:
        item, index = ended.first_divergence
        parts.append(f"first divergence at token {index}" + (f" of item {item}" if item else ""))
    parts.append(f"{ended.seconds:.2f} s")
    return str(ended.verdict), "  ".join(parts)


def tell_more(ended: Ended) -> list[str]:
    """Why a case did not pass, and the command that shows it again; nothing for one that passed."""
    if ended.verdict in {None, Verdict.PASS}:
        return []
    lines = [show_text(reason) for reason in ended.reasons]
    if ended.report is None and ended.problem is not None:
        lines = tell_problem(ended.problem).split("\n")
    lines += [f"kept as {ended.comparison_id}"] if ended.comparison_id else []
    return [*lines, f"reproduce: {show_text(ended.reproduce)}"]


def tell_sum(results: Sequence[Ended], seconds: float) -> str:
    counts = Counter(str(one.verdict or SKIPPED) for one in results)
    told = ", ".join(f"{counts[name]} {name}" for name in (*map(str, Verdict), SKIPPED) if counts[name])
    return f"{len(results)} {'case' if len(results) == 1 else 'cases'}: {told} in {seconds:.2f} s"


def sum_up(results: Sequence[Ended]) -> int:
    """The exit code: an unavailable backend is told before a failed case, for it may be why."""
    if any(exit_code(problem) == UNAVAILABLE for one in results for problem in one.problems):
        return UNAVAILABLE
    return 0 if all(one.verdict is Verdict.PASS for one in results) else FAILED


def results_to_json(results: Sequence[Ended], seconds: float) -> dict[str, Any]:
    counts = Counter(str(one.verdict or SKIPPED) for one in results)
    return {
        "kind": "dualtrace.case_run",
        "passed": all(one.verdict is Verdict.PASS for one in results),
        "seconds": seconds,
        "counts": {name: counts[name] for name in (*map(str, Verdict), SKIPPED)},
        "cases": [_to_json(one) for one in results],
    }


def _to_json(ended: Ended) -> dict[str, Any]:
    from dualtrace.compare.report import write_report

    item, index = ended.first_divergence or (None, None)
    return {
        "name": ended.case.name,
        "source": ended.source,
        "tags": list(ended.case.tags),
        "verdict": str(ended.verdict or SKIPPED),
        "max_abs_diff": ended.max_abs_diff,
        "first_divergence_item": item,
        "first_divergence_index": index,
        "seconds": ended.seconds,
        "reasons": list(ended.reasons),
        "comparison_id": ended.comparison_id or None,
        "reproduce": ended.reproduce,
        "report": None if ended.report is None else write_report(ended.report),
    }


OUTCOMES = {
    None: Outcome.SKIPPED,
    Verdict.PASS: Outcome.PASSED,
    Verdict.FAIL: Outcome.FAILED,
    Verdict.INCOMPARABLE: Outcome.FAILED,
    Verdict.ERROR: Outcome.ERRED,
}


def to_junit(ended: Ended) -> Result:
    more = tell_more(ended)
    skipped = "an earlier case failed"
    return Result(
        name=ended.case.name,
        group=ended.source,
        outcome=OUTCOMES[ended.verdict],
        seconds=ended.seconds,
        kind=str(ended.verdict or SKIPPED),
        message=skipped if ended.verdict is None else "; ".join(ended.reasons),
        text="\n".join(more),
        properties=tuple(_properties(ended)),
    )


def _properties(ended: Ended) -> list[tuple[str, str]]:
    found = [("verdict", str(ended.verdict or SKIPPED)), ("left", ended.case.left.target)]
    found += [("right", ended.case.right.target), ("tags", ",".join(ended.case.tags))]
    found += [("max_abs_diff", repr(ended.max_abs_diff))] if ended.max_abs_diff is not None else []
    if ended.first_divergence is not None:
        item, index = ended.first_divergence
        found += [("first_divergence_item", str(item)), ("first_divergence_index", str(index))]
    if ended.report is not None and ended.report.tolerance is not None:
        found.append(("tolerance", ended.report.tolerance.name))
    return found + ([("comparison_id", ended.comparison_id)] if ended.comparison_id else [])
