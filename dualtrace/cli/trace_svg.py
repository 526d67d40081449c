"""Both traces of one item as a small picture: surprise of each token on either side, and how far they part below.

Pure: pairs in, SVG out; numbers alone go into it, so there is nothing to escape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dualtrace.cli.pair_book import ItemPairs
from dualtrace.cli.trace_plot import FEWEST, mark_bad, shrink

WIDTH, UPPER, LOWER, GAP, LEFT = 1000, 160, 70, 26, 50
MOST_POINTS = 900
DECADES = (-12, 2)  # of the difference, in powers of ten


def trace_svg(pairs: ItemPairs) -> str:
    """ "" where there is too little to see."""
    deltas = [None if (value := pairs.delta(place)) is None else abs(value) for place in range(len(pairs))]
    if sum(delta is not None for delta in deltas) < FEWEST:
        return ""
    left, right, apart = (
        shrink(values, MOST_POINTS) for values in (_surprises(pairs, True), _surprises(pairs, False), deltas)
    )
    bad = mark_bad(pairs, len(apart))
    top = max((value for value in (*left, *right) if value is not None), default=0.0) or 1.0
    parts = [
        _axis(0, UPPER, f"{top:.1f}", "0", "surprise, nats"),
        _trace([_at(value, top) for value in left], 'stroke="var(--l)" stroke-width="3" stroke-opacity=".55"'),
        _trace([_at(value, top) for value in right], 'stroke="var(--r)" stroke-width="1.2"'),
        _axis(UPPER + GAP, LOWER, "1e2", "1e-12", "|left - right|, nats"),
        _bars([_share(value) for value in apart], bad),
        _divergence(pairs),
        f'<text x="{WIDTH - 150}" y="12" fill="var(--l)">— left</text>'
        f'<text x="{WIDTH - 80}" y="12" fill="var(--r)">— right</text>',
    ]
    return (
        f'<svg viewBox="0 0 {WIDTH} {UPPER + GAP + LOWER + 20}" role="img" aria-label="both traces" font-size="12" '
        f'font-family="system-ui,sans-serif">{"".join(parts)}</svg>'
    )


def _surprises(pairs: ItemPairs, is_left: bool) -> list[float | None]:
    values = pairs.left_logprobs if is_left else pairs.right_logprobs
    return [None if value is None or math.isnan(value) else min(100.0, max(0.0, -value)) for value in values]


def _at(value: float | None, top: float) -> float | None:
    return None if value is None else UPPER - value / top * (UPPER - 16)


def _share(value: float | None) -> float | None:
    """Of the lower picture's height; 0 is no difference at all."""
    if value is None or value == 0 or math.isnan(value):
        return None if value is None else 0.0
    low, high = DECADES
    return min(1.0, max(0.04, (math.log10(min(value, 10.0**high)) - low) / (high - low)))


def _x(place: int, count: int) -> float:
    return LEFT + (WIDTH - LEFT) * (place + 0.5) / max(1, count)


def _trace(heights: Sequence[float | None], pen_style: str) -> str:
    """A line, broken where a token is unscored. A broad one below a fine one: where they agree both are seen."""
    steps, pen = [], "M"
    for place, height in enumerate(heights):
        if height is None:
            pen = "M"
            continue
        steps.append(f"{pen}{_x(place, len(heights)):.1f} {height:.1f}")
        pen = "L"
    return f'<path d="{"".join(steps)}" fill="none" {pen_style}/>'


def _bars(shares: Sequence[float | None], bad: Sequence[bool]) -> str:
    """One a token; red where a token is out of tolerance."""
    base = UPPER + GAP + LOWER
    width = max(0.8, (WIDTH - LEFT) / max(1, len(shares)) * 0.8)
    paths = []
    for is_bad, colour in ((False, "var(--dim)"), (True, "var(--bad)")):
        drawn = [
            f"M{_x(place, len(shares)):.1f} {base}V{base - share * LOWER:.1f}"
            for place, share in enumerate(shares)
            if share and bad[place] is is_bad
        ]
        if drawn:
            paths.append(f'<path d="{"".join(drawn)}" stroke="{colour}" stroke-width="{width:.1f}"/>')
    return "".join(paths)


def _axis(top: int, height: int, high: str, low: str, name: str) -> str:
    return (
        f'<path d="M{LEFT} {top}V{top + height}H{WIDTH}" fill="none" stroke="var(--line)"/>'
        f'<text x="{LEFT - 4}" y="{top + 12}" text-anchor="end" fill="var(--dim)">{high}</text>'
        f'<text x="{LEFT - 4}" y="{top + height}" text-anchor="end" fill="var(--dim)">{low}</text>'
        f'<text x="{LEFT + 6}" y="{top + 12}" fill="var(--dim)">{name}</text>'
    )


def _divergence(pairs: ItemPairs) -> str:
    if pairs.divergence is None or pairs.divergence.index not in pairs.indices:
        return ""
    count = len(pairs)
    x = _x(pairs.indices.index(pairs.divergence.index), count)
    bottom = UPPER + GAP + LOWER
    return (
        f'<path d="M{x:.1f} 0V{bottom}" stroke="var(--bad)" stroke-dasharray="4 3"/>'
        f'<text x="{min(x, WIDTH - 160):.1f}" y="{bottom + 14}" fill="var(--bad)">first divergence: token '
        f"{pairs.divergence.index}</text>"
    )
