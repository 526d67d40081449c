"""A comparison as CSV: a line a token, or a candidate, or a label. Pieces are written as tables show them.

Pure: reports and pairs in, text out.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from dualtrace.cli.pair_book import PairBook
from dualtrace.cli.visible import show_piece
from dualtrace.compare.report import CompareReport

Cell = str | int | float | None

TOKENS = ("item", "index", "token_id", "piece", "left_logprob", "right_logprob", "right_minus_left", "left_rank",
          "right_rank", "status")  # fmt: skip
CANDIDATES = ("item", "token_id", "piece", "left_logprob", "right_logprob", "right_minus_left", "status")
LABELS = ("item", "label_token_id", "left_score", "right_score", "left_logprob", "right_logprob", "status")
FORMULAS = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes a text that begins so for a formula."""


def comparison_to_csv(report: CompareReport, book: PairBook) -> str:
    names: tuple[str, ...] = TOKENS
    lines = _tokens(book)
    if report.distributions:
        names, lines = CANDIDATES, _candidates(report)
    elif report.labels:
        names, lines = LABELS, _labels(report)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for line in lines:
        writer.writerow(["" if cell is None else repr(cell) if isinstance(cell, float) else cell for cell in line])
    return out.getvalue()


def _tokens(book: PairBook) -> Iterator[tuple[Cell, ...]]:
    for item, pairs in sorted(book.items.items()):
        for place, index in enumerate(pairs.indices):
            token_id = pairs.token_ids[place]
            yield (
                item, index, token_id if token_id >= 0 else None, _text(pairs.pieces[place]),
                pairs.left_logprobs[place], pairs.right_logprobs[place], pairs.delta(place), pairs.left_ranks[place],
                pairs.right_ranks[place], pairs.statuses[place].value,
            )  # fmt: skip


def _candidates(report: CompareReport) -> Iterator[tuple[Cell, ...]]:
    for line in report.distributions:
        for place, token_id in enumerate(line.token_ids):
            left, right = line.left_logprobs[place], line.right_logprobs[place]
            own = None if line.tokens is None else line.tokens[place]
            yield line.item, token_id, _text(own), left, right, right - left, line.status.value


def _labels(report: CompareReport) -> Iterator[tuple[Cell, ...]]:
    for line in report.labels:
        columns = (line.left_scores, line.right_scores, line.left_label_logprobs, line.right_label_logprobs)
        for label, *cells in zip(line.label_token_ids, *columns, strict=False):
            yield line.item, label, *cells, line.status.value


def _text(own: bytes | None) -> str | None:
    """A piece that no spreadsheet obeys; the quote mark in front is one that spreadsheets do not show."""
    if own is None:
        return None
    shown = show_piece(own)
    return f"'{shown}" if shown.startswith(FORMULAS) else shown
