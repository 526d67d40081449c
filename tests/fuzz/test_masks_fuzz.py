"""Nothing a stranger sends as a mask may do anything but become a mask or be refused with a reason."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dualtrace.masks.arrays import MAGIC, read_json_matrix, read_npy
from dualtrace.masks.json_form import digest, parse_json, to_json
from dualtrace.masks.plan import compile_mask
from dualtrace.masks.resolve import Geometry, MaskContext, resolve
from dualtrace.problems import Problem

pytestmark = pytest.mark.fuzz

WORDS = [
    "version", "base", "edges", "empty_row", "replace_native", "causal", "full", "bidirectional_prefix", "sliding",
    "chunked", "doc_isolation", "array", "all", "any", "not", "minus", "from", "take", "n", "span", "keys_back",
    "keys_ahead", "size", "boundaries", "segment_ids", "reset_positions", "npy", "matrix", "artifact_digest",
    "queries", "keys", "layers", "heads", "mode", "tokens", "chars", "segment", "alignment", "STRICT", "OVERLAP",
    "PRE_SOFTMAX", "POST_SOFTMAX_ZERO", "ERROR", "ZERO", "SELF", "query", "item", "prompt", "completion",
]  # fmt: skip
WORD = st.sampled_from(WORDS) | st.text(max_size=3)
NUMBER = st.integers(-2, 9) | st.sampled_from([2**31 - 1, 2**31, 10**30, True, False, None, 1.5, float("nan")])
ANYTHING = st.recursive(
    NUMBER | WORD,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORD, inner, max_size=3),
    max_leaves=20,
)
SPAN = st.fixed_dictionaries({"tokens": st.lists(st.integers(-1, 9), min_size=1, max_size=3)}) | ANYTHING
LEAF = st.sampled_from(
    [{"causal": {}}, {"full": {}}, {"chunked": {"size": 3}}, {"sliding": {"keys_back": 2, "keys_ahead": 1}}]
) | st.dictionaries(st.sampled_from(["bidirectional_prefix", "doc_isolation", "array"]), ANYTHING, max_size=1)
EXPRESSION = st.recursive(
    LEAF | ANYTHING,
    lambda inner: st.dictionaries(
        st.sampled_from(["all", "any", "not", "minus"]),
        inner | st.lists(inner, max_size=3) | st.fixed_dictionaries({"from": inner, "take": inner}),
        max_size=1,
    ),
    max_leaves=6,
)
EDGE = st.fixed_dictionaries(
    {"queries": SPAN, "keys": SPAN},
    optional={"layers": st.lists(st.integers(-1, 3), max_size=2), "heads": ANYTHING, "mode": WORD},
)
NEAR_MASK = st.fixed_dictionaries(
    {"base": EXPRESSION}, optional={"edges": st.lists(EDGE, max_size=2), "empty_row": WORD, "version": NUMBER}
)


def use(source: Any) -> None:
    """Everything that happens to a mask on its way in."""
    try:
        mask = parse_json(source)
        assert parse_json(to_json(mask)) == mask
        assert digest(mask).startswith("sha256:")
        compile_mask(resolve(mask, MaskContext(6, Geometry(2, 2)))).leaks()
    except Problem as problem:
        assert problem.detail.message  # noqa: PT017 - being refused is fine, being refused without a word is not


@settings(max_examples=150, deadline=None)
@given(NEAR_MASK | ANYTHING)
def test_any_json_value_becomes_a_mask_or_is_refused(value: Any) -> None:
    use(json.dumps(value))


@settings(max_examples=100, deadline=None)
@given(NEAR_MASK | ANYTHING)
def test_any_python_value_becomes_a_mask_or_is_refused(value: Any) -> None:
    use(value if isinstance(value, dict | str | bytes) else {"base": value})


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40) | st.binary(max_size=40))
@example('{"base":' * 50_000)
@example(b"\xff\xfe{")
def test_any_text_becomes_a_mask_or_is_refused(text: str | bytes) -> None:
    use(text)


def saved(values: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=False)
    return stream.getvalue()


GOOD = saved(np.tri(4, dtype=np.bool_))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_damaged_npy_file_is_read_or_refused(damage: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for place, byte in damage:
        data[place] = byte
    refuse_or_read(bytes(data))


@settings(max_examples=150, deadline=None)
@given(
    st.text("{}()[]'\"descrfotan_:, |<b1O23458", max_size=120)
    | st.builds(
        "{{'descr': {!r}, 'fortran_order': {}, 'shape': {}, }}".format,
        st.sampled_from(["|b1", "<f4", ">f8", "|u1", "|O", "<c8", "<f16", "|V9"]) | st.text(max_size=4),
        st.sampled_from(["False", "True", "0"]),
        st.lists(st.integers(0, 9), max_size=5).map(tuple) | st.text("(0123456789,)", max_size=30),
    ),
    st.binary(max_size=64),
)
def test_any_npy_header_is_read_or_refused(header: str, data: bytes) -> None:
    text = header.encode()
    refuse_or_read(MAGIC + b"\x01\x00" + len(text).to_bytes(2, "little") + text + data)


def refuse_or_read(data: bytes) -> None:
    try:
        assert read_npy(data).content.values.ndim in (2, 3, 4)
    except Problem as problem:
        assert problem.detail.message  # noqa: PT017


@settings(max_examples=150, deadline=None)
@given(st.recursive(NUMBER, lambda inner: st.lists(inner, max_size=4), max_leaves=30))
def test_any_nested_list_is_a_matrix_or_is_refused(value: Any) -> None:
    try:
        assert read_json_matrix(value).content.values.ndim in (2, 3, 4)
    except Problem as problem:
        assert problem.detail.message  # noqa: PT017
