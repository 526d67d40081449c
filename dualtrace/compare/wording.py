"""What was found, in plain words with numbers. It knows findings; it decides nothing."""

from __future__ import annotations

from collections.abc import Sequence

from dualtrace.compare.events import IdMismatch
from dualtrace.compare.figures import TokenSummary
from dualtrace.compare.tokens import ItemPairs
from dualtrace.compare.tolerance import Tolerance
from dualtrace.model_card import ModelProvenance


def describe_divergence(
    items: Sequence[ItemPairs], tolerance: Tolerance | None, summary: TokenSummary | None
) -> str | None:
    """Where the sides part first, and the tolerance with which they would not."""
    first = next((item.first_divergence for item in items if item.first_divergence is not None), None)
    if first is None or tolerance is None or summary is None:
        return None
    said = (
        f"first divergence: item {first.item}, token {first.index}: left {_number(first.left_logprob)}, "
        f"right {_number(first.right_logprob)}; {tolerance.name} allows {tolerance.abs_epsilon:g} absolute and "
        f"{tolerance.rel_epsilon:g} relative"
    )
    if summary.min_abs_epsilon is None:
        return f"{said}; no abs_epsilon would have passed: a side has no finite number where the other has one"
    return f"{said}; abs_epsilon {summary.min_abs_epsilon!r} would have passed"


def _number(value: float | None) -> str:
    return "has no logprob" if value is None else f"{value:.9g}"


def describe_id_mismatch(found: IdMismatch) -> str:
    left = _token(found.left_id, found.left_piece)
    right = _token(found.right_id, found.right_piece)
    return (
        f"item {found.item}: the sides read different tokens from token {found.index} on: left {left}, right {right}; "
        "nothing behind it is compared: ask both with the same token ids"
    )


def _token(token: int | None, piece: bytes | None) -> str:
    if token is None:
        return "has no token there"
    return f"id {token}" if piece is None else f"id {token} {piece!r}"


def write_notes(
    items: Sequence[ItemPairs],
    summary: TokenSummary | None,
    left: ModelProvenance | None,
    right: ModelProvenance | None,
) -> tuple[str, ...]:
    """What to know whatever the verdict is."""
    notes = []
    for item in items:
        prefixes = [side.header.prefix_token_id for side in (item.aligner.left, item.aligner.right)]
        if prefixes[0] != prefixes[1] and len(item.codes):
            notes.append(
                f"note: item {item.item} has prefix token {prefixes[0]} on the left and {prefixes[1]} on the right"
            )
            break
    if summary is not None and summary.not_kept_count:
        notes.append(
            f"note: {summary.not_kept_count} compared tokens are not kept in this report; raise debug_token_limit"
        )
    if left is not None and right is not None:
        digests = left.tokenizer_digest, right.tokenizer_digest
        if all(digests) and digests[0] != digests[1]:
            notes.append("note: the sides have different tokenizers (tokenizer_digest)")
    for name, side in (("left", left), ("right", right)):
        if side is not None and side.synthetic:
            notes.append(f"note: no model stands behind the {name} side's numbers (synthetic)")
    return tuple(notes)
