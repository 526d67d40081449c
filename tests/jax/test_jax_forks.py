"""A fork at the layer where variants part: chosen where it pays, and nothing but the time changes by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

from backend_jax import load
from backend_jax.engine import JaxEngine
from backend_jax.fork import Fork, choose_fork, list_forks
from dualtrace.engine import NOTHING, Batch, EngineSettings, Read, Readout, Segment, int_array
from dualtrace.masks import receipt
from dualtrace.masks import spec as s
from dualtrace.masks.plan import MaskPlan
from dualtrace.views import BASE, View, finetuned, scaled
from tests.support.adapters import tiny_adapter
from tests.support.masked import IDS, LAYERS, TOKENS, edge, plan_for, read_all, run, split, whole
from tests.support.tiny import tiny_model
from tests.support.tiny_families import family_model
from tests.support.tolerances import FLOAT32_HIGHEST

CUT_AT = 10  # first row of the answers
CHUNKS = ((0, 3), (3, 5), (2, 9), (1, 2), (4, 10), (5, 8))
FAMILIES = ("gemma3", "gpt2", "gpt_neox", "opt")  # windows, learned positions, parallel layers, projected embeddings


@cache
def tiny() -> JaxEngine:
    folder = tiny_model(attention="gqa")
    adapters = tuple((name, tiny_adapter(folder, rank=2 + place)) for place, name in enumerate(("one", "two")))
    return load(EngineSettings(model=folder, adapters=adapters))


def cut(card: Any, layer: int, chunk: tuple[int, int], **rest: Any) -> MaskPlan:
    """A chunk hidden from the answers in the layers from one on."""
    layers = tuple(range(layer, card.layers))
    return plan_for(card, s.MaskSpec(edges=(edge((CUT_AT, TOKENS), chunk, layers=layers, **rest),)))


def late_cuts(card: Any, layer: int, **rest: Any) -> list[MaskPlan]:
    """The text plain, then with each chunk hidden."""
    return [plan_for(card, s.MaskSpec()), *(cut(card, layer, chunk, **rest) for chunk in CHUNKS)]


def on_a_prefix(plans: Sequence[MaskPlan], view: View = BASE, ids: Any = IDS) -> tuple[list[Segment], list[Read]]:
    """As EdgePatch asks: what no plan touches once, the answers on it, measured against the first."""
    prefix = split(whole(ids, plans[0], view), CUT_AT)[0]
    leaves = [split(whole(ids, plan, view), CUT_AT)[1] for plan in plans]
    rows = int_array(range(CUT_AT - 1, TOKENS))
    own = rows[1:]
    reads = [Read(rows, np.roll(IDS, -1)[rows]), *(Read(own, np.roll(IDS, -1)[own], against=1) for _ in plans[1:])]
    return [prefix, *leaves], [NOTHING, *reads]


Asked = tuple[list[Segment], list[Read]]


def two_cuts(card: Any) -> list[MaskPlan]:
    return [*late_cuts(card, 1)[:4], *late_cuts(card, 2)[1:]]


def by_head(card: Any) -> list[MaskPlan]:
    return late_cuts(card, 2, heads=(1, 3))


def zeroed(card: Any) -> list[MaskPlan]:
    return late_cuts(card, 2, mode=s.CutMode.POST_SOFTMAX_ZERO)


def without_a_prefix(plans: Sequence[MaskPlan]) -> Asked:
    return [whole(mask=plan) for plan in plans], [read_all(), *(read_all(against=0) for _ in plans[1:])]


def in_views(plans: Sequence[MaskPlan]) -> Asked:
    """Some variants each of the text under the base and two adapters, all without a prefix."""
    views = (BASE, finetuned("one"), scaled("two", 0.5))
    segments = [dataclasses.replace(whole(mask=plan), view=view) for view in views for plan in plans]
    return segments, [read_all() for _ in segments]


BATCHES: dict[str, Callable[[Any], Asked]] = {
    "cuts in the last layer": lambda card: on_a_prefix(late_cuts(card, LAYERS - 1)),
    "cuts in the last two": lambda card: on_a_prefix(late_cuts(card, 1)),
    "cuts in some heads": lambda card: on_a_prefix(by_head(card)),
    "zeroed after the softmax": lambda card: on_a_prefix(zeroed(card)),
    "cuts that begin in two layers": lambda card: on_a_prefix(two_cuts(card)),
    "without a prefix": lambda card: without_a_prefix(late_cuts(card, 2)),
    "under an adapter": lambda card: on_a_prefix(late_cuts(card, 2), finetuned("one")),
    "under several views": lambda card: in_views(late_cuts(card, 2)),
}
each_batch = pytest.mark.parametrize("name", BATCHES)


def buckets(engine: JaxEngine, asked: Asked, *, deterministic: bool = False) -> list[str]:
    batch = Batch(tuple(asked[0]), deterministic)
    return [one.bucket for step in engine.forward(batch, tuple(asked[1]), lambda _: True) for one in step]


def is_forked(engine: JaxEngine, asked: Asked, **fields: Any) -> bool:
    return any("|" in bucket for bucket in buckets(engine, asked, **fields))


def never(*_arguments: Any) -> None:
    return None


def answers(engine: JaxEngine, asked: Asked) -> list[Any]:
    return [answer for _, answer in sorted(run(engine, *asked).items())]


def largest_difference(left: Sequence[Any], right: Sequence[Any]) -> float:
    """Over logprobs and divergences of all segments."""
    names = ("logprobs", "kl_from_against", "kl_to_against")
    pairs = ((getattr(a, name), getattr(b, name)) for a, b in zip(left, right, strict=True) for name in names)
    return max(float(np.abs(a - b).max(initial=0.0)) for a, b in pairs if a is not None)


# ---- nothing but the time


@each_batch
def test_a_forked_batch_answers_as_without_the_fork(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = BATCHES[name](tiny().card)
    assert is_forked(tiny(), asked)
    forked = answers(tiny(), asked)
    monkeypatch.setattr("backend_jax.forest.choose_fork", never)
    assert not is_forked(tiny(), asked)
    assert largest_difference(forked, answers(tiny(), asked)) <= FLOAT32_HIGHEST.abs_epsilon


@each_batch
def test_the_receipts_of_a_forked_batch_are_those_of_its_masks(name: str) -> None:
    segments, reads = BATCHES[name](tiny().card)
    found = answers(tiny(), (segments, reads))
    for segment, answer in zip(segments, found, strict=True):
        counts = answer.counts if segment.parent is None else found[0].counts + answer.counts
        if segment.ids.size < TOKENS and segment.parent is None:
            continue  # the prefix is no whole mask
        assert segment.mask is not None
        receipt.check(counts, segment.mask)


@pytest.mark.torch
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fork_changes_no_number_of_a_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(EngineSettings(model=family_model(family)))
    ids = IDS % engine.card.vocab_size
    segments, asked = on_a_prefix(late_cuts(engine.card, engine.card.layers - 1), ids=ids)
    reads = [NOTHING, *(Read(read.rows, extra_ids=int_array([3, 5])) for read in asked[1:])]
    assert is_forked(engine, (segments, reads))
    forked = every_number(engine, segments, reads)
    monkeypatch.setattr("backend_jax.forest.choose_fork", never)
    assert np.abs(forked - every_number(engine, segments, reads)).max() <= FLOAT32_HIGHEST.abs_epsilon


def every_number(engine: JaxEngine, segments: list[Segment], reads: list[Read]) -> Any:
    found = [one for step in engine.forward(Batch(tuple(segments)), tuple(reads), lambda _: True) for one in step]
    return np.concatenate([one.extra_logprobs for one in sorted(found, key=place) if one.extra_logprobs is not None])


def place(readout: Readout) -> tuple[int, int]:
    return readout.segment, readout.start


def test_a_deterministic_batch_has_no_fork() -> None:
    assert not is_forked(tiny(), BATCHES["cuts in the last layer"](tiny().card), deterministic=True)


def test_the_places_that_ran_empty_are_counted_on_both_sides_of_a_fork() -> None:
    segments, reads = BATCHES["cuts in the last layer"](tiny().card)
    found = [one for step in tiny().forward(Batch(tuple(segments)), tuple(reads), lambda _: True) for one in step]
    below, above = next(one.bucket for one in found if "|" in one.bucket).split("|")
    places = sum(rows * tokens for rows, tokens in map(size_of, (below, above)))
    tokens = TOKENS - CUT_AT
    assert sum(one.padded_tokens for one in found if "|" in one.bucket) == places - tokens * (1 + len(segments) - 1)


def size_of(bucket: str) -> tuple[int, int]:
    rows, tokens = bucket.partition("+")[0].split("x")
    return int(rows), int(tokens)


# ---- where it pays, and what it costs to compile


def leaves_of(name: str) -> list[Segment]:
    return BATCHES[name](tiny().card)[0][1:]


@pytest.mark.parametrize(
    ("name", "layers"), [("cuts in the last layer", [2]), ("cuts that begin in two layers", [1, 2])]
)
def test_there_is_a_fork_at_each_layer_in_which_leaves_part(name: str, layers: list[int]) -> None:
    assert [fork.layer for fork in list_forks(leaves_of(name), CUT_AT, LAYERS)] == layers


def test_below_a_fork_the_first_of_those_that_are_alike_stands_for_all() -> None:
    leaves = leaves_of("cuts in the last layer")
    assert choose_fork(leaves, CUT_AT, LAYERS) == Fork(2, (0,) * len(leaves))


@pytest.mark.parametrize("what", ["ids", "positions", "view", "mask"])
def test_leaves_that_begin_otherwise_stand_for_themselves(what: str) -> None:
    leaves = leaves_of("cuts in the last layer")
    other: dict[str, Any] = {
        "ids": leaves[1].ids[::-1].copy(),
        "positions": leaves[1].positions + 1,
        "view": finetuned("one"),
        "mask": None,
    }
    leaves[1] = dataclasses.replace(leaves[1], **{what: other[what]})
    fork = choose_fork(leaves, CUT_AT, LAYERS)
    assert fork is not None
    assert fork.standing == (0, 1, 0, 0, 0, 0, 0)


def test_cuts_from_the_first_layer_on_leave_nothing_to_share() -> None:
    plans = late_cuts(tiny().card, 0)
    leaves = on_a_prefix(plans)[0][1:]
    assert list_forks(leaves, CUT_AT, LAYERS) == ()


def test_a_fork_that_saves_little_is_not_taken() -> None:
    leaves = leaves_of("cuts in the last layer")[:2]
    assert list_forks(leaves, CUT_AT, LAYERS)
    assert choose_fork(leaves, CUT_AT, LAYERS) is None


def test_forks_at_different_layers_are_run_by_the_same_functions() -> None:
    engine = load(EngineSettings(model=tiny_model(attention="mqa")))
    run(engine, *on_a_prefix(late_cuts(engine.card, 2)))
    before = engine.compilations
    run(engine, *on_a_prefix(late_cuts(engine.card, 1)))
    assert engine.compilations == before
