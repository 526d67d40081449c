"""The reference engine obeys masks: what they mean for the numbers, and that the receipt proves them applied."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dualtrace.arrays import FloatArray
from dualtrace.engine import NOTHING, Batch, Read, Segment, int_array
from dualtrace.masks import packing, receipt
from dualtrace.masks import spec as s
from dualtrace.masks.arrays import BoolArray
from dualtrace.masks.plan import MaskPlan
from dualtrace.problems import Problem, Reason
from dualtrace.reference import attention
from dualtrace.reference.attention import Sight
from dualtrace.reference.engine import ReferenceEngine
from dualtrace.reference.masking import PlannedMask
from tests.support.masked import IDS, MASKS, TOKENS, ask, ask_shared, edge, plan_for, read_all, run, whole
from tests.support.tiny import tiny_reference
from tests.support.tolerances import FLOAT64

FAMILIES: dict[str, dict[str, Any]] = {
    "llama mha": {},
    "llama mqa": {"attention": "mqa"},
    "llama gqa": {"attention": "gqa"},
    "gpt2": {"family": "gpt2"},
}
EXACT = FLOAT64.abs_epsilon
PACKED_SAME_AS_SEPARATE = 1e-12  # issue 3: hidden-delimiter packing equals separate scoring, in float64


@pytest.fixture(params=FAMILIES)
def engine(request: pytest.FixtureRequest) -> ReferenceEngine:
    return tiny_reference(**FAMILIES[request.param])


def masked(engine: ReferenceEngine, spec: s.MaskSpec) -> FloatArray:
    return ask(engine, plan_for(engine.card, spec)).logprobs


# --- what masks mean


def test_a_causal_mask_changes_nothing(engine: ReferenceEngine) -> None:
    assert np.array_equal(masked(engine, s.MaskSpec()), ask(engine).logprobs)


def test_a_causal_matrix_is_the_causal_preset(engine: ReferenceEngine) -> None:
    array = s.Array(BoolArray(np.tri(TOKENS, dtype=bool)))
    assert np.array_equal(masked(engine, s.MaskSpec(base=array)), masked(engine, s.MaskSpec()))


def test_no_edges_are_the_base(engine: ReferenceEngine) -> None:
    base = s.Sliding(6)
    assert np.array_equal(masked(engine, s.MaskSpec(base, edges=())), masked(engine, s.MaskSpec(base)))


def test_isolated_documents_are_scored_as_if_each_stood_alone(engine: ReferenceEngine) -> None:
    together = masked(engine, s.MaskSpec(s.DocIsolation(boundaries=(9, 16), reset_positions=True)))
    for start, stop in ((0, 9), (9, 16), (16, TOKENS)):
        alone = ask(engine, ids=IDS[start:stop]).logprobs
        assert together[start : stop - 1] == pytest.approx(alone[:-1], abs=EXACT)


def test_a_window_as_long_as_the_text_is_causal(engine: ReferenceEngine) -> None:
    assert np.array_equal(masked(engine, s.MaskSpec(s.Sliding(TOKENS))), masked(engine, s.MaskSpec()))


def test_a_window_of_one_layer_deep_forgets_what_lies_before_it() -> None:
    engine = tiny_reference(layers=1)
    changed = np.concatenate([[IDS[0] + 1], IDS[1:]]).astype(np.int32)
    plan = plan_for(engine.card, s.MaskSpec(s.Sliding(4)))
    left, right = ask(engine, plan).logprobs, ask(engine, plan, ids=changed).logprobs
    assert (left[:4] != right[:4]).all()
    assert np.array_equal(left[4:], right[4:])


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("head", [0, 3])
def test_an_edge_changes_the_rows_it_cuts_and_none_before(engine: ReferenceEngine, layer: int, head: int) -> None:
    cut = masked(engine, s.MaskSpec(edges=(edge((12, 14), (2, 9), layers=(layer,), heads=(head,)),)))
    base = ask(engine).logprobs
    assert np.array_equal(cut[:12], base[:12])
    assert (np.abs(cut[12:14] - base[12:14]) > 1e-6).all()


def test_an_edge_in_the_last_layer_changes_no_later_row(engine: ReferenceEngine) -> None:
    cut = masked(engine, s.MaskSpec(edges=(edge((12, 14), (2, 9), layers=(2,)),)))
    assert np.array_equal(cut[14:], ask(engine).logprobs[14:])


def test_other_layers_and_other_heads_give_other_numbers(engine: ReferenceEngine) -> None:
    found = [
        masked(engine, s.MaskSpec(edges=(edge((12, 24), (2, 9), layers=(layer,), heads=(head,)),)))
        for layer in range(3)
        for head in range(4)
    ]
    for i, left in enumerate(found):
        assert all(np.abs(left - right).max() > 1e-6 for right in found[i + 1 :])


def test_cutting_before_the_softmax_is_not_zeroing_after_it(engine: ReferenceEngine) -> None:
    cuts = [masked(engine, s.MaskSpec(edges=(edge((12, 24), (2, 9), mode=mode),))) for mode in s.CutMode]
    assert np.abs(cuts[0] - cuts[1])[12:].max() > 1e-6


def test_cutting_every_key_and_zeroing_every_key_are_the_same(engine: ReferenceEngine) -> None:
    def everything(mode: s.CutMode) -> FloatArray:
        span = edge((12, 15), (0, TOKENS), mode=mode, layers=(1,))
        return masked(engine, s.MaskSpec(edges=(span,), empty_row=s.EmptyRow.ZERO))

    zeroed, cut = everything(s.CutMode.POST_SOFTMAX_ZERO), everything(s.CutMode.PRE_SOFTMAX)
    assert zeroed == pytest.approx(cut, abs=EXACT)


def test_an_empty_row_that_sees_itself_is_the_row_whose_own_key_is_left(engine: ReferenceEngine) -> None:
    restored = masked(engine, s.MaskSpec(edges=(edge((7, 8), (0, 24)),), empty_row=s.EmptyRow.SELF))
    itself = masked(engine, s.MaskSpec(edges=(edge((7, 8), (0, 7)), edge((7, 8), (8, 24)))))
    assert np.array_equal(restored, itself)


def test_zero_and_self_are_different_answers_to_an_empty_row(engine: ReferenceEngine) -> None:
    cuts = (edge((7, 8), (0, 24), layers=(1,)),)
    zero, own = (masked(engine, s.MaskSpec(edges=cuts, empty_row=rule)) for rule in (s.EmptyRow.ZERO, s.EmptyRow.SELF))
    assert np.isfinite(zero).all()
    assert abs(zero[7] - own[7]) > 1e-6


# --- packed scoring


QUERY, ITEMS, DELIMITER = [5, 300, 17, 42], [[7, 99, 311], [20], [64, 5, 8, 210]], 33


def packed(engine: ReferenceEngine, convention: packing.Convention) -> FloatArray:
    """[items, V]: logprobs of every id at the row where each item is read."""
    delimiters = packing.delimiter_indices(len(QUERY), [len(item) for item in ITEMS])
    ids = int_array([*QUERY, *(token for item in ITEMS for token in (DELIMITER, *item)), DELIMITER])
    positions = packing.positions(delimiters, ids.size, convention)
    plan = plan_for(engine.card, packing.mask(delimiters, ids.size, convention), ids.size, positions=positions)
    rows = int_array(packing.read_rows(delimiters, ids.size, convention))
    read = Read(rows, extra_ids=int_array(range(engine.card.vocab_size)))
    ((readout,),) = engine.forward(batch_of(Segment(ids, positions, mask=plan)), (read,), lambda _: True)
    assert readout.extra_logprobs is not None
    return readout.extra_logprobs


def separate(engine: ReferenceEngine, between: list[int]) -> FloatArray:
    read_last = [len(QUERY) + len(between) + len(item) - 1 for item in ITEMS]
    segments = [whole(int_array([*QUERY, *between, *item])) for item in ITEMS]
    everything = int_array(range(engine.card.vocab_size))
    reads = tuple(Read(int_array([row]), extra_ids=everything) for row in read_last)
    steps = list(engine.forward(batch_of(*segments), reads, lambda _: True))
    return np.concatenate([readout.extra_logprobs for (readout,) in steps if readout.extra_logprobs is not None])


def batch_of(*segments: Segment) -> Batch:
    return Batch(segments)


def test_packing_with_hidden_delimiters_equals_scoring_each_item_after_the_query(engine: ReferenceEngine) -> None:
    found = packed(engine, packing.Convention.MIS_HIDDEN_DELIMITER)
    assert found == pytest.approx(separate(engine, []), abs=PACKED_SAME_AS_SEPARATE)


def test_packing_with_visible_delimiters_equals_query_delimiter_and_item(engine: ReferenceEngine) -> None:
    found = packed(engine, packing.Convention.MIS_VISIBLE_DELIMITER)
    assert found == pytest.approx(separate(engine, [DELIMITER]), abs=PACKED_SAME_AS_SEPARATE)


# --- sharing, and long rows


@pytest.mark.parametrize("name", MASKS)
def test_a_prefix_and_its_rest_count_as_much_as_the_whole(name: str) -> None:
    engine = tiny_reference()
    plan = plan_for(engine.card, MASKS[name])
    at = int(plan.step_ends()[plan.step_ends().size // 2])
    answer, counts = ask_shared(engine, at, plan)
    assert np.array_equal(answer.logprobs, ask(engine, plan).logprobs)
    receipt.check(counts, plan)


def test_a_segment_without_rows_of_its_own_counts_nothing() -> None:
    engine = tiny_reference()
    plan = plan_for(engine.card, MASKS["sliding"])
    counts = run(engine, [whole(mask=plan), Segment(IDS[:0], IDS[:0], 0, mask=plan)], (NOTHING, read_all()))[1].counts
    assert counts is not None
    assert not counts.rows.any()


def test_a_cut_where_the_mask_has_none_is_refused() -> None:
    engine = tiny_reference()
    plan = plan_for(engine.card, MASKS["full"])
    with pytest.raises(Problem, match="sees a key past the end") as caught:
        ask_shared(engine, 8, plan)
    assert caught.value.reason is Reason.BUG


@pytest.mark.parametrize("name", ["documents from 0", "edge in one layer and head", "zeroed after the softmax", "full"])
def test_the_block_of_rows_that_attention_works_in_changes_no_number(
    name: str, engine: ReferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(engine.card, MASKS[name])
    large = ask(engine, plan)
    monkeypatch.setattr(attention, "BLOCK_ROWS", 5)
    small = ask(engine, plan)
    assert small.logprobs == pytest.approx(large.logprobs, abs=EXACT)
    assert small.counts is not None
    receipt.check(small.counts, plan)


# --- receipts, and planted faults


@pytest.mark.parametrize("name", MASKS)
def test_the_receipt_is_the_one_that_the_mask_demands(name: str, engine: ReferenceEngine) -> None:
    plan = plan_for(engine.card, MASKS[name])
    counts = ask(engine, plan).counts
    assert counts is not None
    assert receipt.check(counts, plan).effective_mask_digest == receipt.effective_mask_digest(plan)


def test_without_a_mask_there_is_no_receipt() -> None:
    assert ask(tiny_reference()).counts is None


FULL_SPEC = s.MaskSpec(
    edges=(
        edge((12, 24), (2, 9), layers=(1,)),
        edge((15, 16), (3, 4), layers=(2,), heads=(3,)),
        edge((9, 12), (4, 8), mode=s.CutMode.POST_SOFTMAX_ZERO, heads=(0,)),
    ),
)


def _drop_an_edge(sight: Sight, layer: int) -> Sight:
    return replace(sight, allowed=np.tri(*sight.allowed.shape[1:], dtype=np.bool_)[None]) if layer == 2 else sight


def _drop_a_head(sight: Sight, layer: int) -> Sight:
    heads = np.repeat(sight.allowed, 4, axis=0) if sight.allowed.shape[0] == 1 else sight.allowed.copy()
    heads[2] = np.tri(*heads.shape[1:], dtype=np.bool_)
    return replace(sight, allowed=heads)


def _drop_a_layer(sight: Sight, layer: int) -> Sight:
    return replace(sight, allowed=np.tri(*sight.allowed.shape[1:], dtype=np.bool_)[None]) if layer == 1 else sight


def _shift_by_a_key(sight: Sight, layer: int) -> Sight:
    return replace(sight, allowed=np.roll(sight.allowed, 1, axis=2))


def _swap_two_heads(sight: Sight, layer: int) -> Sight:
    return replace(sight, allowed=sight.allowed[[0, 1, 3, 2]] if sight.allowed.shape[0] > 1 else sight.allowed)


def _forget_to_zero(sight: Sight, layer: int) -> Sight:
    return replace(sight, zeroed=None)


def _see_one_key_more(sight: Sight, layer: int) -> Sight:
    allowed = sight.allowed.copy()
    allowed[0, 13, 5] = True
    return replace(sight, allowed=allowed)


@pytest.mark.parametrize(
    "fault",
    [
        _drop_an_edge, _drop_a_head, _drop_a_layer, _shift_by_a_key, _swap_two_heads, _forget_to_zero,
        _see_one_key_more,
    ],
    ids=lambda fault: fault.__name__.strip("_"),
)  # fmt: skip
def test_an_engine_that_applies_another_mask_is_found_out(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_reference()
    plan = plan_for(engine.card, FULL_SPEC)
    honest = PlannedMask.sight
    monkeypatch.setattr(PlannedMask, "sight", lambda self, layer, q0, q1: fault(honest(self, layer, q0, q1), layer))
    counts = ask(engine, plan).counts
    assert counts is not None
    with pytest.raises(Problem) as caught:
        receipt.check(counts, plan)
    assert caught.value.reason is Reason.MASK_NOT_APPLIED


def test_an_attention_that_gives_a_head_its_neighbours_mask_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_reference()
    plan = plan_for(engine.card, FULL_SPEC)
    monkeypatch.setattr(attention, "_of_head", lambda blocks, head: blocks[(head + 1) % blocks.shape[0]])
    counts = ask(engine, plan).counts
    assert counts is not None
    with pytest.raises(Problem) as caught:
        receipt.check(counts, plan)
    assert caught.value.reason is Reason.MASK_NOT_APPLIED


# --- refusals


def other_heads() -> MaskPlan:
    return plan_for(tiny_reference(heads=2).card, MASKS["sliding"])


def too_short() -> MaskPlan:
    return plan_for(tiny_reference().card, MASKS["causal"], TOKENS - 1)


@pytest.mark.parametrize("plan", [other_heads, too_short])
def test_a_plan_for_another_model_or_text_is_refused(plan: Any) -> None:
    with pytest.raises(Problem) as caught:
        ask(tiny_reference(), plan())
    assert caught.value.reason is Reason.UNSUPPORTED_MASK


def test_positions_that_the_mask_did_not_give_are_refused() -> None:
    engine = tiny_reference()
    plan = plan_for(engine.card, MASKS["documents from 0"])
    wrong = Segment(IDS, int_array(range(TOKENS)), mask=plan)
    with pytest.raises(Problem) as caught:
        run(engine, [wrong], [read_all()])
    assert caught.value.reason is Reason.CONFLICT


# --- contrasts


def all_logprobs(engine: ReferenceEngine, mask: MaskPlan | None) -> FloatArray:
    """[T, V]"""
    read = Read(int_array(range(TOKENS)), extra_ids=int_array(range(engine.card.vocab_size)))
    ((readout,),) = engine.forward(batch_of(whole(mask=mask)), (read,), lambda _: True)
    assert readout.extra_logprobs is not None
    return readout.extra_logprobs


@pytest.mark.parametrize("base_is_read", [True, False])
def test_kl_both_ways_equals_the_sum_over_the_vocabulary(engine: ReferenceEngine, base_is_read: bool) -> None:
    plan = plan_for(engine.card, MASKS["edges"])
    reads = (read_all() if base_is_read else NOTHING, read_all(against=0))
    found = run(engine, [whole(), whole(mask=plan)], reads)[1]
    base, cut = all_logprobs(engine, None), all_logprobs(engine, plan)
    assert found.kl_from_against == pytest.approx((np.exp(base) * (base - cut)).sum(axis=1), abs=1e-12)
    assert found.kl_to_against == pytest.approx((np.exp(cut) * (cut - base)).sum(axis=1), abs=1e-12)
    assert found.kl_from_against is not None
    assert found.kl_from_against[12:].min() > 1e-6


def test_a_text_has_no_divergence_from_itself(engine: ReferenceEngine) -> None:
    found = run(engine, [whole(), whole()], (read_all(), read_all(against=0)))[1]
    assert found.kl_from_against is not None
    assert not found.kl_from_against.any()


@pytest.mark.parametrize(
    ("against", "ids", "reason"),
    [(1, IDS, Reason.OUT_OF_RANGE), (2, IDS, Reason.OUT_OF_RANGE), (-1, IDS, Reason.OUT_OF_RANGE),
     (0, IDS[::-1], Reason.CONFLICT)],
)  # fmt: skip
def test_a_contrast_with_a_later_segment_or_another_text_is_refused(against: int, ids: Any, reason: Reason) -> None:
    with pytest.raises(Problem) as caught:
        run(tiny_reference(), [whole(), whole(ids)], (read_all(), read_all(against=against)))
    assert caught.value.reason is reason
