"""The receipt: what it says of a mask that was applied, and that no way of applying it wrongly gets through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import numpy.typing as npt
import pytest

from dualtrace.masks import receipt as receipts
from dualtrace.masks.plan import MaskPlan, compile_mask
from dualtrace.masks.receipt import Counts, Tally, check, count_block, expected_counts, expected_receipt, mix
from dualtrace.masks.resolve import Geometry, MaskContext, resolve
from dualtrace.masks.spec import CutMode, Edge, EmptyRow, MaskSpec, Sliding, TokenRange
from dualtrace.problems import Problem, Reason

Bools = npt.NDArray[np.bool_]
LENGTH = 8


def plan(spec: MaskSpec, windows: tuple[int | None, ...] = ()) -> MaskPlan:
    return compile_mask(resolve(spec, MaskContext(LENGTH, Geometry(2, 2, windows))))


KNOCKOUT = plan(MaskSpec(edges=(Edge(TokenRange(5, 8), TokenRange(1, 4), layers=(1,), heads=(0,)),)))
ZEROED = plan(MaskSpec(edges=(Edge(TokenRange(5, 8), TokenRange(1, 4), layers=(1,), mode=CutMode.POST_SOFTMAX_ZERO),)))


def tallied(
    mask: MaskPlan, spoil: Callable[[int, Bools], Bools] = lambda q0, block: block, *, zero: bool = True
) -> Counts:
    """What an engine tallies that applies `spoil` of the mask, in two steps."""
    tally = Tally(mask.layers, mask.heads)
    for q0, q1 in ((0, 3), (3, LENGTH)):
        for layer in range(mask.layers):
            zeroed = mask.zero_block(layer, q0, q1) if zero else None
            tally.add(layer, spoil(q0, mask.block(layer, q0, q1)), q0, zeroed=zeroed)
    return tally.counts()


def test_a_mask_that_was_applied_passes() -> None:
    check(tallied(KNOCKOUT), KNOCKOUT)


def heads_swapped(q0: int, block: Bools) -> Bools:
    return block[::-1]


def nothing_masked(q0: int, block: Bools) -> Bools:
    return np.tri(LENGTH, dtype=np.bool_)[None, q0 : q0 + block.shape[1]]


def keys_shifted(q0: int, block: Bools) -> Bools:
    return np.roll(block, 1, axis=2)


def rows_swapped(q0: int, block: Bools) -> Bools:
    return block[:, ::-1]


def upside_down(q0: int, block: Bools) -> Bools:
    return ~block


def one_entry_moved(q0: int, block: Bools) -> Bools:
    moved = block.copy()
    moved[-1, -1, 0] ^= True
    moved[-1, -2, 0] ^= True
    return moved


@pytest.mark.parametrize(
    "fault", [heads_swapped, nothing_masked, keys_shifted, rows_swapped, upside_down, one_entry_moved]
)
def test_a_mask_that_was_applied_wrongly_is_caught(fault: Callable[[int, Bools], Bools]) -> None:
    with pytest.raises(Problem) as caught:
        check(tallied(KNOCKOUT, fault), KNOCKOUT)
    assert caught.value.reason is Reason.MASK_NOT_APPLIED


def test_layers_that_changed_places_are_caught_and_named() -> None:
    counts = tallied(KNOCKOUT)
    swapped = Counts(*(getattr(counts, f.name)[::-1] for f in fields(Counts)))
    with pytest.raises(Problem, match="layer 0, head 0: the engine tallied allowed = 27, the mask demands 36"):
        check(swapped, KNOCKOUT)


def test_a_step_that_was_never_applied_is_caught() -> None:
    tally = Tally(2, 2)
    for layer in range(2):
        tally.add(layer, KNOCKOUT.block(layer, 0, 3), 0)
    with pytest.raises(Problem, match="the engine tallied rows = 3, the mask demands 8"):
        check(tally.counts(), KNOCKOUT)


def test_zeroing_that_was_left_out_is_caught() -> None:
    with pytest.raises(Problem, match="zeroed = 0"):
        check(tallied(ZEROED, zero=False), ZEROED)


def test_zeroing_that_was_done_before_the_softmax_is_caught() -> None:
    before = plan(MaskSpec(edges=(Edge(TokenRange(5, 8), TokenRange(1, 4), layers=(1,)),)))
    with pytest.raises(Problem, match="the engine tallied allowed"):
        check(tallied(before), ZEROED)


def test_a_receipt_for_another_number_of_heads_is_caught() -> None:
    with pytest.raises(Problem, match="2 layers and 3 heads"):
        check(receipts.no_counts(2, 3), KNOCKOUT)


@pytest.mark.parametrize("column", [f.name for f in fields(Counts)])
def test_every_column_is_compared(column: str) -> None:
    counts = expected_counts(ZEROED)
    spoiled = getattr(counts, column).copy()
    spoiled[1, 1] += 1
    with pytest.raises(Problem, match=f"layer 1, head 1: the engine tallied {column} "):
        check(replace(counts, **{column: spoiled}), ZEROED)


def test_the_mix_depends_on_the_row() -> None:
    blocks = np.zeros((2, 4, 4), np.bool_)
    blocks[0, 1, 0] = blocks[1, 2, 0] = True
    _, sum_a, sum_b = count_block(blocks, 0)
    assert sum_a[0] != sum_a[1]
    assert sum_b[0] != sum_b[1]


def test_the_mix_depends_on_the_key() -> None:
    blocks = np.zeros((2, 4, 4), np.bool_)
    blocks[0, 3, 0] = blocks[1, 3, 1] = True
    _, sum_a, sum_b = count_block(blocks, 0)
    assert sum_a[0] != sum_a[1]
    assert sum_b[0] != sum_b[1]


def test_a_mix_that_ignores_the_row_would_let_swapped_rows_through(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = replace(mix(LENGTH), f_a=np.ones(LENGTH, np.uint32), f_b=np.ones(LENGTH, np.uint32))
    monkeypatch.setattr(receipts, "mix", lambda length: flat)
    check(tallied(KNOCKOUT, rows_swapped), KNOCKOUT)  # passes: so the row factor is what catches it above


def test_row_factors_are_odd_so_a_change_in_one_row_cannot_vanish() -> None:
    assert (mix(1000).f_a % 2).all()
    assert (mix(1000).f_b % 2).all()


def test_a_shorter_table_is_the_beginning_of_a_longer_one() -> None:
    assert np.array_equal(mix(50).g_b, mix(99).g_b[:50])


def test_keys_that_are_tallied_in_parts_add_up() -> None:
    tally = Tally(2, 2)
    for layer in range(2):
        block = KNOCKOUT.block(layer, 0, LENGTH)
        tally.add_part(layer, block[:, :, :3], 0, 0)
        tally.add_part(layer, block[:, :, 3:], 0, 3)
        tally.add_rows(layer, np.asarray(block.any(axis=2)))
    check(tally.counts(), KNOCKOUT)


def test_counts_of_a_compiled_function_can_be_added() -> None:
    tally = Tally(2, 2)
    tally.add_counts(tallied(KNOCKOUT))
    check(tally.counts(), KNOCKOUT)


def test_a_knockout_hits_its_layer_and_head_only() -> None:
    receipt = expected_receipt(KNOCKOUT)
    assert (receipt.layers_hit, receipt.heads_hit) == ((1,), ((0,),))
    assert (receipt.layers_applied, receipt.heads_applied) == ((0, 1), ((0, 1), (0, 1)))


def test_a_knockout_cuts_its_rectangle() -> None:
    receipt = expected_receipt(KNOCKOUT)
    assert (receipt.entries_cut, receipt.entries_cut_that_base_allowed) == (9, 9)


def test_what_the_base_forbids_is_cut_but_not_by_edges() -> None:
    edge = Edge(TokenRange(7, 8), TokenRange(0, 7), layers=(0,), heads=(1,))
    receipt = expected_receipt(plan(MaskSpec(Sliding(3), edges=(edge,))))
    causal, sliding = 36, 1 + 2 + 3 * 6
    assert receipt.entries_cut == 4 * (causal - sliding) + 2
    assert receipt.entries_cut_that_base_allowed == 2


def test_a_models_own_window_is_no_hit() -> None:
    receipt = expected_receipt(plan(MaskSpec(), windows=(2, None)))
    assert (receipt.layers_hit, receipt.entries_cut) == ((), 0)


def test_a_window_that_is_replaced_is_a_hit_that_cuts_nothing() -> None:
    receipt = expected_receipt(plan(MaskSpec(replace_native=True), windows=(2, None)))
    assert (receipt.layers_hit, receipt.entries_cut) == ((0,), 0)


@pytest.mark.parametrize("empty_row", [EmptyRow.ZERO, EmptyRow.SELF])
def test_emptied_rows_are_counted_whatever_becomes_of_them(empty_row: EmptyRow) -> None:
    edge = Edge(TokenRange(0, 3), TokenRange(0, 3), heads=(1,))
    emptied = plan(MaskSpec(edges=(edge,), empty_row=empty_row))
    assert check(tallied(emptied), emptied).rows_emptied == 6


def test_the_numbers_follow_the_tally_and_not_the_plan() -> None:
    counts = expected_counts(KNOCKOUT)
    missing = counts.rows.copy()
    missing[0] = 0
    receipt = receipts.write_receipt(KNOCKOUT, replace(counts, rows=missing, allowed=counts.allowed - 1))
    assert receipt.layers_applied == (1,)
    assert receipt.layers_hit == (1,)
    assert receipt.entries_cut == 9 + 4


def test_the_digest_tells_two_masks_apart() -> None:
    assert receipts.effective_mask_digest(KNOCKOUT) != receipts.effective_mask_digest(ZEROED)
