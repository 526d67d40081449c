"""Arrays from outside: what numpy writes is read, what lies is refused."""

from __future__ import annotations

import io
import pickle
import struct
from typing import Any

import numpy as np
import pytest

from dualtrace.masks.arrays import MAGIC, BoolArray, npy_bytes, read_json_matrix, read_npy
from dualtrace.masks.limits import ArrayLimits
from dualtrace.problems import Problem, Reason

CAUSAL = np.tri(3, dtype=np.bool_)
MINUS_INFINITY = float("-inf")


def saved(values: Any, *, pickled: bool = False) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=pickled)
    return stream.getvalue()


def with_header(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin-1")
    size = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    return MAGIC + version + size + text + data


def plain_header(shape: str = "(3, 3)", descr: str = "'|b1'", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


def refusal(data: bytes, limits: ArrayLimits | None = None) -> Problem:
    with pytest.raises(Problem) as caught:
        read_npy(data, limits or ArrayLimits())
    return caught.value


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 3), (4, 2, 3, 3)])
def test_a_boolean_array_is_read_as_numpy_wrote_it(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(1).random(shape) < 0.5
    assert np.array_equal(read_npy(saved(values)).content.values, values)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_format_is_read(version: tuple[int, int]) -> None:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, CAUSAL, version=version)
    assert np.array_equal(read_npy(stream.getvalue()).content.values, CAUSAL)


def test_what_we_write_numpy_reads() -> None:
    assert np.array_equal(np.load(io.BytesIO(npy_bytes(CAUSAL)), allow_pickle=False), CAUSAL)


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i4", ">i8", "<f2", "<f4", ">f8"])
def test_zero_and_one_are_converted_with_a_note(dtype: str) -> None:
    reading = read_npy(saved(CAUSAL.astype(dtype)))
    assert np.array_equal(reading.content.values, CAUSAL)
    assert "1 = may see" in reading.note


def test_an_additive_mask_is_converted_with_a_note() -> None:
    reading = read_npy(saved(np.where(CAUSAL, 0.0, MINUS_INFINITY)))
    assert np.array_equal(reading.content.values, CAUSAL)
    assert "-inf = cut" in reading.note


def test_a_boolean_array_needs_no_note() -> None:
    assert read_npy(saved(CAUSAL)).note == ""


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.zeros((3, 3), np.float32), Reason.CONFLICT),
        (np.full((3, 3), np.nan), Reason.MALFORMED),
        (np.array([[0.0, 1.0], [MINUS_INFINITY, 0.0]]), Reason.MALFORMED),
        (np.full((3, 3), np.finfo(np.float32).min), Reason.MALFORMED),
        (np.full((3, 3), 2, np.int64), Reason.MALFORMED),
        (np.zeros((3, 3), np.complex64), Reason.MALFORMED),
        (np.zeros((3, 3), "U1"), Reason.MALFORMED),
        (np.zeros((3, 3), [("a", "?")]), Reason.MALFORMED),
        (np.asfortranarray(np.tri(3, dtype=np.bool_)), Reason.MALFORMED),
        (np.zeros(3, np.bool_), Reason.MALFORMED),
        (np.zeros((1, 1, 1, 1, 1), np.bool_), Reason.MALFORMED),
        (np.zeros((0, 0), np.bool_), Reason.EMPTY),
        (np.zeros((3, 4), np.bool_), Reason.MALFORMED),
    ],
)
def test_an_array_that_cannot_be_a_mask_is_refused(values: Any, reason: Reason) -> None:
    assert refusal(saved(values)).reason is reason


