"""Packed scoring: one query and many items in one row, as a mask and positions of the same machinery.

The sequence is `query D item_1 D item_2 ... D` with the delimiters at d0 = P = len(query), d_i = d_(i-1) + 1 +
len(item_i); the last item may be open (no delimiter after it). It knows indices. It must not know ids or scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from itertools import accumulate, pairwise

import numpy as np

from dualtrace.arrays import IntArray
from dualtrace.masks.limits import MAX_LENGTH
from dualtrace.masks.spec import Causal, Edge, MaskSpec, TokenRange, require_ascending, require_index
from dualtrace.problems import InvalidArgument, Reason


class Convention(StrEnum):
    MIS_HIDDEN_DELIMITER = "MIS_HIDDEN_DELIMITER"  # items do not see delimiters: as if each were scored after the query
    MIS_VISIBLE_DELIMITER = "MIS_VISIBLE_DELIMITER"  # each item sees its own: as if query + D + item were scored


def delimiter_indices(query_length: int, item_lengths: Sequence[int]) -> tuple[int, ...]:
    """Where the delimiters stand when the last item is closed; one more than there are items."""
    return tuple(accumulate(item_lengths, lambda index, length: index + 1 + length, initial=query_length))


def positions(delimiters: Sequence[int], length: int, convention: Convention) -> IntArray:
    """[length] int32. A suffix token at distance w from its delimiter has position P + w - 1 (hidden) or P + w."""
    bounds = _bounds(delimiters, length, convention)
    first = bounds[0] - 1 if convention is Convention.MIS_HIDDEN_DELIMITER else bounds[0]
    result = np.arange(length, dtype=np.int32)
    for start, end in pairwise(bounds):
        result[start:end] = first + np.arange(end - start)
    return result


def mask(delimiters: Sequence[int], length: int, convention: Convention) -> MaskSpec:
    """Causal, and each item cut off from what stands between the query and its own tokens."""
    bounds = _bounds(delimiters, length, convention)
    own_delimiter = 1 if convention is Convention.MIS_HIDDEN_DELIMITER else 0
    return MaskSpec(
        base=Causal(),
        edges=tuple(
            Edge(queries=TokenRange(start, end), keys=TokenRange(bounds[0], start + own_delimiter))
            for start, end in pairwise(bounds)
            if start + own_delimiter > bounds[0]
        ),
    )


def read_rows(delimiters: Sequence[int], length: int, convention: Convention) -> tuple[int, ...]:
    """The row whose next-token distribution is each item's; a closing delimiter at the very end opens no item.

    A packed sequence whose last item is open and empty looks the same as one that is closed: it counts as closed.
    """
    bounds = _bounds(delimiters, length, convention)
    items = [(start, end) for start, end in pairwise(bounds) if start < length - 1]
    empty = bounds[0] - 1
    hidden = convention is Convention.MIS_HIDDEN_DELIMITER
    return tuple(empty if hidden and end - start == 1 else end - 1 for start, end in items)


def _bounds(delimiters: Sequence[int], length: int, convention: Convention) -> list[int]:
    """The delimiters and the end of the sequence."""
    require_index(length, "length", 1, MAX_LENGTH)
    require_ascending(tuple(delimiters), "delimiters", 0, may_be_empty=False)
    if delimiters[0] == 0 and convention is Convention.MIS_HIDDEN_DELIMITER:
        raise InvalidArgument(
            Reason.EMPTY_PROMPT, "the query is empty: there is nothing to share, score the items separately",
            field="delimiters[0]", allowed="1 or more",
        )  # fmt: skip
    if delimiters[-1] >= length:
        raise InvalidArgument(
            Reason.OUT_OF_RANGE,
            f"the last delimiter stands at {delimiters[-1]} in a sequence of {length} tokens",
            field=f"delimiters[{len(delimiters) - 1}]",
            allowed=f"up to {length - 1}",
        )
    return [*delimiters, length]
