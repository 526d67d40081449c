"""Label scores of two sides, item by item, and what they amount to. It must not know gates or verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dualtrace.compare.align import broken
from dualtrace.compare.figures import LabelReport, ScoreSummary
from dualtrace.compare.pass_rule import PassRule, TokenStatus
from dualtrace.compare.statistics import mean
from dualtrace.problems import Problem
from dualtrace.questions.answers import ScoreResult
from dualtrace.questions.asked import ScoreQuestion
from dualtrace.runs.run import StoredProblem, store_problem


@dataclass(frozen=True)
class Scored:
    """One side's answer for one item."""

    found: ScoreResult | None  # None: it has none
    problem: Problem | None

    @property
    def stored(self) -> StoredProblem | None:
        return None if self.problem is None else store_problem(self.problem)


def labels_of(question: ScoreQuestion, item: int) -> tuple[int, ...]:
    if question.item_labels is not None:
        return question.item_labels[item] if item < len(question.item_labels) else ()
    return question.labels or ()


def find_miscounted(question: ScoreQuestion, found: Mapping[int, object]) -> dict[int, Problem]:
    """Items whose numbers are not one for each label, and why: none of them can be told from another."""
    problems: dict[int, Problem] = {}
    for item, result in found.items():
        if not isinstance(result, ScoreResult):
            continue
        asked, counts = len(labels_of(question, item)), (len(result.scores), len(result.label_logprobs))
        if counts[0] != asked or counts[1] not in (asked, 0):  # a scorer may have no logprobs to give
            told = f"{counts[0]} scores and {counts[1]} logprobs came for {asked} labels"
            problems[item] = broken(told).at(item=item)
    return problems


def compare_labels(
    item: int, labels: tuple[int, ...], left: Scored, right: Scored, rule: PassRule
) -> tuple[LabelReport, str | None]:
    """The line, and why the two cannot be compared, if so."""
    one, other = left.found, right.found
    if one is None or other is None:
        return _line(item, labels, left, right, TokenStatus.UNAVAILABLE), None
    if one.prompt_tokens != other.prompt_tokens:
        reason = (
            f"item {item}: left read {one.prompt_tokens} tokens and right {other.prompt_tokens}: "
            "the sides tokenise it differently; ask with token ids"
        )
        return _line(item, labels, left, right, TokenStatus.ID_MISMATCH), reason
    if len(one.scores) != len(other.scores):
        reason = f"item {item}: left scored {len(one.scores)} labels and right {len(other.scores)}"
        return _line(item, labels, left, right, TokenStatus.ID_MISMATCH), reason
    if not one.label_logprobs or len(one.label_logprobs) != len(other.label_logprobs):
        return _line(item, labels, left, right, TokenStatus.UNAVAILABLE), None
    agree = rule.agree_columns(np.array(one.label_logprobs), np.array(other.label_logprobs)).all()
    return _line(item, labels, left, right, TokenStatus.MATCH if agree else TokenStatus.MISMATCH), None


def _line(item: int, labels: tuple[int, ...], left: Scored, right: Scored, status: TokenStatus) -> LabelReport:
    one, other = left.found, right.found
    scores = [() if found is None else found.scores for found in (one, other)]
    compared = bool(scores[0] and scores[1]) and status is not TokenStatus.ID_MISMATCH
    diffs = np.abs(np.subtract(scores[0], scores[1])) if compared else None
    return LabelReport(
        item=item,
        status=status,
        label_token_ids=labels,
        left_scores=scores[0],
        right_scores=scores[1],
        left_label_logprobs=() if one is None else one.label_logprobs,
        right_label_logprobs=() if other is None else other.label_logprobs,
        max_abs_diff=None if diffs is None else float(diffs.max()),
        argmax_agrees=bool(np.argmax(scores[0]) == np.argmax(scores[1])) if compared else None,
        left_problem=left.stored,
        right_problem=right.stored,
    )


def summarize_scores(lines: Sequence[LabelReport]) -> ScoreSummary | None:
    """None when no score stands on both sides."""
    compared = [line for line in lines if line.max_abs_diff is not None]
    if not compared:
        return None
    diffs = np.concatenate([np.abs(np.subtract(line.left_scores, line.right_scores)) for line in compared])
    return ScoreSummary(
        pairs=len(diffs),
        max_abs_diff=float(diffs.max()),
        mean_abs_diff=mean(diffs),
        label_mismatch_count=sum(line.status is TokenStatus.MISMATCH for line in lines),
        argmax_changes=sum(line.argmax_agrees is False for line in lines),
    )
