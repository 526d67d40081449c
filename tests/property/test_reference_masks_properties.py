"""Whatever the mask, the reference engine applies it, can be told when it does not, and shares without a difference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dualtrace.arrays import IntArray
from dualtrace.engine import NOTHING, int_array
from dualtrace.masks import receipt
from dualtrace.masks import spec as s
from dualtrace.masks.arrays import BoolArray
from dualtrace.masks.plan import MaskPlan
from dualtrace.problems import Problem
from dualtrace.reference.attention import Sight
from dualtrace.reference.masking import PlannedMask
from tests.support.masked import HEADS, LAYERS, Answer, ask, plan_for, read_all, run, split, whole
from tests.support.tiny import tiny_reference
from tests.support.tolerances import FLOAT64

Draw = Any


@st.composite
def token_ranges(draw: Draw, tokens: int) -> s.TokenRange:
    start = draw(st.integers(0, tokens - 1))
    return s.TokenRange(start, draw(st.integers(start + 1, tokens)))


@st.composite
def bases(draw: Draw, tokens: int) -> s.Expression:
    seed, rank = draw(st.integers(0, 2**31)), draw(st.sampled_from([2, 3, 4]))
    shape = (LAYERS, HEADS, tokens, tokens)[-rank:]
    array = s.Array(BoolArray(np.random.default_rng(seed).random(shape) < draw(st.sampled_from([0.2, 0.5, 0.9]))))
    cuts = tuple(sorted(draw(st.sets(st.integers(1, tokens - 1), min_size=1)))) if tokens > 1 else ()
    choices: list[s.Expression] = [
        s.Causal(), s.Full(), s.Sliding(draw(st.integers(1, 6)), draw(st.integers(0, 2))), array,
        s.All((s.Causal(), array)), s.Chunked(draw(st.integers(1, 6))),
        s.DocIsolation(boundaries=cuts, reset_positions=draw(st.booleans())),
    ]  # fmt: skip
    return draw(st.sampled_from(choices))  # type: ignore[no-any-return]


@st.composite
def edges(draw: Draw, tokens: int) -> s.Edge:
    def some(extent: int) -> tuple[int, ...] | None:
        return draw(  # type: ignore[no-any-return]
            st.none() | st.sets(st.integers(0, extent - 1), min_size=1).map(lambda found: tuple(sorted(found)))
        )

    queries, keys = draw(token_ranges(tokens)), draw(token_ranges(tokens))
    return s.Edge(queries, keys, some(LAYERS), some(HEADS), draw(st.sampled_from(s.CutMode)))


@st.composite
def masked_texts(draw: Draw) -> tuple[IntArray, MaskPlan]:
    ids = draw(st.lists(st.integers(0, 200), min_size=1, max_size=14))
    spec = s.MaskSpec(
        draw(bases(len(ids))),
        tuple(draw(st.lists(edges(len(ids)), max_size=3))),
        empty_row=draw(st.sampled_from([s.EmptyRow.ZERO, s.EmptyRow.SELF])),
    )
    return int_array(ids), plan_for(tiny_reference().card, spec, len(ids))


def asked(ids: IntArray, plan: MaskPlan) -> Answer:
    return ask(tiny_reference(), plan, ids=ids)


@settings(max_examples=60)
@given(masked_texts())
def test_every_mask_is_applied_and_its_receipt_says_so(text: tuple[IntArray, MaskPlan]) -> None:
    counts = asked(*text).counts
    assert counts is not None
    assert receipt.check(counts, text[1]).effective_mask_digest == receipt.effective_mask_digest(text[1])


@settings(max_examples=60)
@given(masked_texts(), st.data())
def test_a_single_wrong_entry_anywhere_is_found_out(text: tuple[IntArray, MaskPlan], data: st.DataObject) -> None:
    ids, plan = text
    layer, head = data.draw(st.integers(0, LAYERS - 1)), data.draw(st.integers(0, HEADS - 1))
    row, key = data.draw(st.integers(0, ids.size - 1)), data.draw(st.integers(0, ids.size - 1))
    honest = PlannedMask.sight

    def lie(mask: PlannedMask, at: int, q0: int, q1: int) -> Sight:
        sight = honest(mask, at, q0, q1)
        allowed = np.repeat(sight.allowed, HEADS // sight.allowed.shape[0], axis=0)
        allowed[head, row, key] ^= at == layer
        return replace(sight, allowed=allowed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlannedMask, "sight", lie)
        counts = asked(ids, plan).counts
    assert counts is not None
    with pytest.raises(Problem, match=f"layer {layer}, head {head}"):
        receipt.check(counts, plan)


@settings(max_examples=60)
@given(masked_texts(), st.data())
def test_rows_may_be_shared_wherever_the_mask_has_a_cut(text: tuple[IntArray, MaskPlan], data: st.DataObject) -> None:
    ids, plan = text
    cuts = [int(cut) for cut in plan.step_ends() if cut < ids.size]
    assume(cuts)
    answers = run(tiny_reference(), split(whole(ids, plan), data.draw(st.sampled_from(cuts))), (NOTHING, read_all(ids)))
    assert answers[0].counts is not None
    assert answers[1].counts is not None
    receipt.check(answers[0].counts + answers[1].counts, plan)
    assert np.array_equal(answers[1].logprobs, asked(ids, plan).logprobs)


@settings(max_examples=60)
@given(masked_texts(), st.data())
def test_a_key_that_no_row_may_see_changes_only_its_own_row(
    text: tuple[IntArray, MaskPlan], data: st.DataObject
) -> None:
    ids, _ = text
    assume(ids.size > 1)
    hidden = data.draw(st.integers(0, ids.size - 1))
    base = s.Minus(s.Causal(), s.Array(BoolArray(np.arange(ids.size)[None, :].repeat(ids.size, 0) == hidden)))
    plan = plan_for(tiny_reference().card, s.MaskSpec(base, empty_row=s.EmptyRow.ZERO), ids.size)
    changed = ids.copy()
    changed[hidden] = (changed[hidden] + 1) % 200
    left, right = (run(tiny_reference(), [whole(x, plan)], [read_all(ids)])[0].logprobs for x in (ids, changed))
    others = np.arange(ids.size) != hidden
    assert left[others] == pytest.approx(right[others], abs=FLOAT64.abs_epsilon)
