"""From text or ids to checked token sequences, and the checks that all questions share.

It knows the tokenizer and the limits. It must not know engines, queues or the wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dualtrace.arrays import IntArray
from dualtrace.card import Limits
from dualtrace.masks.resolve import FetchArray, Geometry
from dualtrace.problems import InvalidArgument, Problem, Reason, Unsupported
from dualtrace.questions.asked import Input, Variant
from dualtrace.tokens import Prefix, Tokenizer, Tokens, check_text, prefix_for_ids

ONE_HEAD = Geometry(1, 1)


@dataclass(frozen=True)
class Context:
    """What a question is planned against."""

    vocab_size: int  # the logit width
    limits: Limits
    tokenizer: Tokenizer | None
    geometry: Geometry = ONE_HEAD  # layers, heads and windows that masks speak of
    masks: bool = False
    views: bool = False
    contrasts: bool = False
    adapters: tuple[str, ...] = ()
    fetch_array: FetchArray | None = None  # artifact digest to array

    def tokens(self, given: Input, field: str, *, special_tokens: bool = False) -> Tokens:
        """The tokens of one input, checked: valid text, ids in range."""
        if given.ids is not None:
            self.check_ids(given.ids, f"{field}.ids")
            return self.describe(given.ids)
        assert given.text is not None
        check_text(given.text, f"{field}.text")
        return self.need_tokenizer(f"{field}.text").encode(given.text, special_tokens=special_tokens)

    def describe(self, ids: IntArray) -> Tokens:
        if self.tokenizer is None:
            return Tokens(ids, (), None, None)
        return self.tokenizer.describe_ids(ids)

    def need_tokenizer(self, field: str) -> Tokenizer:
        if self.tokenizer is None:
            message = "this scorer knows no tokenizer; send token ids, or give it one with --tokenizer"
            raise Unsupported(Reason.NO_TOKENIZER, message, field=field)
        return self.tokenizer

    def check_ids(self, ids: IntArray, field: str) -> None:
        wrong = np.flatnonzero((ids < 0) | (ids >= self.vocab_size))
        if wrong.size:
            first = int(wrong[0])
            raise InvalidArgument(
                Reason.TOKEN_OUT_OF_RANGE,
                f"token id {int(ids[first])} asked; the model scores ids 0-{self.vocab_size - 1}",
                field=f"{field}[{first}]",
                allowed=f"0-{self.vocab_size - 1}",
            )

    def prefix_id(self, prefix: Prefix, given: Input, field: str) -> int | None:
        """The id put in front, by the policy for this kind of input."""
        if given.text is not None:
            chosen = self.need_tokenizer(f"{field}.text").prefix_for_text(prefix)
        else:
            chosen = prefix_for_ids(prefix, self.tokenizer)
        if chosen is not None:
            self.check_prefix(chosen)
        return chosen

    def check_prefix(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            allowed = f"0-{self.vocab_size - 1}"
            message = f"prefix token id {token_id} asked; the model knows ids {allowed}"
            raise InvalidArgument(Reason.TOKEN_OUT_OF_RANGE, message, field="prefix.token_id", allowed=allowed)

    def check_fits(self, inputs: int, field: str) -> None:
        """`inputs` tokens must fit the model's positions."""
        most = self.limits.max_positions
        if inputs > most:
            message = f"{inputs} input tokens asked; the model has {most} positions; shorten it"
            raise InvalidArgument(Reason.INPUT_TOO_LONG, message, field=field, allowed=f"1-{most}")


def check_one_window(length: int, limits: Limits, field: str) -> None:
    """A mask speaks of the whole text, `length` tokens with its prefix, so all of it must fit one window."""
    most = limits.max_positions
    if length > most:
        message = f"a masked text must fit one window: {length} tokens with its prefix, {most} positions; shorten it"
        raise InvalidArgument(Reason.MASK_NEEDS_ONE_WINDOW, message, field=field, allowed=f"1-{most}")


def check_count(count: int, limits: Limits, field: str, *, least: int) -> None:
    if count < least:
        raise InvalidArgument(Reason.EMPTY, f"{field} is empty; at least one is needed", field=field)
    if count > limits.max_items:
        message = f"{count} {field} asked; at most {limits.max_items} in one request; split it"
        raise InvalidArgument(Reason.TOO_MANY, message, field=field, allowed=f"{least}-{limits.max_items}")


