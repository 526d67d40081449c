"""Repairs of the library's character offsets where a normaliser rewrites several characters into fewer.

It knows normalisers by their JSON. It must not know vocabularies, boundaries or spans.

Two cases hide a part of the text from the library's own offsets: composition ("e" + U+0301 becomes one character,
and its token is given the "e" alone) and replacement of several characters (the token is given the last one alone).
Unrepaired, a token could cross a boundary without showing it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dualtrace.arrays import IntArray

Form = Literal["NFC", "NFD", "NFKC", "NFKD"]

_FORMS: dict[str, Form] = {
    "NFC": "NFC",
    "NFD": "NFD",
    "NFKC": "NFKC",
    "NFKD": "NFKD",
    "Precompiled": "NFKC",  # SentencePiece's own table, NFKC with small changes
}
_FIRST_THAT_JOINS = "\u0300"  # no character below it ever joins the one before it


@dataclass(frozen=True)
class Rewriting:
    """Which rewrites a tokenizer's normaliser may do."""

    forms: tuple[Form, ...]
    replaces_many: bool  # a Replace whose pattern may match several characters and leaves something in their place


def parts(node: Any) -> Iterator[dict[str, Any]]:
    """Every part of a (nested) normaliser, pre-tokenizer, post-processor or decoder of a tokenizer.json."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from parts(value)
    elif isinstance(node, list):
        for value in node:
            yield from parts(value)


def read_rewriting(normalizer: Any) -> Rewriting:
    found = list(parts(normalizer))
    forms = tuple(_FORMS[kind] for kind in dict.fromkeys(part.get("type") for part in found) if kind in _FORMS)
    return Rewriting(forms, any(map(_replaces_many, found)))


def _replaces_many(part: dict[str, Any]) -> bool:
    if part.get("type") != "Replace" or not part.get("content"):
        return False
    pattern = part.get("pattern")
    return not (isinstance(pattern, dict) and len(str(pattern.get("String", "ab"))) == 1)


def repair(text: str, starts: IntArray, ends: IntArray, rewriting: Rewriting) -> tuple[IntArray, IntArray]:
    """Widen offsets [T], [T] so that each token covers every character that it was made from."""
    for form in rewriting.forms:
        if not (text.isascii() or unicodedata.is_normalized(form, text)):
            starts, ends = _widen_to_clusters(text, starts, ends, form)
    if rewriting.replaces_many:
        starts = _cover_gaps_in_front(len(text), starts, ends)
    return starts, ends


def _widen_to_clusters(text: str, starts: IntArray, ends: IntArray, form: Form) -> tuple[IntArray, IntArray]:
    floor = np.arange(len(text) + 1, dtype=np.int32)
    ceiling = floor.copy()
    for first, stop in _clusters(text, form):
        cluster = text[first:stop]
        if stop - first > 1 and unicodedata.normalize(form, cluster) != cluster:
            floor[first + 1 : stop] = first
            ceiling[first + 1 : stop] = stop
    return floor[starts], ceiling[ends]


def _clusters(text: str, form: Form) -> Iterator[tuple[int, int]]:
    """Ranges of the text that the Unicode form rewrites each on its own."""
    first = 0
    for index in range(1, len(text)):
        if _begins_cluster(text, index, form):
            yield first, index
            first = index
    yield first, len(text)


def _begins_cluster(text: str, index: int, form: Form) -> bool:
    character = text[index]
    if character < _FIRST_THAT_JOINS:
        return True
    if unicodedata.combining(character):
        return False
    # A starter joins only what stands right before it (Hangul L V T is the longest), so a short tail decides.
    tail = text[max(0, index - 3) : index]
    apart = unicodedata.normalize(form, tail) + unicodedata.normalize(form, character)
    return unicodedata.normalize(form, tail + character) == apart


def _cover_gaps_in_front(length: int, starts: IntArray, ends: IntArray) -> IntArray:
    before = np.concatenate([np.zeros(1, np.int32), np.maximum.accumulate(ends)[:-1]]) if len(ends) else ends
    gaps = starts > before
    floor = np.arange(length + 1, dtype=np.int32)
    floor[starts[gaps]] = before[gaps]  # by position, so that all tokens of one character move together
    return floor[starts]
