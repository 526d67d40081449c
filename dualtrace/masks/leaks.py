"""Which rows see the token they predict, through any number of layers.

Row q predicts token q+1. m_0[q] = q, and m_l[q] is the largest of m_(l-1)[q] and of m_(l-1)[k] over every k that q
sees in any head of layer l; q leaks when m_L[q] > q. The last row predicts nothing and cannot leak: no m exceeds it.
It knows run-lengths. It must not know the mask language.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dualtrace.masks.limits import MAX_LEAK_WORK
from dualtrace.masks.runs import Runs
from dualtrace.problems import InvalidArgument, Reason

Longs = npt.NDArray[np.int64]


def leaking_rows(layers: Sequence[Sequence[Runs]], *, max_work: int = MAX_LEAK_WORK) -> tuple[int, ...]:
    """`layers[l]` holds the distinct rules of layer l's heads, each [T,T]."""
    length = layers[0][0].length
    rows = np.arange(length)
    different = {id(runs): runs for layer in layers for runs in layer}
    if all(bool((runs.reach() <= rows + 1).all()) for runs in different.values()):
        return ()
    levels = length.bit_length()
    work = sum(length * levels + sum(runs.toggles.size for runs in layer) for layer in layers)
    if work > max_work:
        raise InvalidArgument(
            Reason.LEAK_UNKNOWN,
            f"whether this mask leaks would take {work} steps to find out; say allow_leak, or send fewer tokens",
            allowed=f"{max_work} steps",
        )
    highest = rows.astype(np.int64)
    for layer in layers:
        highest = _advance(highest, layer)
        if highest.min() == length - 1:
            break  # nothing can rise further
    return tuple(np.flatnonzero(highest > rows).tolist())


def _advance(highest: Longs, layer: Sequence[Runs]) -> Longs:
    """m_l from m_(l-1)."""
    tables = _range_maxima(highest)
    result = highest.copy()
    for runs in layer:
        if not runs.toggles.size:
            continue
        base = runs.rows * (runs.length + 1)
        starts, ends = runs.starts - base, runs.ends - base
        level = np.frexp((ends - starts).astype(np.float64))[1] - 1  # floor(log2(width))
        best = np.maximum(tables[level, starts], tables[level, ends - (1 << level.astype(np.int64))])
        some = np.flatnonzero(np.diff(runs.offsets))
        per_row = np.maximum.reduceat(best, runs.offsets[some] // 2)
        result[some] = np.maximum(result[some], per_row)
    return result


def _range_maxima(values: Longs) -> Longs:
    """[levels, T] the largest of the 2**level values from each place on (as far as they exist)."""
    tables = [values]
    width = 1
    while 2 * width <= values.size:
        last = tables[-1].copy()
        last[: values.size - width] = np.maximum(last[: values.size - width], last[width:])
        tables.append(last)
        width *= 2
    return np.stack(tables)
