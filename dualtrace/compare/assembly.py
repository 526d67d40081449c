"""Everything that was found, put together as a report. It knows all the parts; each figure is made elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from dualtrace.compare import gates as g
from dualtrace.compare.events import ProvenanceDifference
from dualtrace.compare.figures import DistributionReport, ItemReport, LabelReport, ScoreSummary, TokenSummary
from dualtrace.compare.header_conflicts import find_header_conflict
from dualtrace.compare.labels import Scored, compare_labels, labels_of, summarize_scores
from dualtrace.compare.next_tokens import Read, compare_next
from dualtrace.compare.pass_rule import PassRule, TokenStatus
from dualtrace.compare.report import BenchmarkReport, CompareReport, SideReport
from dualtrace.compare.side_answer import SideAnswer
from dualtrace.compare.sides import SIDES, SideFacts, SideName
from dualtrace.compare.statistics import summarize_tokens
from dualtrace.compare.tokens import ItemPairs
from dualtrace.compare.tolerance import Tolerance
from dualtrace.compare.verdict import Evidence, decide
from dualtrace.compare.wording import describe_divergence, describe_id_mismatch, write_notes
from dualtrace.masks import json_form
from dualtrace.model_card import ModelProvenance
from dualtrace.problems import Problem
from dualtrace.questions.answers import NextTokens, ScoreResult
from dualtrace.questions.asked import (
    MaskedForwardQuestion,
    NextTokenQuestion,
    ScoreQuestion,
    StreamQuestion,
    TokenizeQuestion,
)
from dualtrace.runs.run import AskedQuestion, StoredProblem, store_problem


@dataclass(frozen=True)
class Findings:
    """What a comparator knows when it is asked for its report."""

    question: AskedQuestion
    tolerance: Tolerance | None
    policy: g.GatePolicy
    answers: Mapping[SideName, SideAnswer]
    facts: Mapping[SideName, SideFacts]
    items: tuple[ItemPairs, ...]
    extra_ids: Mapping[SideName, tuple[int, ...]]

    @property
    def left(self) -> SideAnswer:
        return self.answers[SideName.LEFT]

    def own_question(self, side: SideName) -> AskedQuestion:
        """As it was asked of this side: a stored run may have been asked for more or less."""
        run = self.facts[side].run
        return self.question if run is None else run.question

    @property
    def right(self) -> SideAnswer:
        return self.answers[SideName.RIGHT]


@dataclass(frozen=True)
class _Figures:
    """The compared numbers of one question; what it does not ask for is empty."""

    tokens: TokenSummary | None = None
    distributions: tuple[DistributionReport, ...] = ()
    labels: tuple[LabelReport, ...] = ()
    scores: ScoreSummary | None = None
    conflicts: tuple[str, ...] = ()
    judged: int = 0  # pairs that were held against the tolerance
    mismatches: int = 0
    unit: str = "tokens"


def assemble(findings: Findings, *, created: str, reproduce: str, benchmark: BenchmarkReport | None) -> CompareReport:
    figures = _compare(findings)
    gates = _judge_gates(findings, figures, benchmark)
    verdict, reasons = decide(_gather_evidence(findings, figures, gates))
    left, right = findings.left.provenance, findings.right.provenance
    return CompareReport(
        created=created,
        question=_without_variants(findings.question),
        left=_report_side(findings, SideName.LEFT),
        right=_report_side(findings, SideName.RIGHT),
        provenance_differences=find_differences(left, right) if left is not None and right is not None else (),
        tolerance=findings.tolerance,
        policy=findings.policy,
        verdict=verdict,
        reasons=reasons,
        gates=gates,
        tokens=figures.tokens,
        items=tuple(_report_item(findings, pairs) for pairs in findings.items),
        distributions=figures.distributions,
        scores=figures.scores,
        labels=figures.labels,
        benchmark=benchmark,
        reproduce=reproduce,
    )


def _without_variants(question: AskedQuestion) -> AskedQuestion:
    """The question as a report keeps it: its variants stand with the sides."""
    return question if isinstance(question, TokenizeQuestion) else replace(question, variants=())


def find_differences(left: ModelProvenance, right: ModelProvenance) -> tuple[ProvenanceDifference, ...]:
    pairs = [(field.name, getattr(left, field.name), getattr(right, field.name)) for field in fields(left)]
    return tuple(ProvenanceDifference(name, _told(one), _told(other)) for name, one, other in pairs if one != other)


def _told(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{name}={digest}" for name, digest in value)
    return str(value)


def _compare(findings: Findings) -> _Figures:
    # Without a tolerance a side has failed before it said who it is: nothing is judged then.
    rule = PassRule(0.0, 0.0) if findings.tolerance is None else findings.tolerance.rule
    if isinstance(findings.question, StreamQuestion):
        return _compare_tokens(findings, rule)
    if isinstance(findings.question, NextTokenQuestion):
        return _compare_distributions(findings, findings.question, rule)
    assert isinstance(findings.question, ScoreQuestion)
    return _compare_scores(findings, findings.question, rule)


def _compare_tokens(findings: Findings, rule: PassRule) -> _Figures:
    summary = summarize_tokens(findings.items, rule, _find_unavailable(findings))
    conflicts = tuple(reason for pairs in findings.items if (reason := _find_conflict(findings, pairs)) is not None)
    return _Figures(
        tokens=summary, conflicts=conflicts, judged=summary.aligned_count, mismatches=summary.token_mismatch_count
    )


def _find_conflict(findings: Findings, pairs: ItemPairs) -> str | None:
    """Why the two sides did not read the same text in the same way."""
    if pairs.id_mismatch is not None:
        return describe_id_mismatch(pairs.id_mismatch)
    if not all(pairs.item in answer.done for answer in (findings.left, findings.right)):
        return None  # a side that failed has not told what it read
    return find_header_conflict(pairs.item, pairs.aligner.left.header, pairs.aligner.right.header)


def _find_unavailable(findings: Findings) -> tuple[str, ...]:
    """Columns that one side lacks although it has scored tokens, or that nobody asked for."""
    missing = []
    ranks = [answer.ranks.values for answer in (findings.left, findings.right)]
    if any(len(column) and not (column > 0).any() for column in ranks):
        missing.append("token_ranks")
    if not any(item.compared_tops for item in findings.items):
        missing.append("token_candidates")
    question = findings.question
    for name in ("kl_base_masked", "kl_masked_base"):
        asked = isinstance(question, MaskedForwardQuestion) and getattr(question, name)
        if not asked or not any(name in item.worst_kl for item in findings.items):
            missing.append(f"token_{name}")
    return tuple(missing)


def _compare_distributions(findings: Findings, question: NextTokenQuestion, rule: PassRule) -> _Figures:
    found = [
        compare_next(
            item,
            _read(findings, SideName.LEFT, item),
            _read(findings, SideName.RIGHT, item),
            rule,
        )
        for item in range(len(question.prompts))
    ]
    lines = tuple(line for line, _ in found)
    judged, mismatches = _count([line.status for line in lines])
    return _Figures(
        distributions=lines,
        conflicts=tuple(conflict for _, conflict in found if conflict is not None),
        judged=judged,
        mismatches=mismatches,
        unit="distributions",
    )


def _read(findings: Findings, side: SideName, item: int) -> Read:
    answer, found = findings.answers[side], findings.answers[side].whole.get(item)
    next_tokens = found if isinstance(found, NextTokens) else None
    own = findings.own_question(side)
    holds_top = isinstance(own, NextTokenQuestion) and own.top_k > 0
    return Read(next_tokens, answer.problems.get(item), findings.extra_ids[side], holds_top, answer.pieces)


def _compare_scores(findings: Findings, question: ScoreQuestion, rule: PassRule) -> _Figures:
    found = [
        compare_labels(
            item,
            labels_of(question, item),
            _scored(findings, SideName.LEFT, item),
            _scored(findings, SideName.RIGHT, item),
            rule,
        )
        for item in range(len(question.items))
    ]
    lines = tuple(line for line, _ in found)
    judged, mismatches = _count([line.status for line in lines])
    return _Figures(
        labels=lines,
        scores=summarize_scores(lines),
        conflicts=tuple(conflict for _, conflict in found if conflict is not None),
        judged=judged,
        mismatches=mismatches,
        unit="label lists",
    )


def _scored(findings: Findings, side: SideName, item: int) -> Scored:
    answer, found = findings.answers[side], findings.answers[side].whole.get(item)
    return Scored(found if isinstance(found, ScoreResult) else None, answer.problems.get(item))


def _count(statuses: list[TokenStatus]) -> tuple[int, int]:
    """How many were judged, and how many of them are out of tolerance."""
    mismatches = statuses.count(TokenStatus.MISMATCH)
    return mismatches + statuses.count(TokenStatus.MATCH), mismatches


def _judge_gates(findings: Findings, figures: _Figures, timed: BenchmarkReport | None) -> tuple[g.GateResult, ...]:
    policy, scores = findings.policy, figures.scores
    worst, average = (None, None) if scores is None else (scores.max_abs_diff, scores.mean_abs_diff)
    return (
        g.judge_token_parity(policy, figures.judged, figures.mismatches, figures.unit),
        g.judge_score_parity(policy, worst, average),
        g.judge_latency(
            policy,
            None if timed is None else g.Latency(timed.left_samples, timed.left_p95_ms),
            None if timed is None else g.Latency(timed.right_samples, timed.right_p95_ms),
        ),
        g.judge_failures(
            policy,
            _failure_rate(findings.left, None if timed is None else timed.left_failure_rate),
            _failure_rate(findings.right, None if timed is None else timed.right_failure_rate),
        ),
        _judge_receipts(findings),
    )


def _failure_rate(answer: SideAnswer, of_calls: float | None) -> float | None:
    if answer.problem is not None:
        return 1.0
    of_items = len(answer.problems) / answer.item_count if answer.item_count else None
    return max((rate for rate in (of_items, of_calls) if rate is not None), default=None)


def _judge_receipts(findings: Findings) -> g.GateResult:
    left, right = findings.left, findings.right
    one, other = (findings.facts[side].variant.mask for side in SIDES)
    same = one is not None and other is not None and json_form.digest(one) == json_form.digest(other)
    parted = {pairs.item for pairs in findings.items if pairs.id_mismatch is not None}
    pairs = [
        g.ReceiptPair(item, _receipt(left, item), _receipt(right, item), same_tokens=item not in parted)
        for item in range(left.item_count)
        if _answered(left, item) and _answered(right, item)
    ]
    return g.judge_receipts(pairs, left_masked=one is not None, right_masked=other is not None, same_mask=same)


def _answered(answer: SideAnswer, item: int) -> bool:
    """An item with nothing to score ran no forward, so it has no receipt to give."""
    done = answer.done.get(item)
    ran = done is not None and (done.scored_tokens > 0 or done.applied is not None)
    return ran or item in answer.whole


def _receipt(answer: SideAnswer, item: int) -> str | None:
    applied = answer.applied.get(item)
    return None if applied is None else applied.receipt.effective_mask_digest


def _gather_evidence(findings: Findings, figures: _Figures, gates: tuple[g.GateResult, ...]) -> Evidence:
    sides = [
        (side, findings.facts[side].target, problem)
        for side in SIDES
        if (problem := findings.answers[side].problem) is not None
    ]
    items = [
        (side, item, problem) for side in SIDES for item, problem in sorted(findings.answers[side].problems.items())
    ]
    return Evidence(
        side_problems=tuple(sides),
        item_problems=tuple(items),
        conflicts=figures.conflicts,
        compared=figures.judged + (0 if figures.scores is None else figures.scores.pairs),
        gates=gates,
        divergence=describe_divergence(findings.items, findings.tolerance, figures.tokens),
        notes=write_notes(findings.items, figures.tokens, findings.left.provenance, findings.right.provenance),
    )


def _report_side(findings: Findings, side: SideName) -> SideReport:
    answer, facts = findings.answers[side], findings.facts[side]
    ranks = [rank for rank in answer.ranks.values.tolist() if rank > 0]
    return SideReport(
        target=facts.target,
        variant=facts.variant,
        provenance=answer.provenance,
        identity=None if facts.run is None else facts.run.identity,
        usage=answer.usage,
        execution=answer.execution,
        total_seconds=None if facts.total_seconds is None else float(facts.total_seconds),
        mrr=math.fsum(1 / rank for rank in ranks) / len(ranks) if ranks else None,
        rank1_share=ranks.count(1) / len(ranks) if ranks else None,
        delta_modules=answer.delta_modules,
        problem=_stored(answer.problem),
    )


def _stored(problem: Problem | None) -> StoredProblem | None:
    return None if problem is None else store_problem(problem)


def _report_item(findings: Findings, pairs: ItemPairs) -> ItemReport:
    left, right = findings.left, findings.right
    item, divergence = pairs.item, pairs.first_divergence
    headers = pairs.aligner.left.header, pairs.aligner.right.header
    return ItemReport(
        item=item,
        prompt_tokens=max(header.prompt_tokens for header in headers),
        token_count=max(header.token_count for header in headers),
        kept_tokens=pairs.kept,
        cut_tokens=len(pairs.codes) - pairs.kept,
        columns=pairs.columns(),
        first_divergence_index=None if divergence is None else divergence.index,
        mismatches=pairs.mismatches,
        left_total=_total(left, item),
        right_total=_total(right, item),
        left_applied=left.applied.get(item),
        right_applied=right.applied.get(item),
        left_problem=_stored(left.problems.get(item)),
        right_problem=_stored(right.problems.get(item)),
    )


def _total(answer: SideAnswer, item: int) -> float | None:
    done = answer.done.get(item)
    total = None if done is None else done.total_logprob
    return total if total is not None and math.isfinite(total) else None
