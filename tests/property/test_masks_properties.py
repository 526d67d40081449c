"""The compiler, held to the naive oracle and to brute force on random masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from dualtrace.masks import receipt as receipts
from dualtrace.masks.arrays import BoolArray
from dualtrace.masks.json_form import digest, parse_json, to_json
from dualtrace.masks.naive import may_see, sees_nothing
from dualtrace.masks.plan import MaskPlan, compile_mask
from dualtrace.masks.resolve import Geometry, MaskContext, ResolvedMask, resolve
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
    Named,
    Not,
    SegmentName,
    Sliding,
    Span,
    TokenRange,
)
from dualtrace.problems import Problem, Reason

Bools = npt.NDArray[np.bool_]
Draw = Any


@st.composite
def contexts(draw: Draw, max_length: int = 16) -> MaskContext:
    length = draw(st.integers(1, max_length))
    layers, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    window = st.none() | st.integers(1, 6)
    windows = draw(st.just(()) | st.tuples(*[window] * layers))
    prefix = draw(st.sampled_from([0, 0, 1])) if length > 1 else 0
    positions = draw(st.none() | st.lists(st.integers(0, 8), min_size=length, max_size=length))
    start = draw(st.integers(0, length - prefix - 1))
    end = draw(st.integers(start + 1, length - prefix))
    return MaskContext(
        length,
        Geometry(layers, heads, windows),
        prefix=prefix,
        segments={SegmentName.ITEM: (start, end)},
        positions=None if positions is None else np.array(positions, np.int32),
    )


def token_ranges(tokens: int) -> st.SearchStrategy[TokenRange]:
    pairs = st.tuples(st.integers(0, tokens - 1), st.integers(1, tokens)).filter(lambda p: p[0] < p[1])
    return pairs.map(lambda p: TokenRange(*p))


def spans(context: MaskContext) -> st.SearchStrategy[Span]:
    return token_ranges(context.tokens) | st.just(Named(SegmentName.ITEM))


@st.composite
def arrays(draw: Draw, context: MaskContext) -> Array:
    rank = draw(st.sampled_from([4, 3, 2]))
    shape = (context.geometry.layers, context.geometry.heads, context.length, context.length)[-rank:]
    seed, density = draw(st.integers(0, 2**31)), draw(st.sampled_from([0.1, 0.5, 0.9]))
    values = np.random.default_rng(seed).random(shape) < density
    if rank > 2 and draw(st.integers(0, 3)) == 3:
        values[:] = values[0]
    return Array(BoolArray(values))


@st.composite
def documents(draw: Draw, context: MaskContext) -> DocIsolation:
    tokens, reset = context.tokens, draw(st.booleans()) and context.positions is None
    if draw(st.booleans()):
        starts = draw(st.sets(st.integers(1, tokens - 1))) if tokens > 1 else set()
        return DocIsolation(boundaries=tuple(sorted(starts)), reset_positions=reset)
    ids = draw(st.lists(st.integers(0, 3), min_size=tokens, max_size=tokens))
    return DocIsolation(segment_ids=tuple(ids), reset_positions=reset)


def leaves(context: MaskContext) -> st.SearchStrategy[Expression]:
    return st.one_of(
        st.just(Causal()),
        st.just(Full()),
        st.integers(0, context.tokens).map(lambda n: BidirectionalPrefix(n=n)),
        spans(context).map(lambda span: BidirectionalPrefix(span=span)),
        st.builds(Sliding, st.integers(1, 8), st.integers(0, 4)),
        st.integers(1, 8).map(Chunked),
        documents(context),
        arrays(context),
        arrays(context),
    )


def expressions(context: MaskContext) -> st.SearchStrategy[Expression]:
    return st.recursive(
        leaves(context),
        lambda term: st.one_of(
            st.lists(term, min_size=1, max_size=3).map(lambda terms: All(tuple(terms))),
            st.lists(term, min_size=1, max_size=3).map(lambda terms: AnyOf(tuple(terms))),
            term.map(Not),
            st.builds(Minus, term, term),
        ),
        max_leaves=5,
    )


def index_lists(extent: int) -> st.SearchStrategy[tuple[int, ...] | None]:
    return st.none() | st.sets(st.integers(0, extent - 1), min_size=1).map(lambda found: tuple(sorted(found)))


def edges(context: MaskContext) -> st.SearchStrategy[Edge]:
    return st.builds(
        Edge,
        spans(context),
        spans(context),
        index_lists(context.geometry.layers),
        index_lists(context.geometry.heads),
        st.sampled_from(CutMode),
    )


@st.composite
def specs(draw: Draw, context: MaskContext) -> MaskSpec:
    return MaskSpec(
        base=draw(expressions(context)),
        edges=tuple(draw(st.lists(edges(context), max_size=4))),
        empty_row=draw(st.sampled_from(EmptyRow)),
        replace_native=draw(st.booleans()),
    )


@st.composite
def masks(draw: Draw, max_length: int = 16) -> ResolvedMask:
    context = draw(contexts(max_length))
    for _ in range(8):
        try:
            return resolve(draw(specs(context)), context)
        except Problem as problem:  # resets that contradict each other: a legal refusal, tested in the unit tests
            assert problem.reason is Reason.CONFLICT  # noqa: PT017 - it is about which masks may be thrown away
    return resolve(MaskSpec(), context)


def planned(resolved: ResolvedMask) -> MaskPlan:
    return compile_mask(resolved, allow_empty_rows=True)


def oracle(resolved: ResolvedMask) -> tuple[Bools, Bools]:
    """May see and zeroed, [L,H,T,T] each, entry by entry."""
    geometry, length = resolved.context.geometry, resolved.context.length
    allowed = np.zeros((geometry.layers, geometry.heads, length, length), np.bool_)
    zeroed = np.zeros_like(allowed)
    for place in np.ndindex(*allowed.shape):
        decision = may_see(resolved, *place)
        allowed[place], zeroed[place] = decision.allowed, decision.zeroed
    return allowed, zeroed


def compiled(plan: MaskPlan) -> tuple[Bools, Bools]:
    shape = (plan.layers, plan.heads, plan.length, plan.length)
    allowed, zeroed = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    for layer in range(plan.layers):
        allowed[layer] = plan.block(layer, 0, plan.length)
        zero = plan.zero_block(layer, 0, plan.length)
        zeroed[layer] = False if zero is None else zero
    return allowed, zeroed


@settings(max_examples=250, deadline=None)
@given(masks())
def test_the_compiler_agrees_with_the_naive_oracle_on_every_entry(resolved: ResolvedMask) -> None:
    wanted, got = oracle(resolved), compiled(planned(resolved))
    assert np.array_equal(got[0], wanted[0])
    assert np.array_equal(got[1], wanted[1])


@settings(max_examples=25, deadline=None)
@given(masks(max_length=24))
def test_the_compiler_agrees_with_the_naive_oracle_on_longer_texts(resolved: ResolvedMask) -> None:
    assert np.array_equal(compiled(planned(resolved))[0], oracle(resolved)[0])


@settings(max_examples=40, deadline=None)
@given(masks(), st.data())
def test_a_block_of_some_rows_is_a_cut_of_the_whole(resolved: ResolvedMask, data: st.DataObject) -> None:
    plan = planned(resolved)
    q0 = data.draw(st.integers(0, plan.length - 1))
    q1 = data.draw(st.integers(q0 + 1, plan.length))
    for layer in range(plan.layers):
        assert np.array_equal(plan.block(layer, q0, q1), plan.block(layer, 0, plan.length)[:, q0:q1])


@settings(max_examples=40, deadline=None)
@given(masks())
def test_row_runs_spell_out_the_block(resolved: ResolvedMask) -> None:
    plan = planned(resolved)
    row = np.zeros(plan.length, np.bool_)
    for start, end in plan.row_runs(plan.layers - 1, plan.heads - 1, plan.length - 1):
        row[start:end] = True
    assert np.array_equal(row, plan.block(plan.layers - 1, plan.length - 1, plan.length)[-1, 0])


@settings(max_examples=40, deadline=None)
@given(masks(max_length=10))
def test_empty_rows_are_those_that_the_oracle_finds_empty(resolved: ResolvedMask) -> None:
    plan = planned(resolved)
    for layer in range(plan.layers):
        for head in range(plan.heads):
            found = [q for q in range(plan.length) if sees_nothing(resolved, layer, head, q)]
            assert plan.empty_rows(layer, head).tolist() == found


@settings(max_examples=40, deadline=None)
@given(masks())
def test_step_ends_are_the_cuts_that_no_earlier_row_looks_across(resolved: ResolvedMask) -> None:
    plan = planned(resolved)
    seen = np.asarray(compiled(plan)[0].any(axis=(0, 1)))
    cuts = [c for c in range(1, plan.length + 1) if not seen[:c, c:].any()]
    assert plan.step_ends().tolist() == cuts


@settings(max_examples=80, deadline=None)
@given(masks(max_length=12))
def test_leaks_are_the_rows_that_information_from_a_later_key_reaches(resolved: ResolvedMask) -> None:
    plan = planned(resolved)
    reached = [{q} for q in range(plan.length)]  # which tokens each row knows of
    for layer in np.asarray(compiled(plan)[0].any(axis=1)):
        reached = [reached[q].union(*(reached[k] for k in np.flatnonzero(layer[q]))) for q in range(plan.length)]
    assert plan.leaks() == tuple(q for q in range(plan.length) if max(reached[q]) > q)


@st.composite
def pairs(draw: Draw) -> tuple[ResolvedMask, ResolvedMask]:
    """Two masks of one model that often agree for a while."""
    context = draw(contexts(12))
    base = draw(st.sampled_from([Causal(), Sliding(3, 1), Full(), Chunked(4)]))
    first = MaskSpec(base, tuple(draw(st.lists(edges(context), max_size=2))), EmptyRow.ZERO)
    second = MaskSpec(base, tuple(draw(st.lists(edges(context), max_size=2))), EmptyRow.ZERO)
    shorter = MaskContext(
        draw(st.integers(max(1, context.length - 3), context.length)), context.geometry, segments={}, positions=None
    )
    plain = MaskSpec(base, (), EmptyRow.ZERO)
    return resolve(first, context), draw(
        st.sampled_from([resolve(second, context), resolve(plain, context), resolve(plain, shorter)])
    )


@settings(max_examples=80, deadline=None)
@given(pairs())
def test_the_shared_prefix_is_the_longest_beginning_that_agrees_and_sees_nothing_beyond(
    pair: tuple[ResolvedMask, ResolvedMask],
) -> None:
    left, right = planned(pair[0]), planned(pair[1])
    (seen_left, zero_left), (seen_right, zero_right) = compiled(left), compiled(right)
    best = 0
    for p in range(1, min(left.length, right.length) + 1):
        same = (
            np.array_equal(seen_left[:, :, :p, :p], seen_right[:, :, :p, :p])
            and np.array_equal(zero_left[:, :, :p, :p], zero_right[:, :, :p, :p])
            and np.array_equal(pair[0].positions[:p], pair[1].positions[:p])
        )
        if same and not seen_left[:, :, :p, p:].any() and not seen_right[:, :, :p, p:].any():
            best = p
    assert left.shared_prefix(right) == best
    assert right.shared_prefix(left) == best


def mix_by_hand(q: int, k: int, seed_f: int, seed_g: int) -> int:
    """The formula of the receipt, in plain Python."""

    def h(n: int, seed: int) -> int:
        n = (n * 0x9E3779B1 + seed) % 2**32
        n ^= n >> 16
        n = n * 0x85EBCA6B % 2**32
        n ^= n >> 13
        n = n * 0xC2B2AE35 % 2**32
        return n ^ n >> 16

    return (h(q, seed_f) | 1) * h(k, seed_g) % 2**32


def count_by_hand(block: Bools) -> tuple[int, int, int]:
    entries = [(int(q), int(k)) for q, k in np.argwhere(block)]
    return (
        len(entries),
        sum(mix_by_hand(q, k, 0x243F6A88, 0x85A308D3) for q, k in entries) % 2**32,
        sum(mix_by_hand(q, k, 0x13198A2E, 0x03707344) for q, k in entries) % 2**32,
    )


@settings(max_examples=60, deadline=None)
@given(masks(max_length=10))
def test_expected_counts_are_those_counted_entry_by_entry(resolved: ResolvedMask) -> None:
    plan = planned(resolved)
    allowed, zeroed = compiled(plan)
    counts = receipts.expected_counts(plan)
    for layer, head in np.ndindex(plan.layers, plan.heads):
        got = (counts.allowed[layer, head], counts.sum_a[layer, head], counts.sum_b[layer, head])
        assert tuple(int(x) for x in got) == count_by_hand(allowed[layer, head])
        got = (counts.zeroed[layer, head], counts.zeroed_sum_a[layer, head], counts.zeroed_sum_b[layer, head])
        assert tuple(int(x) for x in got) == count_by_hand(zeroed[layer, head])
        assert counts.empty_rows[layer, head] == (~allowed[layer, head].any(axis=1)).sum()


@settings(max_examples=40, deadline=None)
@given(masks(), st.data())
def test_tallies_of_steps_add_up_to_the_expected_receipt(resolved: ResolvedMask, data: st.DataObject) -> None:
    plan = planned(resolved)
    cut = data.draw(st.integers(0, plan.length))
    shared, own = receipts.Tally(plan.layers, plan.heads), receipts.Tally(plan.layers, plan.heads)
    for tally, q0, q1 in ((shared, 0, cut), (own, cut, plan.length)):
        for layer in range(plan.layers):
            tally.add(layer, plan.block(layer, q0, q1), q0, zeroed=plan.zero_block(layer, q0, q1))
    receipt = receipts.check(shared.counts() + own.counts(), plan)
    assert receipt.effective_mask_digest == receipts.effective_mask_digest(plan)


@settings(max_examples=40, deadline=None)
@given(masks(max_length=12))
def test_the_numbers_of_a_receipt_follow_their_definitions(resolved: ResolvedMask) -> None:
    plan = planned(resolved)
    allowed, zeroed = compiled(plan)
    native = np.zeros_like(allowed)
    base = np.zeros_like(allowed)
    unwindowed = Geometry(plan.layers, plan.heads)
    for layer in range(plan.layers):
        window = resolved.context.geometry.window(layer)
        rows = np.arange(plan.length)
        distance = rows[:, None] - rows[None, :]
        native[layer] = (distance >= 0) & (distance < (plan.length if window is None else window))
    bare = MaskContext(plan.length, unwindowed, resolved.context.prefix, positions=resolved.context.positions)
    base = compiled(planned(resolve(MaskSpec(resolved.base, empty_row=EmptyRow.ZERO), bare)))[0]
    applied = allowed & ~zeroed
    receipt = receipts.expected_receipt(plan)
    assert receipt.entries_cut == (native & ~applied).sum()
    assert receipt.entries_cut_that_base_allowed == (native & base & ~applied).sum()
    assert receipt.layers_hit == tuple(
        n for n in range(plan.layers) if (native[n] != applied[n]).any() or zeroed[n].any()
    )
    assert receipt.rows_emptied == plan.rows_emptied()
    assert receipt.layers_applied == tuple(range(plan.layers))


@settings(max_examples=80, deadline=None)
@given(masks())
def test_a_json_round_trip_keeps_mask_and_digest(resolved: ResolvedMask) -> None:
    again = parse_json(to_json(resolved.spec))
    assert again == resolved.spec
    assert digest(again) == digest(resolved.spec)


@settings(max_examples=40, deadline=None)
@given(masks())
def test_the_shortcuts_for_plain_masks_tell_the_truth(resolved: ResolvedMask) -> None:
    plan = planned(resolved)
    allowed, zeroed = compiled(plan)
    causal = np.tri(plan.length, dtype=np.bool_)
    assert plan.is_plain_causal() == (bool((allowed == causal).all()) and not zeroed.any())
    assert plan.sparsity() == 1 - allowed.sum() / allowed.size
