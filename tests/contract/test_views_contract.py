"""Every engine wears a view as the reference engine does, in one batch with others and behind shared prefixes."""

from __future__ import annotations

import numpy as np
import pytest

from dualtrace.engine import NOTHING, Engine
from dualtrace.masks import receipt
from dualtrace.problems import Problem, Reason
from dualtrace.views import BASE, Noise, View, finetuned, null, scaled
from tests.support.engines import MODELS, assert_near, loaded, require, tolerance_of
from tests.support.masked import IDS, MASKS, TOKENS, Answer, ask, ask_shared, plan_for, read_all, run, whole

# No model stands behind the fake engine; that it refuses has tests in test_abilities_contract.py.
pytestmark = [pytest.mark.parametrize("model", MODELS), pytest.mark.engines_but("fake")]

VIEWS: dict[str, View] = {
    "base": BASE,
    "finetuned": finetuned("usual"),
    "scaled beyond": scaled("usual", 1.25),
    "scaled against": scaled("usual", -0.5),
    "all linear": finetuned("all"),
    "null": null("usual", Noise(7, init_scale=0.2)),
    "null of all": null("all", Noise(-3, init_scale=0.1, rank_scale=2.0, variance_faithful=True)),
}
ONE_VIEW = pytest.mark.parametrize("name", VIEWS)


def adapted(engine_name: str, model: str) -> Engine:
    engine = loaded(engine_name, model)
    require(engine_name, engine, "views")
    return loaded(engine_name, model, adapters=True)


def wanted(model: str, view: View) -> Answer:
    return ask(loaded("reference", model, adapters=True), view=view)


@ONE_VIEW
def test_logprobs_under_a_view_are_those_of_the_reference(name: str, model: str, engine_name: str) -> None:
    engine = adapted(engine_name, model)
    near = tolerance_of(engine, loaded("reference", model))
    found = ask(engine, view=VIEWS[name])
    assert_near(found.logprobs, wanted(model, VIEWS[name]).logprobs, near, range(TOKENS))


@ONE_VIEW
def test_the_modules_that_got_a_delta_are_named(name: str, model: str, engine_name: str) -> None:
    engine = adapted(engine_name, model)
    assert ask(engine, view=VIEWS[name]).delta_modules == wanted(model, VIEWS[name]).delta_modules


def test_views_beside_each_other_in_a_batch_do_not_mix(model: str, engine_name: str) -> None:
    engine = adapted(engine_name, model)
    near = tolerance_of(engine, loaded("reference", model))
    views = [*VIEWS.values(), BASE]
    answers = run(engine, [whole(view=view) for view in views], [read_all() for _ in views])
    for index, view in enumerate(views):
        assert_near(answers[index].logprobs, wanted(model, view).logprobs, near, range(TOKENS))
        assert answers[index].delta_modules == wanted(model, view).delta_modules


def test_strength_zero_is_the_base_bit_for_bit(model: str, engine_name: str) -> None:
    engine = adapted(engine_name, model)
    assert np.array_equal(ask(engine, view=scaled("usual", 0.0)).logprobs, ask(engine).logprobs)


def test_strength_one_is_the_adapter_fully_on_bit_for_bit(model: str, engine_name: str) -> None:
    engine = adapted(engine_name, model)
    one, on = (ask(engine, view=view).logprobs for view in (scaled("usual", 1.0), finetuned("usual")))
    assert np.array_equal(one, on)


@pytest.mark.parametrize("plain", [BASE, scaled("broken", 0.0), finetuned("usual")], ids=str)
def test_a_nan_in_an_adapter_reaches_only_rows_of_its_view(plain: View, model: str, engine_name: str) -> None:
    engine = adapted(engine_name, model)
    near = tolerance_of(engine, loaded("reference", model))
    answers = run(engine, [whole(view=finetuned("broken")), whole(view=plain)], [read_all(), read_all()])
    assert answers[0].bad_rows == tuple(range(TOKENS))
    assert answers[1].bad_rows == ()
    assert_near(answers[1].logprobs, wanted(model, plain).logprobs, near, range(TOKENS))


@pytest.mark.parametrize("at", [1, 11, TOKENS - 1])
def test_a_prefix_under_a_view_is_shared_by_its_children(at: int, model: str, engine_name: str) -> None:
    engine = adapted(engine_name, model)
    near = tolerance_of(engine, loaded("reference", model))
    answer, _ = ask_shared(engine, at, view=finetuned("all"))
    assert_near(answer.logprobs, wanted(model, finetuned("all")).logprobs, near, range(TOKENS))


def test_divergence_from_the_base_is_that_of_the_reference(model: str, engine_name: str) -> None:
    engine, reference = adapted(engine_name, model), loaded("reference", model, adapters=True)
    require(engine_name, engine, "contrasts")
    segments, reads = [whole(), whole(view=finetuned("usual"))], (NOTHING, read_all(against=0))
    found, expected = (run(one, segments, reads)[1] for one in (engine, reference))
    near = tolerance_of(engine, reference)
    assert_near(found.kl_from_against, expected.kl_from_against, near, range(TOKENS))
    assert_near(found.kl_to_against, expected.kl_to_against, near, range(TOKENS))


def test_a_view_and_a_mask_work_together(model: str, engine_name: str) -> None:
    engine, reference = adapted(engine_name, model), loaded("reference", model, adapters=True)
    require(engine_name, engine, "masks")
    plan = plan_for(engine.card, MASKS["edges"])
    found, expected = (ask(one, plan, finetuned("usual")) for one in (engine, reference))
    assert_near(found.logprobs, expected.logprobs, tolerance_of(engine, reference), range(TOKENS))
    assert found.counts is not None
    receipt.check(found.counts, plan)


def test_the_card_names_the_same_adapters_by_the_same_digests(model: str, engine_name: str) -> None:
    engine, reference = adapted(engine_name, model), loaded("reference", model, adapters=True)
    assert engine.card.provenance.adapter_digests == reference.card.provenance.adapter_digests


def test_an_unknown_adapter_is_named(model: str, engine_name: str) -> None:
    engine = adapted(engine_name, model)
    with pytest.raises(Problem, match="'nobody'") as caught:
        ask(engine, view=finetuned("nobody"), ids=IDS)
    assert caught.value.reason is Reason.NOT_FOUND
