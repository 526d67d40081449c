"""Logits are read exactly: logprobs, ranks with ties, top-k, tails, and rows that must not be used."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dualtrace.arrays import FloatArray
from dualtrace.engine import Read, Readout, int_array
from dualtrace.problems import Problem, Reason
from dualtrace.reference.readout import assemble, read_blocks, read_logits


def read_all(logits: FloatArray, block_rows: int = 64, **asked: Any) -> Readout:
    """Every row of `logits`, through blocks as an engine would."""
    for name in ("targets", "extra_ids"):
        if name in asked:
            asked[name] = int_array(asked[name])
    read = Read(rows=int_array(range(len(logits))), **asked)
    blocks = [read_logits(logits[block.rows], block) for block in read_blocks(read, block_rows)]
    return assemble(0, 0, len(logits), read, blocks, computed_tokens=len(logits))


def random_logits(rows: int, width: int, levels: int | None = None) -> FloatArray:
    """Seeded logits; `levels` makes many ties."""
    stream = np.random.default_rng(7)
    if levels is None:
        return stream.normal(0, 3, (rows, width))
    return stream.integers(0, levels, (rows, width)).astype(np.float64)


def test_uniform_logits_give_minus_log_v() -> None:
    readout = read_all(np.zeros((1, 50)), targets=[3])
    assert readout.logprobs is not None
    assert readout.logprobs[0] == -math.log(50)


def test_a_rank_counts_what_is_above_and_ties_what_is_level() -> None:
    readout = read_all(np.array([[5.0, 2.0, 2.0, 2.0, 1.0]] * 3), targets=[0, 2, 4])
    assert readout.ranks is not None
    assert readout.ties is not None
    assert readout.ranks.tolist() == [1, 2, 5]
    assert readout.ties.tolist() == [0, 2, 0]


def test_huge_logits_neither_overflow_nor_lose_the_difference() -> None:
    readout = read_all(np.array([[1e5, 1e5 - 1.0]]), targets=[1])
    assert readout.logprobs is not None
    assert readout.logprobs[0] == pytest.approx(-1 - math.log1p(math.exp(-1)), abs=1e-11)


@pytest.mark.parametrize("k", [1, 2, 7, 49, 50])
def test_the_top_ids_are_those_of_a_full_stable_sort(k: int) -> None:
    logits = random_logits(20, 50, levels=6)
    readout = read_all(logits, top_k=k)
    assert readout.top_ids is not None
    assert np.array_equal(readout.top_ids, np.argsort(-logits, axis=1, kind="stable")[:, :k])


def test_top_logprobs_stand_under_their_ids() -> None:
    logits = random_logits(4, 30)
    readout = read_all(logits, top_k=3)
    assert readout.top_ids is not None
    assert readout.top_logprobs is not None
    for row, column in np.ndindex(4, 3):
        alone = read_all(logits[row : row + 1], targets=[readout.top_ids[row, column]])
        assert alone.logprobs is not None
        assert readout.top_logprobs[row, column] == alone.logprobs[0]


def test_the_tail_is_what_the_top_leaves() -> None:
    logits = random_logits(5, 40)
    readout = read_all(logits, top_k=4, tail=True)
    assert readout.top_logprobs is not None
    assert readout.tail_logprobs is not None
    assert np.exp(readout.tail_logprobs) == pytest.approx(1 - np.exp(readout.top_logprobs).sum(axis=1), abs=1e-14)


def test_a_tail_far_too_small_for_one_minus_the_rest_is_still_measured() -> None:
    readout = read_all(np.array([[0.0, -700.0, -700.0]]), top_k=1, tail=True)
    assert readout.tail_logprobs is not None
    assert readout.tail_logprobs[0] == pytest.approx(-700 + math.log(2), abs=1e-12)


def test_nothing_is_left_when_the_top_holds_every_id() -> None:
    readout = read_all(random_logits(2, 9), top_k=9, tail=True)
    assert readout.tail_logprobs is not None
    assert np.isneginf(readout.tail_logprobs).all()


def test_a_tail_without_a_top_is_everything() -> None:
    readout = read_all(random_logits(2, 9), tail=True)
    assert readout.tail_logprobs is not None
    assert readout.tail_logprobs.tolist() == [0.0, 0.0]
    assert readout.top_ids is None


def test_the_rest_leaves_out_extra_ids_too_and_counts_none_twice() -> None:
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]]))
    readout = read_all(logits, top_k=1, tail=True, extra_ids=[0, 3])  # 0 is in the top already
    assert readout.tail_logprobs is not None
    assert readout.rest_logprobs is not None
    assert np.exp(readout.tail_logprobs[0]) == pytest.approx(0.6)
    assert np.exp(readout.rest_logprobs[0]) == pytest.approx(0.5)


def test_extra_ids_keep_the_order_in_which_they_were_asked() -> None:
    readout = read_all(np.log(np.array([[0.4, 0.3, 0.2, 0.1]])), extra_ids=[3, 0])
    assert readout.extra_logprobs is not None
    assert np.exp(readout.extra_logprobs[0]) == pytest.approx([0.1, 0.4])


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_row_with_a_broken_logit_is_named_and_gives_no_number(poison: float) -> None:
    logits = random_logits(3, 8)
    logits[1, 5] = poison
    readout = read_all(logits, targets=[0, 0, 0], top_k=2, tail=True, extra_ids=[1])
    assert readout.bad_rows == (1,)
    for column in (readout.logprobs, readout.top_logprobs, readout.extra_logprobs, readout.tail_logprobs):
        assert column is not None
        assert np.isnan(column[1]).all()


def test_a_broken_row_leaves_its_neighbours_alone() -> None:
    sound = random_logits(3, 8)
    broken = sound.copy()
    broken[1, 5] = np.nan
    left, right = (read_all(logits, targets=[0, 1, 2]).logprobs for logits in (sound, broken))
    assert left is not None
    assert right is not None
    assert left[[0, 2]].tolist() == right[[0, 2]].tolist()


def test_the_size_of_the_blocks_changes_nothing() -> None:
    logits = random_logits(10, 30)
    asked: dict[str, Any] = {"targets": range(10), "top_k": 3, "tail": True, "extra_ids": [1, 2]}
    one, many = read_all(logits, 64, **asked), read_all(logits, 3, **asked)
    for name in vars(one):
        assert np.array_equal(getattr(one, name), getattr(many, name)), name


def test_what_was_not_asked_is_absent() -> None:
    readout = read_all(random_logits(2, 5))
    absent = (
        "logprobs",
        "ranks",
        "ties",
        "top_ids",
        "top_logprobs",
        "extra_logprobs",
        "tail_logprobs",
        "rest_logprobs",
    )
    assert [name for name in absent if getattr(readout, name) is not None] == []


def test_the_logits_are_not_changed_by_reading() -> None:
    logits = random_logits(2, 5)
    before = logits.copy()
    read_all(logits, top_k=2, tail=True, extra_ids=[1])
    assert np.array_equal(logits, before)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"top_k": 6}, Reason.OUT_OF_RANGE),
        ({"targets": [5]}, Reason.TOKEN_OUT_OF_RANGE),
        ({"targets": [-1]}, Reason.TOKEN_OUT_OF_RANGE),
        ({"extra_ids": [5]}, Reason.TOKEN_OUT_OF_RANGE),
    ],
)
def test_ids_outside_the_logits_are_refused(asked: dict[str, Any], reason: Reason) -> None:
    with pytest.raises(Problem) as caught:
        read_all(np.zeros((1, 5)), **asked)
    assert caught.value.reason is reason


def test_blocks_of_other_rows_cannot_be_assembled() -> None:
    read = Read(rows=int_array([0, 1, 2]))
    block = read_logits(np.zeros((2, 4)), Read(rows=int_array([0, 1])))
    with pytest.raises(ValueError, match="rows"):
        assemble(0, 0, 3, read, [block], computed_tokens=3)
