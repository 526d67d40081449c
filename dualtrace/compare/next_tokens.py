"""One prompt's next-token distributions of two sides as a line of the report.

It knows answers, the tolerance and what makes two answers incomparable. It must not know the bounds' arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dualtrace.compare.distributions import Known, Shared, diverge, known_of, share, top_of
from dualtrace.compare.figures import DistributionReport
from dualtrace.compare.pass_rule import PassRule, TokenStatus
from dualtrace.problems import Problem
from dualtrace.questions.answers import NextTokens
from dualtrace.runs.run import StoredProblem, store_problem


@dataclass(frozen=True)
class Read:
    """One side's answer for one prompt."""

    found: NextTokens | None  # None: it has none
    problem: Problem | None
    extra_ids: tuple[int, ...]
    holds_top: bool  # it told its most likely ids
    pieces: Mapping[int, bytes]  # of ids, as far as known

    @property
    def stored(self) -> StoredProblem | None:
        return None if self.problem is None else store_problem(self.problem)

    @property
    def all_pieces(self) -> dict[int, bytes]:
        own = {} if self.found is None else zip(self.found.top_ids.tolist(), self.found.top_pieces, strict=False)
        return {**self.pieces, **dict(own)}


def compare_next(item: int, left: Read, right: Read, rule: PassRule) -> tuple[DistributionReport, str | None]:
    """The line, and why the two cannot be compared, if so."""
    if left.found is None or right.found is None:
        return _blank(item, left, right, TokenStatus.UNAVAILABLE), None
    reason = _find_conflict(item, left, right)
    if reason is not None:
        return _blank(item, left, right, TokenStatus.ID_MISMATCH), reason
    known = known_of(left.found, left.extra_ids), known_of(right.found, right.extra_ids)
    shared = share(*known)
    if not shared.ids:
        reason = f"prompt {item}: the sides told no token id in common; ask for top_k of 1 or above"
        return _blank(item, left, right, TokenStatus.UNAVAILABLE), reason
    return _fill(item, left, right, shared, known, rule), None


def _fill(
    item: int, left: Read, right: Read, shared: Shared, known: tuple[Known, Known], rule: PassRule
) -> DistributionReport:
    divergences = diverge(shared)
    tops = [top_of(one, holds_top=side.holds_top) for one, side in zip(known, (left, right), strict=True)]
    agree = bool(rule.agree_columns(shared.left, shared.right).all())
    pieces = {**right.all_pieces, **left.all_pieces}
    return DistributionReport(
        item=item,
        status=TokenStatus.MATCH if agree else TokenStatus.MISMATCH,
        token_ids=shared.ids,
        tokens=tuple(pieces.get(one) for one in shared.ids) if pieces else None,
        left_logprobs=tuple(shared.left.tolist()),
        right_logprobs=tuple(shared.right.tolist()),
        left_tail=shared.left_tail,
        right_tail=shared.right_tail,
        max_abs_diff=float(np.abs(shared.left - shared.right).max()),
        kl_left_right_lower=divergences.kl_left_right_lower,
        kl_right_left_lower=divergences.kl_right_left_lower,
        js_lower=divergences.js_lower,
        js_upper=divergences.js_upper,
        top1_agrees=None if None in tops else tops[0] == tops[1],
        left_problem=left.stored,
        right_problem=right.stored,
    )


def _blank(item: int, left: Read, right: Read, status: TokenStatus) -> DistributionReport:
    return DistributionReport(
        item, status, (), None, (), (), None, None, None, None, None, None, None, None, left.stored, right.stored
    )


def _find_conflict(item: int, left: Read, right: Read) -> str | None:
    """Why these are no distributions of one kind over the same tokens after the same prompt."""
    assert left.found is not None
    assert right.found is not None
    one, other = left.found, right.found
    if one.vocab_size != other.vocab_size:
        return (
            f"prompt {item}: left has {one.vocab_size} token ids and right {other.vocab_size}: "
            "distributions over different vocabularies have no divergence; compare models of one vocabulary"
        )
    if one.prefix_token_id != other.prefix_token_id:
        return (
            f"prompt {item}: left put prefix token {one.prefix_token_id} before it and right "
            f"{other.prefix_token_id}; ask with one prefix policy for both"
        )
    if one.prompt_tokens != other.prompt_tokens:
        return (
            f"prompt {item}: left read {one.prompt_tokens} tokens and right {other.prompt_tokens}: "
            "the sides tokenise it differently; ask with token ids"
        )
    pieces = left.all_pieces, right.all_pieces
    for token in sorted(pieces[0].keys() & pieces[1].keys()):
        if pieces[0][token] != pieces[1][token]:
            told = f"{pieces[0][token]!r} on the left and {pieces[1][token]!r} on the right"
            return f"prompt {item}: token id {token} stands for {told}: the sides have different tokenizers"
    return None
