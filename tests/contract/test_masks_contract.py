"""Every engine obeys a mask as the reference engine does, and proves it by the same receipt."""

from __future__ import annotations

import numpy as np
import pytest

from dualtrace.engine import NOTHING, Engine, int_array
from dualtrace.masks import receipt
from dualtrace.masks.plan import MaskPlan
from tests.support.engines import MODELS, assert_near, loaded, require, tolerance_of
from tests.support.masked import IDS, MASKS, TOKENS, Answer, ask, ask_shared, plan_for, read_all, run, split, whole

# No model stands behind the fake engine; that it refuses has tests in test_abilities_contract.py.
pytestmark = [pytest.mark.parametrize("model", MODELS), pytest.mark.engines_but("fake")]


def masking(engine_name: str, model: str, step_tokens: int = 256) -> Engine:
    engine = loaded(engine_name, model, step_tokens=step_tokens)
    require(engine_name, engine, "masks")
    return engine


def wanted(model: str, plan: MaskPlan | None = None) -> Answer:
    return ask(loaded("reference", model), plan)


@pytest.mark.parametrize("name", MASKS)
def test_masked_logprobs_are_those_of_the_reference(name: str, model: str, engine_name: str) -> None:
    engine = masking(engine_name, model)
    plan = plan_for(engine.card, MASKS[name])
    found = ask(engine, plan)
    near = tolerance_of(engine, loaded("reference", model))
    assert_near(found.logprobs, wanted(model, plan).logprobs, near, range(TOKENS))


@pytest.mark.parametrize("name", MASKS)
def test_the_receipt_is_the_one_that_the_mask_demands(name: str, model: str, engine_name: str) -> None:
    engine = masking(engine_name, model)
    plan = plan_for(engine.card, MASKS[name])
    counts = ask(engine, plan).counts
    assert counts is not None
    assert receipt.check(counts, plan).effective_mask_digest == receipt.effective_mask_digest(plan)


@pytest.mark.parametrize("name", MASKS)
def test_a_prefix_and_its_rest_are_the_whole(name: str, model: str, engine_name: str) -> None:
    engine = masking(engine_name, model)
    plan = plan_for(engine.card, MASKS[name])
    cuts = plan.step_ends()
    if cuts[0] == TOKENS:
        assert np.array_equal(cuts, [TOKENS])  # nothing to share: every row reaches to the end
        return
    answer, counts = ask_shared(engine, int(cuts[cuts.size // 2]), plan)
    near = tolerance_of(engine, loaded("reference", model))
    assert_near(answer.logprobs, wanted(model, plan).logprobs, near, range(TOKENS))
    receipt.check(counts, plan)


@pytest.mark.parametrize("name", MASKS)
def test_short_steps_are_one_long_one(name: str, model: str, engine_name: str) -> None:
    engine = masking(engine_name, model, step_tokens=5)
    plan = plan_for(engine.card, MASKS[name])
    found = ask(engine, plan)
    near = tolerance_of(engine, loaded("reference", model))
    assert_near(found.logprobs, wanted(model, plan).logprobs, near, range(TOKENS))
    assert found.counts is not None
    receipt.check(found.counts, plan)


def test_masks_beside_each_other_in_a_batch_do_not_mix(model: str, engine_name: str) -> None:
    engine = masking(engine_name, model)
    plans = [None, *(plan_for(engine.card, spec) for spec in MASKS.values())]
    answers = run(engine, [whole(mask=plan) for plan in plans], [read_all() for _ in plans])
    near = tolerance_of(engine, loaded("reference", model))
    for index, plan in enumerate(plans):
        assert_near(answers[index].logprobs, wanted(model, plan).logprobs, near, range(TOKENS))
        counts = answers[index].counts
        assert (counts is None) == (plan is None)
        if plan is not None and counts is not None:
            receipt.check(counts, plan)


def test_variants_of_one_text_share_its_beginning(model: str, engine_name: str) -> None:
    engine = masking(engine_name, model)
    base, cut = plan_for(engine.card, MASKS["causal"]), plan_for(engine.card, MASKS["edge in one layer and head"])
    shared = base.shared_prefix(cut)
    assert 0 < shared < TOKENS
    prefix, uncut = split(whole(mask=base), shared)
    _, other = split(whole(mask=cut), shared)
    answers = run(engine, (prefix, uncut, other), (NOTHING, read_all(), read_all()))
    near = tolerance_of(engine, loaded("reference", model))
    for index, plan in ((1, base), (2, cut)):
        assert_near(answers[index].logprobs, wanted(model, plan).logprobs, near, range(TOKENS))
        parent, own = answers[0].counts, answers[index].counts
        assert parent is not None
        assert own is not None
        receipt.check(parent + own, plan)


def test_masked_texts_of_other_lengths_stand_in_one_batch(model: str, engine_name: str) -> None:
    engine = masking(engine_name, model)
    lengths = (1, 2, 7, 23)
    plans = [plan_for(engine.card, MASKS["sliding"], length) for length in lengths]
    segments = [whole(IDS[:length], plan) for length, plan in zip(lengths, plans, strict=True)]
    answers = run(engine, segments, [read_all(IDS[:length]) for length in lengths])
    for index, (length, plan) in enumerate(zip(lengths, plans, strict=True)):
        expected = ask(loaded("reference", model), plan, ids=IDS[:length]).logprobs
        near = tolerance_of(engine, loaded("reference", model))
        assert_near(answers[index].logprobs, expected, near, range(length))
        counts = answers[index].counts
        assert counts is not None
        receipt.check(counts, plan)


@pytest.mark.parametrize("name", ["edges", "zeroed after the softmax", "array of heads, self"])
@pytest.mark.parametrize("base_is_read", [True, False])
def test_divergences_both_ways_are_those_of_the_reference(
    base_is_read: bool, name: str, model: str, engine_name: str
) -> None:
    engine, reference = masking(engine_name, model), loaded("reference", model)
    require(engine_name, engine, "contrasts")
    plan = plan_for(engine.card, MASKS[name])
    reads = (read_all() if base_is_read else NOTHING, read_all(against=0))
    found, expected = (run(one, [whole(), whole(mask=plan)], reads)[1] for one in (engine, reference))
    near = tolerance_of(engine, reference)
    assert_near(found.kl_from_against, expected.kl_from_against, near, range(TOKENS))
    assert_near(found.kl_to_against, expected.kl_to_against, near, range(TOKENS))


def test_no_mask_has_no_receipt(model: str, engine_name: str) -> None:
    engine = masking(engine_name, model)
    assert ask(engine).counts is None


def test_a_leaf_without_rows_of_its_own_reads_its_parents_under_the_mask(model: str, engine_name: str) -> None:
    engine = masking(engine_name, model)
    plan = plan_for(engine.card, MASKS["sliding"])
    parent, leaf = split(whole(mask=plan), TOKENS)
    assert np.array_equal(leaf.ids, int_array([]))
    answers = run(engine, (parent, leaf), (NOTHING, read_all()))
    near = tolerance_of(engine, loaded("reference", model))
    assert_near(answers[1].logprobs, wanted(model, plan).logprobs, near, range(TOKENS))
    parent_counts = answers[0].counts
    assert parent_counts is not None
    receipt.check(parent_counts if answers[1].counts is None else parent_counts + answers[1].counts, plan)