RESULT_ENTRIES = 16
"What one result costs beside its tokens, in entries: items that are refused have no tokens, but each has a message."


def check_variants(variants: Sequence[Variant], limits: Limits, items: int) -> None:
    check_count(len(variants), limits, "variants", least=1)
    most = max(limits.max_items, limits.max_request_tokens // RESULT_ENTRIES)
    if items * len(variants) > most:
        message = f"{items} items under {len(variants)} variants asked; at most {most} answers in one request; split it"
        raise InvalidArgument(Reason.TOO_MANY, message, field="variants", allowed=f"1-{most // items}")


def check_top_k(top_k: int, limits: Limits) -> None:
    if not 0 <= top_k <= limits.max_top_k:
        allowed = f"0-{limits.max_top_k}"
        message = f"top_k {top_k} asked; allowed is {allowed}"
        raise InvalidArgument(Reason.OUT_OF_RANGE, message, field="top_k", allowed=allowed)


def check_chars(inputs: Sequence[Input], limits: Limits) -> None:
    """Before any text is encoded: tokenizing is the first thing that costs."""
    chars = sum(len(given.text) for given in inputs if given.text is not None)
    if chars > limits.max_request_chars:
        most = limits.max_request_chars
        message = f"{chars} characters in one request; at most {most}; split it"
        raise InvalidArgument(Reason.TOO_MANY, message, allowed=f"0-{most}")


def check_tokens(count: int, limits: Limits, variants: int = 1) -> None:
    """`count`: of all items under all variants, or of those planned so far."""
    if count > limits.max_request_tokens:
        most = limits.max_request_tokens
        told, way = f"{count} tokens", "split it"
        if variants > 1:
            told += f" ({count // variants} under each of {variants} variants: a text counts once for each)"
            way += ", or ask its variants apart"
        message = f"{told} in one request; at most {most}; {way}"
        raise InvalidArgument(Reason.TOO_MANY, message, allowed=f"0-{most}")


def check_answer(entries: int, limits: Limits, field: str) -> None:
    """A unary answer must fit one message: entries are ids with their numbers."""
    most = limits.max_request_tokens
    if entries > most:
        message = f"the answer would hold {entries} entries; at most {most} in one answer; ask for fewer"
        raise InvalidArgument(Reason.TOO_MANY, message, field=field, allowed=f"0-{most}")


MAX_RECEIPT_HEADS = 1_048_576


def check_receipts(variants: Sequence[Variant], items: int, context: Context) -> None:
    """Receipts name layers and heads; those of a unary answer must fit one message together."""
    masked = sum(1 for variant in variants if variant.mask is not None) * items
    heads = masked * context.geometry.layers * context.geometry.heads
    if heads > MAX_RECEIPT_HEADS:
        most = MAX_RECEIPT_HEADS // (context.geometry.layers * context.geometry.heads)
        message = f"{masked} masked answers asked; their receipts fit one answer up to {most}; split the request"
        raise InvalidArgument(Reason.TOO_MANY, message, field="variants", allowed=f"0-{most}")


def check_work(count: int, limits: Limits) -> None:
    if count > limits.max_work_tokens:
        most = limits.max_work_tokens
        message = f"{count} forward tokens would be needed; at most {most} in one request; split it or raise stride"
        raise InvalidArgument(Reason.TOO_MANY, message, allowed=f"0-{most}")


def check_distinct_ids(ids: Sequence[int], context: Context, field: str) -> IntArray:
    """Ids that may stand once each, all inside the logit width; as an array."""
    for place, token_id in enumerate(ids):
        if not 0 <= token_id < context.vocab_size:
            allowed = f"0-{context.vocab_size - 1}"
            message = f"token id {token_id} asked; the model scores ids {allowed}"
            raise InvalidArgument(Reason.TOKEN_OUT_OF_RANGE, message, field=f"{field}[{place}]", allowed=allowed)
    array = np.asarray(ids, dtype=np.int32)
    if np.unique(array).size != array.size:
        values, counts = np.unique(array, return_counts=True)
        twice = int(values[counts > 1][0])
        raise InvalidArgument(Reason.DUPLICATE, f"token id {twice} stands twice; each may stand once", field=field)
    return array


def with_prefix(prefix_id: int | None, ids: IntArray) -> IntArray:
    if prefix_id is None:
        return ids
    return np.concatenate([np.asarray([prefix_id], np.int32), ids])


def placed(problem: Problem, item: int) -> Problem:
    return problem.at(item=item)
