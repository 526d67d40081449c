"""Pieces and foreign text on a terminal: visible, unambiguous, and unable to drive it."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualtrace.cli.visible import show_line, show_piece, show_text


@pytest.mark.parametrize(
    ("piece", "shown"),
    [
        (b" the", "·the"), (b"\n\n", "↵↵"), (b"\t", "→"), (b"\xf0", "\\xf0"), (b"\xf0\x9f\x99\x82", "🙂"),
        (b"a\xffb", "a\\xffb"), (b"\x1b[31m", "\\u001b[31m"), ("\x9b".encode(), "\\u009b"), (b"\x7f", "\\u007f"),
        (b"\r", "\\u000d"), ("\u202e".encode(), "\\u202e"), ("\u200d".encode(), "\\u200d"),
        ("\u2028".encode(), "\\u2028"),
        ("\u00a0".encode(), "\\u00a0"), ("א".encode(), "\\u05d0"), ("ب".encode(), "\\u0628"), ("́".encode(), "◌́"),
        ("é".encode(), "é"), (b"\\", "\\\\"), ("·".encode(), "\\u00b7"), ("猫".encode(), "猫"), (b"", ""),
        ("\U000e0001".encode(), "\\U000e0001"),
    ],
)  # fmt: skip
def test_a_piece_is_shown_as(piece: bytes, shown: str) -> None:
    assert show_piece(piece) == shown


@given(st.binary(max_size=24))
def test_no_piece_can_drive_hide_or_reorder(piece: bytes) -> None:
    for character in show_piece(piece):
        assert unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}
        assert unicodedata.bidirectional(character) not in {"R", "AL", "AN"}


@given(st.binary(max_size=6), st.binary(max_size=6))
def test_two_pieces_never_look_the_same(one: bytes, other: bytes) -> None:
    assert (show_piece(one) == show_piece(other)) == (one == other)


def test_a_message_keeps_its_spaces_and_lines_and_loses_its_escapes() -> None:
    assert show_text("two words\nand \x1b[2J more") == "two words\nand \\u001b[2J more"


def test_a_long_line_is_cut_with_a_mark() -> None:
    assert show_line("abc\ndefgh", 6) == "abc d…"
