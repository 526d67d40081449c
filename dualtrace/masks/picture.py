"""A mask to look at: PNG bytes and terminal drawings. Small by default; a large one must be asked for.

It knows cells, colours and the PNG format. It must not know files or terminals.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt

from dualtrace.masks.limits import MAX_PICTURE_TOKENS
from dualtrace.masks.plan import MaskPlan
from dualtrace.problems import InvalidArgument, Reason

Bools = npt.NDArray[np.bool_]
Cells = npt.NDArray[np.uint8]

HIDDEN, SEEN, ZEROED = 0, 1, 2
PALETTE = ((0xF4, 0xF1, 0xEA), (0x1F, 0x4E, 0x79), (0xE0, 0x8A, 0x1E))  # paper, ink, orange
GRID = 3  # palette index of the line between cells
GRID_COLOUR = (0xD9, 0xD4, 0xC7)


def cells(plan: MaskPlan, layer: int, head: int) -> Cells:
    """[T,T] uint8 of HIDDEN, SEEN, ZEROED for one layer and head."""
    rule = plan.rule(layer, head)
    drawn = rule.allowed.block(0, plan.length).astype(np.uint8)
    if rule.zeroed is not None:
        drawn[rule.zeroed.block(0, plan.length)] = ZEROED
    return drawn


def union_cells(plan: MaskPlan) -> Cells:
    """[T,T] the same for the union: SEEN when any layer and head sees it, ZEROED when those that do all zero it."""
    drawn = np.zeros((plan.length, plan.length), np.uint8)
    for rule in plan.rules:
        allowed = rule.allowed.block(0, plan.length)
        zeroed = np.zeros_like(allowed) if rule.zeroed is None else rule.zeroed.block(0, plan.length)
        drawn[zeroed & (drawn == HIDDEN)] = ZEROED
        drawn[allowed & ~zeroed] = SEEN
    return drawn


def require_drawable(length: int, *, allow_large: bool) -> None:
    """Call it before `cells`, which builds the square."""
    if length > MAX_PICTURE_TOKENS and not allow_large:
        raise InvalidArgument(
            Reason.MASK_TOO_LARGE,
            f"a picture of {length} tokens was asked; say allow_large to get it",
            field="allow_large",
            allowed=f"up to {MAX_PICTURE_TOKENS} tokens",
        )


def png_bytes(drawn: Cells | Bools, *, scale: int | None = None, allow_large: bool = False) -> bytes:
    """A PNG of cells [Q,K]; row q from top to bottom, key k from left to right, `scale` pixels a cell."""
    require_drawable(max(drawn.shape), allow_large=allow_large)
    if scale is None:
        scale = max(1, 512 // max(drawn.shape))
    pixels = np.kron(drawn.astype(np.uint8), np.ones((scale, scale), np.uint8))
    if scale >= 6:
        pixels[scale - 1 :: scale, :] = GRID
        pixels[:, scale - 1 :: scale] = GRID
    height, width = pixels.shape
    lines = np.concatenate((np.zeros((height, 1), np.uint8), pixels), axis=1)  # filter byte 0 before each line
    palette = bytes(channel for colour in (*PALETTE, GRID_COLOUR) for channel in colour)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            _chunk(b"PLTE", palette),
            _chunk(b"IDAT", zlib.compress(lines.tobytes(), 6)),
            _chunk(b"IEND", b""),
        )
    )


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def drawing(drawn: Cells | Bools, *, allow_large: bool = False) -> tuple[str, ...]:
    """Lines of text: one character a key, two rows a line; zeroed entries are drawn as hidden."""
    require_drawable(max(drawn.shape), allow_large=allow_large)
    seen = drawn.astype(np.uint8) == SEEN
    if seen.shape[0] % 2:
        seen = np.concatenate((seen, np.zeros((1, seen.shape[1]), np.bool_)))
    blocks = " ▀▄█"
    return tuple(
        "".join(blocks[int(up) + 2 * int(down)] for up, down in zip(seen[i], seen[i + 1], strict=True))
        for i in range(0, seen.shape[0], 2)
    )
