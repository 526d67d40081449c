"""The plan: what an engine gets, what is refused, and what a long mask costs."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest

from dualtrace.masks import runs as r
from dualtrace.masks.arrays import BoolArray
from dualtrace.masks.leaks import leaking_rows
from dualtrace.masks.plan import MaskPlan, Unscored, compile_mask
from dualtrace.masks.receipt import expected_receipt
from dualtrace.masks.resolve import Geometry, MaskContext, resolve
from dualtrace.masks.spec import (
    All,
    AnyOf,
    Array,
    BidirectionalPrefix,
    Causal,
    Chunked,
    CutMode,
    DocIsolation,
    Edge,
    EmptyRow,
    Expression,
    Full,
    MaskSpec,
    Minus,
    Not,
    Sliding,
    TokenRange,
)
from dualtrace.problems import Problem, Reason

LONG = 32_768
SECONDS = 1.0  # issue 3: a 32,768-token sliding mask compiles in under a second ...
MEGABYTES = 100  # ... and 100 MB


def plan(
    spec: MaskSpec | Expression, length: int = 6, geometry: Geometry | None = None, *, allow_empty_rows: bool = False
) -> MaskPlan:
    mask = spec if isinstance(spec, MaskSpec) else MaskSpec(spec)
    context = MaskContext(length, Geometry(2, 2) if geometry is None else geometry)
    return compile_mask(resolve(mask, context), allow_empty_rows=allow_empty_rows)


def cut(queries: tuple[int, int], keys: tuple[int, int], mode: CutMode = CutMode.PRE_SOFTMAX) -> Edge:
    return Edge(TokenRange(*queries), TokenRange(*keys), mode=mode)


def same(left: MaskPlan, right: MaskPlan) -> bool:
    return left.shared_prefix(right) == left.length == right.length


def test_an_array_that_is_causal_equals_the_preset() -> None:
    assert same(plan(Array(BoolArray(np.tri(6, dtype=np.bool_)))), plan(Causal()))


def test_an_empty_edge_set_equals_the_base() -> None:
    assert same(plan(MaskSpec(Sliding(3), edges=())), plan(Sliding(3)))


def test_an_edge_that_cuts_what_nobody_saw_changes_nothing() -> None:
    assert plan(MaskSpec(Causal(), edges=(cut((0, 2), (4, 6)),))).is_plain_causal()


def test_a_window_as_wide_as_the_text_is_plain_causal() -> None:
    assert plan(Causal(), geometry=Geometry(1, 1, (6,))).is_plain_causal()


def test_a_causal_mask_over_native_windows_is_unmasked_but_not_plain() -> None:
    windowed = plan(Causal(), geometry=Geometry(1, 1, (2,)))
    assert (windowed.is_unmasked(), windowed.is_plain_causal()) == (True, False)


def test_replacing_a_native_window_is_not_unmasked() -> None:
    assert not plan(MaskSpec(Causal(), replace_native=True), geometry=Geometry(1, 1, (2,))).is_unmasked()


def test_a_window_over_positions_that_jump_is_left_to_the_mask() -> None:
    context = MaskContext(2, Geometry(1, 1, (3,)), positions=np.array([0, 2], np.int32))
    assert not compile_mask(resolve(MaskSpec(), context)).is_unmasked()


def test_reset_positions_are_not_unmasked_even_where_everything_is_seen() -> None:
    resets = AnyOf((DocIsolation(boundaries=(3,), reset_positions=True), Causal()))
    assert not plan(resets).is_unmasked()


def test_a_mask_that_leaves_positions_alone_gives_none() -> None:
    assert plan(DocIsolation(boundaries=(2,))).positions() is None


def test_layers_with_the_same_rules_stand_in_one_group() -> None:
    edge = Edge(TokenRange(4, 5), TokenRange(0, 1), layers=(1, 3))
    assert plan(MaskSpec(edges=(edge,)), geometry=Geometry(5, 2)).layer_groups() == ((0, 2, 4), (1, 3))


def test_equal_slices_of_an_array_are_one_rule() -> None:
    values = np.broadcast_to(np.tri(6, dtype=np.bool_), (2, 2, 6, 6))
    assert len(plan(Array(BoolArray(values))).rules) == 1


@pytest.mark.parametrize("shape", [(2, 6, 6), (2, 2, 6, 6)])
def test_an_array_is_applied_slice_by_slice(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(3).random(shape) < 0.5
    sliced = plan(MaskSpec(Array(BoolArray(values)), empty_row=EmptyRow.ZERO))
    wanted = np.broadcast_to(values, (2, 2, 6, 6))
    assert np.array_equal(np.stack([sliced.block(layer, 0, 6) for layer in range(2)]), wanted)


def test_heads_that_are_alike_share_one_block() -> None:
    assert plan(Causal()).block(0, 2, 5).shape == (1, 3, 6)


def test_heads_that_differ_get_a_block_each() -> None:
    edge = Edge(TokenRange(4, 5), TokenRange(0, 1), heads=(1,))
    assert plan(MaskSpec(edges=(edge,))).block(0, 2, 5).shape == (2, 3, 6)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (MaskSpec(), "[T,T]"),
        (MaskSpec(edges=(Edge(TokenRange(4, 5), TokenRange(0, 1), heads=(1,)),)), "[H,T,T]"),
        (MaskSpec(edges=(Edge(TokenRange(4, 5), TokenRange(0, 1), layers=(1,)),)), "[L,H,T,T]"),
    ],
)
def test_the_shape_is_the_smallest_that_holds_the_mask(spec: MaskSpec, shape: str) -> None:
    assert plan(spec).shape() == shape


# ---- rows that see nothing

BLIND = Edge(TokenRange(0, 2), TokenRange(0, 2), layers=(1,), heads=(0,))


def test_an_empty_row_is_refused_by_layer_head_and_row() -> None:
    with pytest.raises(Problem) as caught:
        plan(MaskSpec(edges=(BLIND,)))
    assert caught.value.reason is Reason.EMPTY_ROW
    assert "row 0 of layer 1, head 0 may see nothing (2 such rows in all)" in caught.value.detail.message


def test_contradictory_combinators_are_refused_as_empty_rows() -> None:
    with pytest.raises(Problem) as caught:
        plan(All((Causal(), Not(Causal()))))
    assert caught.value.reason is Reason.EMPTY_ROW


def test_zero_names_the_rows_whose_output_is_zero() -> None:
    zero = plan(MaskSpec(edges=(BLIND,), empty_row=EmptyRow.ZERO)).zero_rows(1, 1, 4)
    assert zero is not None
    assert zero.tolist() == [[True, False, False], [False, False, False]]


def test_a_layer_without_empty_rows_has_no_zero_rows() -> None:
    assert plan(MaskSpec(edges=(BLIND,), empty_row=EmptyRow.ZERO)).zero_rows(0, 0, 6) is None


def test_self_lets_the_row_see_itself_only() -> None:
    alone = plan(MaskSpec(edges=(BLIND,), empty_row=EmptyRow.SELF))
    assert (alone.row_runs(1, 0, 1), alone.zero_rows(1, 0, 6)) == (((1, 2),), None)


def test_a_row_whose_keys_are_all_zeroed_after_the_softmax_is_not_empty() -> None:
    zeroed = plan(MaskSpec(edges=(cut((0, 6), (0, 6), CutMode.POST_SOFTMAX_ZERO),)))
    assert zeroed.rows_emptied() == 0


def test_a_native_window_can_empty_a_row() -> None:
    behind = Minus(Causal(), Sliding(2))
    windowed = plan(behind, geometry=Geometry(1, 1, (3,)), allow_empty_rows=True)
    assert windowed.empty_rows(0, 0).tolist() == [0, 1]
    narrower = plan(behind, geometry=Geometry(1, 1, (2,)), allow_empty_rows=True)
    assert narrower.empty_rows(0, 0).tolist() == [0, 1, 2, 3, 4, 5]


# ---- rows that see too much


def test_a_mask_that_looks_one_ahead_leaks_in_every_row_but_the_last() -> None:
    assert plan(Sliding(2, 1)).leaks() == (0, 1, 2, 3, 4)


def test_a_leak_may_need_two_layers() -> None:
    # Row 3 sees key 1 in layer 1, and row 1 saw key 4 in layer 0.
    sees = np.stack([np.tri(6, dtype=np.bool_), np.tri(6, dtype=np.bool_)])[:, None].repeat(2, axis=1)
    sees[0, 1, 1, 4] = True
    assert plan(Array(BoolArray(sees))).leaks() == (1, 2, 3)


def test_what_a_row_knows_stays_with_it_though_it_no_longer_sees_itself() -> None:
    # Row 1 sees key 4 in layer 0, and only key 0 in layer 1: what it learnt travels on past the attention.
    sees = np.stack([np.tri(6, dtype=np.bool_), np.tri(6, dtype=np.bool_)])[:, None].repeat(2, axis=1)
    sees[0, 1, 1, 4] = True
    sees[1, :, 1:] = np.eye(6, dtype=np.bool_)[0]
    assert plan(Array(BoolArray(sees))).leaks() == (1,)


def test_reading_a_leaking_row_is_refused() -> None:
    with pytest.raises(Problem) as caught:
        plan(BidirectionalPrefix(n=3)).refuse_leaks([1, 4])
    assert caught.value.reason is Reason.LEAK


def test_reading_only_rows_that_do_not_leak_is_allowed() -> None:
    plan(BidirectionalPrefix(n=3)).refuse_leaks([2, 3, 4])


def test_a_leak_that_is_too_dear_to_find_is_unknown() -> None:
    ahead = r.of_matrix(np.ones((64, 64), np.bool_), r.Budget())
    with pytest.raises(Problem) as caught:
        leaking_rows([[ahead]] * 3, max_work=1000)
    assert caught.value.reason is Reason.LEAK_UNKNOWN


def test_a_zeroed_key_counts_as_seen_for_leaks_and_steps() -> None:
    zeroed = plan(MaskSpec(Sliding(2, 1), edges=(cut((0, 6), (0, 6), CutMode.POST_SOFTMAX_ZERO),)))
    assert (len(zeroed.leaks()), zeroed.step_ends().tolist()) == (5, [6])


# ---- documents


def test_a_documents_first_token_is_unscored() -> None:
    isolated = plan(All((Causal(), DocIsolation(boundaries=(2, 5)))))
    assert isolated.unscored() == (Unscored(2, "DOCUMENT_START"), Unscored(5, "DOCUMENT_START"))


def test_documents_that_are_taken_away_leave_every_token_scored() -> None:
    assert plan(MaskSpec(Minus(Full(), DocIsolation(boundaries=(2,))), empty_row=EmptyRow.ZERO)).unscored() == ()


# ---- sharing


def test_masks_are_shared_up_to_the_first_row_that_an_edge_cuts() -> None:
    left = plan(MaskSpec(edges=(cut((4, 6), (1, 2)),)))
    assert left.shared_prefix(plan(Causal())) == 4


def test_rows_that_look_across_the_cut_are_not_shared() -> None:
    left = plan(MaskSpec(BidirectionalPrefix(n=5), edges=(cut((3, 4), (0, 1)),)))
    assert left.shared_prefix(plan(BidirectionalPrefix(n=5))) == 0


def test_positions_that_differ_end_the_shared_part() -> None:
    reset = AnyOf((DocIsolation(boundaries=(3,), reset_positions=True), Causal()))
    assert plan(reset).shared_prefix(plan(Causal())) == 3


# ---- bounds


def test_a_long_sliding_mask_compiles_fast_and_small() -> None:
    tracemalloc.start()
    began = time.perf_counter()
    long = plan(Sliding(1024), LONG, Geometry(30, 9))
    seconds = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    assert long.step_ends().size == LONG
    assert seconds < SECONDS
    assert peak < MEGABYTES


def test_a_long_mask_answers_blocks_leaks_and_receipt_without_a_square() -> None:
    tracemalloc.start()
    long = plan(Sliding(1024, 2), LONG, Geometry(30, 9))
    assert len(long.leaks()) == LONG - 1
    assert long.block(3, LONG - 64, LONG).shape == (1, 64, LONG)
    assert expected_receipt(long).layers_hit == tuple(range(30))
    assert tracemalloc.get_traced_memory()[1] / 1e6 < MEGABYTES
    tracemalloc.stop()


@pytest.mark.parametrize(
    "spec",
    [
        MaskSpec(DocIsolation(segment_ids=tuple(i % 2 for i in range(LONG)))),
        MaskSpec(edges=tuple(cut((0, LONG), (2 * i, 2 * i + 1)) for i in range(4096)), empty_row=EmptyRow.ZERO),
    ],
    ids=["documents that alternate", "edges over all rows"],
)
def test_a_mask_too_intricate_is_refused_instead_of_hanging(spec: MaskSpec) -> None:
    with pytest.raises(Problem) as caught:
        plan(spec, LONG)
    assert caught.value.reason is Reason.MASK_TOO_LARGE


def test_a_mask_with_too_many_different_rules_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualtrace.masks.rules.MAX_TOGGLES", 20)
    with pytest.raises(Problem) as caught:
        plan(MaskSpec(AnyOf((Chunked(2), Chunked(3))), edges=(BLIND,), empty_row=EmptyRow.ZERO))
    assert caught.value.reason is Reason.MASK_TOO_LARGE


def test_lists_that_are_merged_in_slabs_give_the_same_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(5).random((2, 40, 40)) < 0.4
    left, right = (r.of_matrix(matrix, r.Budget()) for matrix in values)
    whole = r.without(left, right, r.Budget())
    monkeypatch.setattr(r, "SLAB_TOGGLES", 7)
    assert np.array_equal(r.without(left, right, r.Budget()).toggles, whole.toggles)
    assert np.array_equal(whole.block(0, 40), values[0] & ~values[1])
