"""Pieces and foreign text made safe to look at: what a terminal would obey, hide or reorder is written out.

Pieces and messages may come from a hostile server or model. Pure. It must not know tables or terminals.
"""

from __future__ import annotations

import unicodedata

SPACE, NEWLINE, TAB = "·", "↵", "→"
_MARKS = {" ": SPACE, "\n": NEWLINE, "\t": TAB}
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}  # controls, formats, surrogates, unassigned, odd spaces
_RIGHT_TO_LEFT = {"R", "AL", "AN"}  # a terminal would reorder the whole line around these


def show_piece(piece: bytes | None) -> str:
    """A token's bytes: `·` is a space, `↵` a newline, `→` a tab, \\xf0 a byte that is no text, \\u202e a character
    that cannot be shown. The marks themselves are escaped too, so that nothing has two meanings."""
    if piece is None:
        return "?"
    shown: list[str] = []
    for character in piece.decode("utf-8", "surrogateescape"):
        if 0xDC80 <= ord(character) <= 0xDCFF:  # how Python keeps a byte that is no text
            shown.append(f"\\x{ord(character) - 0xDC00:02x}")
        else:
            shown.append(_show_character(character, first=not shown))
    return "".join(shown)


def _show_character(character: str, *, first: bool) -> str:
    if character in _MARKS:
        return _MARKS[character]
    if character == "\\":
        return "\\\\"
    if character in {SPACE, NEWLINE, TAB} or unicodedata.category(character) in _UNSEEN:
        return escape(character)
    if unicodedata.bidirectional(character) in _RIGHT_TO_LEFT:
        return escape(character)
    if first and unicodedata.category(character).startswith("M"):
        return "◌" + character  # a combining mark needs something to stand on
    return character


def show_text(text: str) -> str:
    """A message or name from elsewhere: readable as it is, but nothing in it can drive the terminal."""
    return "".join(escape(c) if c != " " and c != "\n" and unicodedata.category(c) in _UNSEEN else c for c in text)


def show_line(text: str, width: int = 60) -> str:
    """The same on one line, cut to a width in characters."""
    line = " ".join(show_text(text).split("\n"))
    return line if len(line) <= width else line[: width - 1] + "…"


def escape(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
