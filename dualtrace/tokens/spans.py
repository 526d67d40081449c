"""From characters of a text to tokens. It must not know tokenizers: offsets are all it looks at."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from dualtrace.problems import InvalidArgument, Reason
from dualtrace.tokens.sequence import Tokens


class Alignment(Enum):
    STRICT = "STRICT"  # a token that straddles an edge of the span is an error
    OVERLAP = "OVERLAP"  # it is included, and the answer says so


@dataclass(frozen=True)
class Selected:
    first: int
    last_exclusive: int
    straddled: bool  # a token of the range reaches beyond the character span


def select_span(tokens: Tokens, start: int, end: int, alignment: Alignment) -> Selected:
    """The tokens that overlap the characters [start, end). A token of zero width overlaps nothing."""
    if tokens.starts is None or tokens.ends is None:
        raise InvalidArgument(
            Reason.UNALIGNABLE,
            "a character span was given, but the input is token ids; give a token span",
            field="span",
        )
    _check_range(start, end, int(tokens.ends.max(initial=0)))
    wide = tokens.ends > tokens.starts
    overlapping = np.flatnonzero(wide & (tokens.starts < end) & (tokens.ends > start))
    if not len(overlapping):
        raise InvalidArgument(
            Reason.UNALIGNABLE,
            f"no token stands for characters {start}-{end}: the tokenizer drops them; choose a span that holds a token",
            field="span",
        )
    first, stop = int(overlapping[0]), int(overlapping[-1]) + 1
    outside = overlapping[(tokens.starts[overlapping] < start) | (tokens.ends[overlapping] > end)]
    if alignment is Alignment.STRICT and len(outside):
        index = int(outside[0])
        raise InvalidArgument(
            Reason.UNALIGNABLE,
            f"characters {start}-{end} asked, but token {index} ({tokens.pieces[index]!r}, characters "
            f"{tokens.starts[index]}-{tokens.ends[index]}) straddles an edge; move the edge or ask for OVERLAP",
            field="span",
        )
    return Selected(first, stop, bool(len(outside)))


def _check_range(start: int, end: int, length: int) -> None:
    allowed = f"0 <= start < end <= {length}"
    if not 0 <= start <= end <= length:
        raise InvalidArgument(
            Reason.OUT_OF_RANGE,
            f"characters {start}-{end} asked; the tokenised text has characters 0-{length}",
            field="span",
            allowed=allowed,
        )
    if start == end:
        raise InvalidArgument(
            Reason.EMPTY, f"characters {start}-{end} are an empty span; end is exclusive", field="span", allowed=allowed
        )