def test_pickled_objects_are_never_unpickled() -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("the pickle was run",))

    data = with_header(plain_header(descr="'|O'"), pickle.dumps([Trap()] * 9))
    assert "pickled" in refusal(data).detail.message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"PK\x03\x04" + saved(CAUSAL),
        saved(CAUSAL)[:20],
        saved(CAUSAL)[:-1],
        saved(CAUSAL) + b"\x00",
        saved(CAUSAL)[:-1] + b"\x02",
        with_header(plain_header(), b"\x01" * 9, version=b"\x04\x00"),
        with_header(plain_header("(3, 4)"), b"\x01" * 9),
        with_header(plain_header("(-3, -3)"), b"\x01" * 9),
        with_header(plain_header("3"), b"\x01" * 9),
        with_header(plain_header("(3, , 3)"), b"\x01" * 9),
        with_header(plain_header(order="0"), b"\x01" * 9),
        with_header(plain_header(order="__import__('os')"), b"\x01" * 9),
        with_header("{'descr': '|b1', 'shape': (3, 3)}", b"\x01" * 9),
        with_header("{'descr': '|b1', 'descr': '|b1', 'fortran_order': False, 'shape': (3, 3)}", b"\x01" * 9),
        with_header("{'extra': '|b1', 'fortran_order': False, 'shape': (3, 3)}", b"\x01" * 9),
        with_header("(" * 4000, b"\x01" * 9),
        with_header(plain_header().replace("{", "{é"), b"\x01" * 9),
        MAGIC + b"\x02\x00" + b"\xff\xff\xff\xff" + b"{" * 100,
    ],
)
def test_a_file_that_lies_about_itself_is_malformed(data: bytes) -> None:
    assert refusal(data).reason is Reason.MALFORMED


def test_a_shape_bomb_is_refused_before_anything_is_allocated() -> None:
    shape = "(999999999999, 999999999999)"
    assert refusal(with_header(plain_header(shape), b"\x01" * 9)).reason is Reason.MASK_TOO_LARGE


def test_a_file_larger_than_the_limit_is_refused() -> None:
    assert refusal(saved(CAUSAL), ArrayLimits(array_bytes=64)).reason is Reason.MASK_TOO_LARGE


def test_an_array_with_more_entries_than_the_limit_is_refused() -> None:
    assert refusal(saved(CAUSAL), ArrayLimits(array_entries=8)).reason is Reason.MASK_TOO_LARGE


@pytest.mark.parametrize("matrix", [[[True, False], [True, True]], [[1, 0], [1, 1]]])
def test_a_json_matrix_is_read(matrix: Any) -> None:
    assert read_json_matrix(matrix).content.values.tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize(
    ("matrix", "reason"),
    [
        (None, Reason.MALFORMED),
        ([], Reason.MALFORMED),
        ([[]], Reason.EMPTY),
        ([[1, 0], [1]], Reason.MALFORMED),
        ([[1, 0], 1], Reason.MALFORMED),
        ([[1, [0]], [1, 1]], Reason.MALFORMED),
        ([[1, 2], [1, 1]], Reason.MALFORMED),
        ([[1.0, 0.0], [1.0, 1.0]], Reason.MALFORMED),
        ([[1, True], [1, 1]], Reason.MALFORMED),
        ([["1", "0"], ["1", "1"]], Reason.MALFORMED),
        ([[1, None], [1, 1]], Reason.MALFORMED),
        ([[1, 0, 0], [1, 1, 0]], Reason.MALFORMED),
        ([[[[[1]]]]], Reason.NESTED_TOO_DEEP),
    ],
)
def test_a_json_matrix_of_the_wrong_shape_is_refused(matrix: Any, reason: Reason) -> None:
    with pytest.raises(Problem) as caught:
        read_json_matrix(matrix)
    assert caught.value.reason is reason


def test_a_json_matrix_larger_than_the_limit_is_refused() -> None:
    with pytest.raises(Problem) as caught:
        read_json_matrix([[1] * 4] * 4, ArrayLimits(array_entries=15))
    assert caught.value.reason is Reason.MASK_TOO_LARGE


def test_an_array_cannot_be_changed_through_the_one_it_was_made_from() -> None:
    values = CAUSAL.copy()
    array = BoolArray(values)
    values[0, 2] = True
    assert not array.values[0, 2]


def test_an_array_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        BoolArray(CAUSAL.copy()).values[0, 2] = True


def test_shape_is_part_of_an_arrays_identity() -> None:
    assert BoolArray(np.ones((1, 1, 1), np.bool_)) != BoolArray(np.ones((1, 1), np.bool_))
