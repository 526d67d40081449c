"""Pictures: a PNG that a decoder of the format reads back, and a drawing that shows the same cells."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt
import pytest

from dualtrace.masks.picture import HIDDEN, SEEN, ZEROED, cells, drawing, png_bytes, union_cells
from dualtrace.masks.plan import MaskPlan, compile_mask
from dualtrace.masks.resolve import Geometry, MaskContext, resolve
from dualtrace.masks.spec import CutMode, Edge, MaskSpec, TokenRange
from dualtrace.problems import Problem, Reason


def plan() -> MaskPlan:
    edges = (
        Edge(TokenRange(2, 3), TokenRange(0, 1), layers=(0,)),
        Edge(TokenRange(3, 4), TokenRange(0, 2), mode=CutMode.POST_SOFTMAX_ZERO),
    )
    return compile_mask(resolve(MaskSpec(edges=edges), MaskContext(4, Geometry(2, 1))))


def decoded(png: bytes) -> npt.NDArray[np.uint8]:
    """The palette indices of an 8-bit palette PNG without filters; every checksum is checked."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, offset = {}, 8
    while offset < len(png):
        (size,) = struct.unpack_from(">I", png, offset)
        kind, content = png[offset + 4 : offset + 8], png[offset + 8 : offset + 8 + size]
        assert struct.unpack_from(">I", png, offset + 8 + size)[0] == zlib.crc32(kind + content)
        chunks[kind] = content
        offset += 12 + size
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 3, 0, 0, 0]
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


def test_cells_tell_hidden_seen_and_zeroed_apart() -> None:
    assert cells(plan(), 0, 0).tolist() == [
        [SEEN, HIDDEN, HIDDEN, HIDDEN],
        [SEEN, SEEN, HIDDEN, HIDDEN],
        [HIDDEN, SEEN, SEEN, HIDDEN],
        [ZEROED, ZEROED, SEEN, SEEN],
    ]


def test_the_union_shows_what_any_layer_sees() -> None:
    assert union_cells(plan())[2].tolist() == [SEEN, SEEN, SEEN, HIDDEN]


def test_a_png_holds_one_pixel_a_cell_at_scale_one() -> None:
    drawn = cells(plan(), 0, 0)
    assert np.array_equal(decoded(png_bytes(drawn, scale=1)), drawn)


def test_a_png_of_a_small_mask_is_enlarged() -> None:
    pixels = decoded(png_bytes(cells(plan(), 0, 0)))
    assert pixels.shape == (512, 512)
    assert pixels[64, 64] == SEEN


def test_a_drawing_shows_two_rows_a_line() -> None:
    assert drawing(cells(plan(), 0, 0)) == ("█▄  ", " ▀█▄")


def test_a_drawing_of_an_odd_number_of_rows_ends_with_half_a_line() -> None:
    assert drawing(np.tri(3, dtype=np.bool_)) == ("█▄ ", "▀▀▀")


def test_a_large_picture_must_be_asked_for() -> None:
    with pytest.raises(Problem) as caught:
        png_bytes(np.ones((257, 257), np.bool_))
    assert caught.value.reason is Reason.MASK_TOO_LARGE


def test_a_large_picture_that_is_asked_for_is_made() -> None:
    assert decoded(png_bytes(np.ones((257, 257), np.bool_), scale=1, allow_large=True)).all()
