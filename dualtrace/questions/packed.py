"""Packed scoring: query and items in one row, by either known delimiter convention, as a mask and positions. Pure.

Ids score exactly as separately (hidden delimiter) or as query + delimiter + item (visible). In text mode the query is
encoded with the tokenizer's special tokens and each item alone without, so that promise is for ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dualtrace.arrays import IntArray
from dualtrace.engine import Read
from dualtrace.masks import packing
from dualtrace.masks.limits import MAX_LENGTH
from dualtrace.masks.packing import Convention
from dualtrace.problems import InvalidArgument, Reason, Unsupported
from dualtrace.questions import sight as sights
from dualtrace.questions.asked import ScoreQuestion, Variant
from dualtrace.questions.compose import Context, check_tokens
from dualtrace.questions.score_plan import ScorePlace, ScorePlan
from dualtrace.rows import Row
from dualtrace.tokens import Tokens


def check_packing(question: ScoreQuestion, context: Context) -> None:
    """What excludes what, before any text is encoded."""
    delimiter = question.delimiter_token_id
    if question.packing is None:
        if delimiter is not None:
            message = "a delimiter belongs to packing; set packing or leave it out"
            raise InvalidArgument(Reason.CONFLICT, message, field="delimiter_token_id")
        return
    if not context.masks:
        message = "packed scoring needs a scorer that applies masks (see Describe); leave packing out"
        raise Unsupported(Reason.UNSUPPORTED_MASK, message, field="packing")
    if question.item_first:
        message = "packing puts the query first; it excludes item_first"
        raise InvalidArgument(Reason.CONFLICT, message, field="item_first")
    if any(variant.mask is not None for variant in question.variants):
        message = "a packed sequence has a mask of its own; ask for masks without packing"
        raise InvalidArgument(Reason.CONFLICT, message, field="variants")
    if question.packing is Convention.MIS_VISIBLE_DELIMITER and delimiter is None:
        message = "a visible delimiter is scored with the item; name it in delimiter_token_id"
        raise InvalidArgument(Reason.MISSING, message, field="delimiter_token_id")
    if delimiter is not None and not 0 <= delimiter < context.vocab_size:
        allowed = f"0-{context.vocab_size - 1}"
        message = f"delimiter {delimiter} asked; the model knows ids {allowed}"
        raise InvalidArgument(Reason.TOKEN_OUT_OF_RANGE, message, field="delimiter_token_id", allowed=allowed)


def plan_packed(question: ScoreQuestion, labels: Sequence[IntArray], context: Context) -> ScorePlan | None:
    """One row per variant. None when there is no query to share behind hidden delimiters: score separately."""
    assert question.packing is not None
    query = context.tokens(question.query, "query", special_tokens=question.query.text is not None)
    items = [context.tokens(item, f"items[{index}]") for index, item in enumerate(question.items)]
    hidden = question.packing is Convention.MIS_HIDDEN_DELIMITER
    if hidden and not query.ids.size:
        return None
    # A hidden delimiter is seen by nobody: any id does.
    sequence, delimiters = _pack(query, items, question.delimiter_token_id or 0)
    length = int(sequence.ids.size)
    context.check_ids(sequence.ids, "items")
    positions = packing.positions(delimiters, length, question.packing)
    _check_size(length, positions, context)
    check_tokens(length * len(question.variants), context.limits, len(question.variants))
    reads = packing.read_rows(delimiters, length, question.packing)
    spec = packing.mask(delimiters, length, question.packing)
    extra = np.unique(np.concatenate(labels)).astype(np.int32)
    read = Read(np.unique(np.asarray(reads, np.int32)).astype(np.int32), extra_ids=extra)
    rows: list[Row] = []
    seen: list[sights.Sight] = []
    places: list[ScorePlace] = []
    for number, variant in enumerate(question.variants):
        sight = sights.see(Variant(variant.view, spec), sequence, context, positions=positions)
        for index, item in enumerate(items):
            tokens = int(query.ids.size + item.ids.size) + (0 if hidden else 1)
            columns = np.searchsorted(extra, labels[index]).astype(np.int32)
            places.append(ScorePlace(index, number, tokens, len(rows), reads[index], columns))
        rows.append(Row(sequence.ids, sight.positions, read, sight.view, sight.plan))
        seen.append(sight)
    return ScorePlan(tuple(rows), tuple(seen), tuple(places), None, length * len(question.variants))


def _pack(query: Tokens, items: Sequence[Tokens], delimiter: int) -> tuple[sights.Sequence, tuple[int, ...]]:
    """`query D i1 D ... in D` and where the delimiters stand."""
    mark = np.asarray([delimiter], np.int32)
    ids = np.concatenate([query.ids, mark, *(part for item in items for part in (item.ids, mark))])
    tokens = replace(query, ids=ids, pieces=(), starts=None, ends=None)
    delimiters = packing.delimiter_indices(int(query.ids.size), [int(item.ids.size) for item in items])
    return sights.Sequence(ids, tokens, 0), delimiters


def _check_size(length: int, positions: IntArray, context: Context) -> None:
    if length > MAX_LENGTH:
        message = f"the packed sequence has {length} tokens; at most {MAX_LENGTH}; send fewer items"
        raise InvalidArgument(Reason.TOO_MANY, message, field="items", allowed=f"1-{MAX_LENGTH}")
    context.check_fits(int(positions.max()) + 1, "items")
