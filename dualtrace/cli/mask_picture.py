"""A mask drawn in a terminal: half blocks, two rows a line, with the tokens of the rows beside them.

It knows cells, columns and pieces. It must not know how the cells were got.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from rich.cells import cell_len, set_cell_size
from rich.text import Text

from dualtrace.cli.visible import show_piece
from dualtrace.masks.picture import drawing

Bools = npt.NDArray[np.bool_]

PIECE_CELLS = 12  # at most so many columns of a piece
LEAST_PIECE_CELLS = 3  # below that a piece says nothing
RULER_STEP = 10


def draw(seen: Bools, pieces: Sequence[bytes] | None, prefix: int, width: int, *, allow_large: bool) -> Iterator[Text]:
    """Lines for a terminal of `width` columns: `seen` [T,T], True = may see; row q down, key k to the right.

    `pieces` are those of the tokens; the first `prefix` rows have none.
    """
    rows = seen.shape[0]
    names = _names(rows, pieces, prefix)
    labels = _labels(names, rows, width - rows - 3)
    margin = cell_len(labels[0])
    yield Text(f"{'row':<{margin}}  key 0 on the left, {rows - 1} on the right", "dim", no_wrap=True)
    yield Text(" " * (margin + 2) + _ruler(rows), "dim", no_wrap=True, overflow="ignore")
    for label, line in zip(labels, drawing(seen, allow_large=allow_large), strict=True):
        yield Text.assemble((label, "dim"), "  ", line, no_wrap=True, overflow="ignore")


def columns_needed(rows: int) -> int:
    """The narrowest terminal that a mask of so many rows can be drawn in: row numbers and cells."""
    return 2 * len(str(rows - 1)) + 1 + 2 + rows


def _names(rows: int, pieces: Sequence[bytes] | None, prefix: int) -> list[str] | None:
    if pieces is None or len(pieces) != rows - prefix:
        return None
    return ["(prefix)"] * prefix + [show_piece(piece) or "''" for piece in pieces]


def _labels(names: list[str] | None, rows: int, room: int) -> list[str]:
    """One label for each two rows: their numbers, and their pieces where there is room for both."""
    digits = len(str(rows - 1))
    piece = 0
    if names is not None:
        longest = max(cell_len(name) for name in names)
        piece = min(PIECE_CELLS, longest, (room - 2 * digits - 3) // 2)
    found = []
    for row in range(0, rows, 2):
        halves = [_label(index, names, digits, piece) for index in (row, row + 1)]
        found.append(f"{halves[0]} {halves[1]}")
    return found


def _label(row: int, names: list[str] | None, digits: int, piece: int) -> str:
    with_piece = names is not None and piece >= LEAST_PIECE_CELLS
    rows = 0 if names is None else len(names)
    if with_piece and row >= rows:  # the second half of the last line, where rows are odd
        return " " * (digits + 1 + piece)
    if not with_piece or names is None:
        return f"{row:>{digits}}"
    name = names[row]
    cut = name if cell_len(name) <= piece else set_cell_size(name, piece - 1) + "…"
    return f"{row:>{digits}} {set_cell_size(cut, piece)}"


def _ruler(rows: int) -> str:
    """`0         10        20`: where the tens are."""
    return "".join(f"{tick:<{RULER_STEP}}" for tick in range(0, rows, RULER_STEP)).rstrip()
