"""The report of a comparison: what was compared, every figure, the gates, the verdict. The dataclasses are the format.

`write_report` and `read_report` are its JSON form, versioned like a run's. It must not know how figures are computed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from dualtrace.card import QuestionKind
from dualtrace.compare.events import ProvenanceDifference
from dualtrace.compare.figures import (
    ArgmaxFlip,
    DistributionReport,
    ItemReport,
    LabelReport,
    LossDiffSummary,
    NotFinite,
    NotFiniteValue,
    PositionBucket,
    RankDeltaSummary,
    ScoreSummary,
    TokenColumns,
    TokenSummary,
)
from dualtrace.compare.gates import GateName, GatePolicy, GateResult, GateVerdict
from dualtrace.compare.pass_rule import TokenStatus
from dualtrace.compare.report_checks import (
    Ground,
    check_distributions,
    check_ground,
    check_items,
    check_labels,
    check_summary,
    check_verdict,
)
from dualtrace.compare.tolerance import Tolerance
from dualtrace.json_text import FloatTexts, dump_json
from dualtrace.model_card import ModelProvenance
from dualtrace.questions.answers import Execution, Usage
from dualtrace.questions.asked import Variant
from dualtrace.records import from_json, malformed, parse_json, to_json
from dualtrace.runs.run import AskedQuestion, StoredProblem, check_version, question_to_json, read_question

__all__ = [
    "KIND", "SCHEMA_VERSION", "ArgmaxFlip", "BenchmarkReport", "CompareReport", "DistributionReport", "ItemReport",
    "LabelReport", "LossDiffSummary", "NotFinite", "NotFiniteValue", "PositionBucket", "RankDeltaSummary",
    "ScoreSummary", "SideReport", "TokenColumns", "TokenSummary", "Verdict", "read_report", "report_digest",
    "report_to_text", "write_report",
]  # fmt: skip

KIND = "dualtrace.comparison"
SCHEMA_VERSION = "1.0"


class Verdict(StrEnum):
    PASS = "PASS"  # noqa: S105 - not a password
    FAIL = "FAIL"
    INCOMPARABLE = "INCOMPARABLE"  # different ids, or nothing was compared
    ERROR = "ERROR"  # a side failed


@dataclass(frozen=True)
class SideReport:
    """Who one side was and how it went."""

    target: str  # as written by whoever asked
    variant: Variant
    provenance: ModelProvenance | None  # None: it failed before it said
    identity: str | None  # of its run, `Run.identity`; None when there is none
    usage: Usage | None
    execution: Execution | None
    total_seconds: float | None  # of the whole call as seen by the comparer; None for a stored run
    mrr: float | None  # mean of 1 / rank over its scored tokens
    rank1_share: float | None
    delta_modules: tuple[str, ...]  # modules that got an adapter's delta
    problem: StoredProblem | None


@dataclass(frozen=True)
class BenchmarkReport:
    """Latency of both sides where they were repeated; warm-up and compile excluded. Milliseconds."""

    left_samples: int
    right_samples: int
    left_p50_ms: float | None
    right_p50_ms: float | None
    left_p95_ms: float | None
    right_p95_ms: float | None
    left_failure_rate: float
    right_failure_rate: float


@dataclass(frozen=True)
class CompareReport:
    """Everything that is known when a comparison has ended."""

    created: str  # RFC 3339, UTC
    question: AskedQuestion  # its variants stand with the sides
    left: SideReport
    right: SideReport
    provenance_differences: tuple[ProvenanceDifference, ...]
    tolerance: Tolerance | None  # None: a side failed before it was chosen
    policy: GatePolicy
    verdict: Verdict
    reasons: tuple[str, ...]  # why it is not PASS, or what to know although it is
    gates: tuple[GateResult, ...]
    tokens: TokenSummary | None
    items: tuple[ItemReport, ...]
    distributions: tuple[DistributionReport, ...]
    scores: ScoreSummary | None
    labels: tuple[LabelReport, ...]
    benchmark: BenchmarkReport | None
    reproduce: str  # a command that asks the same again; "" when the asker knows none
    schema_version: str = SCHEMA_VERSION


@dataclass(frozen=True)
class _Body:
    """The fields of a document beside its kind, version and question."""

    created: str
    left: SideReport
    right: SideReport
    provenance_differences: tuple[ProvenanceDifference, ...]
    tolerance: Tolerance | None
    policy: GatePolicy
    verdict: Verdict
    reasons: tuple[str, ...]
    gates: tuple[GateResult, ...]
    tokens: TokenSummary | None
    items: tuple[ItemReport, ...]
    distributions: tuple[DistributionReport, ...]
    scores: ScoreSummary | None
    labels: tuple[LabelReport, ...]
    benchmark: BenchmarkReport | None
    reproduce: str


_BODY = tuple(field.name for field in fields(_Body))


def write_report(report: CompareReport) -> dict[str, Any]:
    """The report as a JSON object of plain values."""
    return {
        "kind": KIND,
        "score_debug_schema_version": report.schema_version,
        "question": question_to_json(report.question),
        **{name: to_json(getattr(report, name), name) for name in _BODY},
    }


def report_to_text(report: CompareReport, texts: FloatTexts | None = None) -> str:
    """One line of ASCII, the same for equal reports: it can be digested. `texts`: of numbers that other documents
    hold too."""
    return dump_json(write_report(report), texts, compact=True)


def report_digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def read_report(text: str) -> CompareReport:
    """Read a report, checked whole. An unknown major version is refused; a later minor may hold more fields."""
    document = parse_json(text, "the report")
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise malformed("kind", "not that of a comparison's report", f'an object with "kind": "{KIND}"')
    version = document.get("score_debug_schema_version")
    newer = check_version(version, SCHEMA_VERSION, "the report")
    question = read_question(document.get("question"), newer=newer)
    if question.kind is QuestionKind.TOKENIZE:
        raise malformed("question.kind", question.kind.value, "a question that asks for numbers")
    head = {"kind", "score_debug_schema_version", "question"}
    shell = {key: value for key, value in document.items() if key not in head}
    body = from_json(_Body, shell, newer=newer)
    assert isinstance(version, str)
    own = SCHEMA_VERSION if newer else version  # what is new was left, so it is written again as ours
    report = CompareReport(question=question, schema_version=own, **{n: getattr(body, n) for n in _BODY})
    check_items(report.items)
    check_summary(report.tokens, report.items)
    check_distributions(report.distributions)
    check_labels(report.labels)
    check_verdict(report.verdict, report.gates)
    check_ground(report.verdict, _find_ground(report))
    return report


def _find_ground(report: CompareReport) -> Ground:
    statuses = [line.status for line in report.distributions] + [line.status for line in report.labels]
    tokens, scores = report.tokens, report.scores
    aligned = (0 if tokens is None else tokens.aligned_count) + (0 if scores is None else scores.pairs)
    fails = {gate.gate for gate in report.gates if gate.verdict is GateVerdict.FAIL}
    return Ground(
        failed_side=report.left.problem is not None or report.right.problem is not None,
        failed_items=GateName.FAILURE_RATE in fails,
        parted=TokenStatus.ID_MISMATCH in statuses or (tokens is not None and tokens.first_id_mismatch is not None),
        compared=aligned > 0 or bool({TokenStatus.MATCH, TokenStatus.MISMATCH} & set(statuses)),
    )
