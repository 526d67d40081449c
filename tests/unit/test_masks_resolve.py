"""A mask meets a sequence: spans, names, prefix tokens, layers and heads that exist."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dualtrace.masks.arrays import BoolArray
from dualtrace.masks.resolve import Cut, Geometry, MaskContext, ResolvedMask, resolve
from dualtrace.masks.spec import (
    Alignment,
    All,
    AnyOf,
    Array,
    BidirectionalPrefix,
    Causal,
    CharRange,
    DocIsolation,
    Edge,
    Expression,
    MaskSpec,
    Minus,
    Named,
    Not,
    SegmentName,
    Span,
    TokenRange,
)
from dualtrace.problems import Problem, Reason

GEOMETRY = Geometry(layers=3, heads=2)
# "The cat sat": three tokens and a mark without characters of its own.
TEXT = MaskContext(
    length=4,
    geometry=GEOMETRY,
    starts=np.array([0, 3, 7, 11], np.int32),
    ends=np.array([3, 7, 11, 11], np.int32),
    characters=12,
    segments={SegmentName.PROMPT: (0, 2), SegmentName.COMPLETION: (2, 4), SegmentName.ITEM: (2, 2)},
)
IDS = MaskContext(length=4, geometry=GEOMETRY)


def cutting(keys: Span, context: MaskContext = TEXT, **edge: Any) -> Cut:
    return resolve(MaskSpec(edges=(Edge(TokenRange(0, 1), keys, **edge),)), context).cuts[0]


def refusal(mask: MaskSpec | Expression, context: MaskContext = TEXT) -> Problem:
    with pytest.raises(Problem) as caught:
        resolve(mask if isinstance(mask, MaskSpec) else MaskSpec(mask), context)
    return caught.value


def refused_cut(keys: Span, context: MaskContext = TEXT, **edge: Any) -> Problem:
    return refusal(MaskSpec(edges=(Edge(TokenRange(0, 1), keys, **edge),)), context)


@pytest.mark.parametrize(
    ("span", "keys"),
    [
        (TokenRange(1, 3), (1, 3)),
        (Named(SegmentName.COMPLETION), (2, 4)),
        (CharRange(3, 7, Alignment.STRICT), (1, 2)),
        (CharRange(0, 7, Alignment.STRICT), (0, 2)),
        (CharRange(4, 5, Alignment.OVERLAP), (1, 2)),
        (CharRange(2, 8, Alignment.OVERLAP), (0, 3)),
        (CharRange(10, 12, Alignment.OVERLAP), (2, 3)),
    ],
)
def test_a_span_selects_its_tokens(span: Span, keys: tuple[int, int]) -> None:
    cut = cutting(span)
    assert (cut.k0, cut.k1) == keys


def test_a_token_that_ends_where_the_range_starts_is_outside() -> None:
    assert cutting(CharRange(7, 8, Alignment.OVERLAP)).k0 == 2


def test_strict_refuses_a_token_that_straddles_the_edge() -> None:
    problem = refused_cut(CharRange(4, 7, Alignment.STRICT))
    assert (problem.reason, problem.detail.field) == (Reason.UNALIGNABLE, "edges[0].keys.chars")


def test_overlap_says_which_tokens_straddle() -> None:
    resolved = resolve(MaskSpec(edges=(Edge(TokenRange(0, 1), CharRange(2, 8, Alignment.OVERLAP)),)), TEXT)
    assert resolved.notes == ("edges[0].keys.chars: characters 2-8 include all of token 0 and 2, which straddles",)


def test_overlap_without_a_straddling_token_needs_no_note() -> None:
    spec = MaskSpec(edges=(Edge(TokenRange(0, 1), CharRange(0, 7, Alignment.OVERLAP)),))
    assert resolve(spec, TEXT).notes == ()


@pytest.mark.parametrize(
    ("span", "context", "reason"),
    [
        (TokenRange(3, 5), TEXT, Reason.OUT_OF_RANGE),
        (CharRange(0, 13, Alignment.OVERLAP), TEXT, Reason.OUT_OF_RANGE),
        (CharRange(11, 12, Alignment.OVERLAP), TEXT, Reason.UNALIGNABLE),
        (CharRange(0, 3, Alignment.STRICT), IDS, Reason.CONFLICT),
        (Named(SegmentName.QUERY), TEXT, Reason.MISSING),
        (Named(SegmentName.ITEM), TEXT, Reason.EMPTY),
    ],
)
def test_a_span_that_means_nothing_here_is_refused(span: Span, context: MaskContext, reason: Reason) -> None:
    assert refused_cut(span, context).reason is reason


def test_a_layer_that_does_not_exist_is_refused_with_the_range() -> None:
    problem = refused_cut(TokenRange(0, 1), layers=(1, 3))
    assert problem.detail.message == "layer 3 asked; the model has 3 (0-2)"
    assert (problem.reason, problem.detail.field) == (Reason.OUT_OF_RANGE, "edges[0].layers[1]")


def test_a_head_that_does_not_exist_is_refused_with_the_range() -> None:
    assert refused_cut(TokenRange(0, 1), heads=(2,)).detail.message == "query head 2 asked; the model has 2 (0-1)"


def test_token_indices_do_not_count_the_prefix() -> None:
    behind = MaskContext(length=5, geometry=GEOMETRY, prefix=1)
    cut = cutting(TokenRange(1, 3), behind)
    assert (cut.q0, cut.q1, cut.k0, cut.k1) == (1, 2, 2, 4)


@pytest.mark.parametrize(
    ("base", "field"),
    [
        (BidirectionalPrefix(n=5), "base.bidirectional_prefix.n"),
        (DocIsolation(boundaries=(4,)), "base.doc_isolation.boundaries"),
        (DocIsolation(segment_ids=(0, 0, 1)), "base.doc_isolation.segment_ids"),
        (AnyOf((Causal(), Array(BoolArray(np.ones((3, 3), np.bool_))))), "base.any[1].array"),
        (Array(BoolArray(np.ones((3, 4, 4), np.bool_))), "base.array"),
        (Array(BoolArray(np.ones((2, 2, 4, 4), np.bool_))), "base.array"),
    ],
)
def test_a_base_made_for_another_sequence_or_model_is_refused(base: Expression, field: str) -> None:
    problem = refusal(base)
    assert (problem.reason, problem.detail.field) == (Reason.OUT_OF_RANGE, field)


def test_a_stored_array_is_fetched_by_its_digest() -> None:
    stored = BoolArray(np.tri(4, dtype=np.bool_))
    name = "sha256:" + "0" * 64
    resolved = resolve(MaskSpec(Array(artifact_digest=name)), TEXT, {name: stored}.__getitem__)
    assert resolved.base == Array(stored)


def test_an_array_that_is_not_stored_is_not_found() -> None:
    assert refusal(Array(artifact_digest="sha256:" + "0" * 64)).code_name == "NOT_FOUND"


def resetting(*boundaries: int) -> DocIsolation:
    return DocIsolation(boundaries=boundaries, reset_positions=True)


def resolved_positions(base: Expression, **context: Any) -> ResolvedMask:
    return resolve(MaskSpec(base), MaskContext(length=5, geometry=GEOMETRY, **context))


def test_reset_positions_start_again_in_each_document() -> None:
    assert resolved_positions(resetting(2, 3)).positions.tolist() == [0, 1, 0, 0, 1]


def test_a_document_that_comes_back_counts_on() -> None:
    base = DocIsolation(segment_ids=(4, 9, 4, 4, 9), reset_positions=True)
    assert resolved_positions(base).positions.tolist() == [0, 0, 1, 2, 1]


def test_a_prefix_token_belongs_to_the_first_document() -> None:
    assert resolved_positions(resetting(2), prefix=1).positions.tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    "base",
    [Not(resetting(2)), Minus(Causal(), resetting(2)), All((resetting(2), resetting(3)))],
)
def test_resets_that_contradict_are_refused(base: Expression) -> None:
    assert refusal(base).reason is Reason.CONFLICT


def test_positions_of_the_request_and_of_the_mask_exclude_each_other() -> None:
    context = MaskContext(length=4, geometry=GEOMETRY, positions=np.array([0, 1, 0, 1], np.int32))
    assert refusal(resetting(2), context).reason is Reason.CONFLICT


def test_a_sequence_longer_than_the_limit_is_refused() -> None:
    with pytest.raises(Problem) as caught:
        MaskContext(length=131_073, geometry=GEOMETRY)
    assert caught.value.reason is Reason.MASK_TOO_LARGE


def test_a_sequence_without_rows_is_refused() -> None:
    with pytest.raises(Problem) as caught:
        MaskContext(length=0, geometry=GEOMETRY)
    assert caught.value.reason is Reason.EMPTY
