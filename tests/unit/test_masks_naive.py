"""The answer to "why may q see k": the rule that decided, in words."""

from __future__ import annotations

import numpy as np
import pytest

from dualtrace.masks.naive import Decision, may_see
from dualtrace.masks.resolve import Geometry, MaskContext, resolve
from dualtrace.masks.spec import (
    All,
    AnyOf,
    Causal,
    Chunked,
    CutMode,
    DocIsolation,
    Edge,
    EmptyRow,
    Expression,
    MaskSpec,
    Minus,
    Not,
    Sliding,
    TokenRange,
)
from dualtrace.problems import Problem, Reason

EDGES = (
    Edge(TokenRange(3, 5), TokenRange(0, 2), layers=(1,)),
    Edge(TokenRange(4, 5), TokenRange(2, 3), heads=(1,), mode=CutMode.POST_SOFTMAX_ZERO),
    Edge(TokenRange(0, 1), TokenRange(0, 1), layers=(0,)),
)


def why(
    q: int, k: int, base: Expression | None = None, layer: int = 1, head: int = 0, empty: EmptyRow = EmptyRow.SELF
) -> Decision:
    spec = MaskSpec(Causal() if base is None else base, EDGES, empty)
    context = MaskContext(6, Geometry(2, 2, (None, 4)), positions=np.arange(6, dtype=np.int32))
    return may_see(resolve(spec, context), layer, head, q, k)


@pytest.mark.parametrize(
    ("decision", "rule"),
    [
        (why(2, 1), "base.causal allows it"),
        (why(2, 3), "base.causal does not allow it"),
        (why(4, 1), "edges[0] cuts it at layer 1 head 0"),
        (why(4, 2, head=1), "edges[1] sets its weight to zero after the softmax at layer 1 head 1"),
        (why(5, 1), "the native window of layer 1 is 4; the positions are 4 apart"),
        (why(0, 0, layer=0), "empty_row SELF: row 0 may see nothing else, so it sees itself"),
        (
            why(0, 0, layer=0, empty=EmptyRow.ZERO),
            "edges[2] cuts it at layer 0 head 0; the row may see nothing (empty_row ZERO)",
        ),
        (why(5, 3, All((Causal(), Chunked(2)))), "base.all[1].chunked(size=2) does not allow it"),
        (why(5, 3, AnyOf((Chunked(2), Sliding(3)))), "base.any[1].sliding(keys_back=3, keys_ahead=0) allows it"),
        (why(1, 3, Not(Causal())), "not: base.not.causal does not allow it"),
        (why(3, 3, Minus(Causal(), Sliding(1))),
         "minus takes it: base.minus.take.sliding(keys_back=1, keys_ahead=0) allows it"),
        (why(3, 2, DocIsolation(boundaries=(3,))),
         "base.doc_isolation(row in document 1, key in document 0) does not allow it"),
    ],
)  # fmt: skip
def test_the_rule_that_decided_is_named(decision: Decision, rule: str) -> None:
    assert decision.rule == rule


def test_a_zeroed_key_is_seen() -> None:
    assert (why(4, 2, head=1).allowed, why(4, 2, head=1).zeroed) == (True, True)


@pytest.mark.parametrize(("layer", "head", "q", "k"), [(2, 0, 0, 0), (0, 2, 0, 0), (0, 0, 6, 0), (0, 0, 0, -1)])
def test_a_place_that_does_not_exist_is_refused(layer: int, head: int, q: int, k: int) -> None:
    with pytest.raises(Problem) as caught:
        why(q, k, layer=layer, head=head)
    assert caught.value.reason is Reason.OUT_OF_RANGE
