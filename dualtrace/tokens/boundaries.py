"""Where a prompt ends and its completion begins, in tokens.

It knows offsets. It must not know vocabularies or tokenizer files: encoding is a function that it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from dualtrace.arrays import IntArray
from dualtrace.problems import InvalidArgument, Reason
from dualtrace.tokens.sequence import Tokens, check_text

Encode = Callable[[str], Tokens]


class Boundary(Enum):
    """How a prompt and its completion become tokens.

    JOINT     as one text, cut by character offsets; a token that straddles belongs to the completion.
    SEPARATE  each alone, ids concatenated. A tokenizer that puts a space mark in front of each text (SentencePiece's
              "▁", `add_prefix_space`) does so for the completion too, so "ab" + "cd" is then scored as "ab cd".
    STRICT    as JOINT, but a token that straddles is an error.
    """

    JOINT = "JOINT"
    SEPARATE = "SEPARATE"
    STRICT = "STRICT"


@dataclass(frozen=True)
class Cut:
    """Prompt and completion, tokenised together."""

    tokens: Tokens  # prompt then completion, without a prefix token; offsets count in the text prompt + completion
    prompt_count: int  # tokens[:prompt_count] are the prompt
    boundary_token_merged: bool  # the completion's first token also holds the prompt's last characters


def cut(encode: Encode, prompt: str, completion: str, boundary: Boundary) -> Cut:
    check_text(prompt, "prompt")
    check_text(completion, "completion")
    if not completion:
        raise InvalidArgument(
            Reason.EMPTY_COMPLETION, "the completion is empty text; there is nothing to score", field="completion"
        )
    if boundary is Boundary.SEPARATE:
        return _cut_separate(encode, prompt, completion)
    return _cut_joint(encode, prompt, completion, strict=boundary is Boundary.STRICT)


def _cut_joint(encode: Encode, prompt: str, completion: str, *, strict: bool) -> Cut:
    text = prompt + completion
    tokens = encode(text)
    starts, ends = _offsets(tokens)
    beyond = np.flatnonzero(ends > len(prompt))
    if not len(beyond):
        raise _no_completion_token(completion)
    count = int(beyond[0])
    straddling = count + np.flatnonzero((starts[count:] < len(prompt)) & (ends[count:] > len(prompt)))
    if strict and len(straddling):
        index = int(straddling[0])
        start, end = int(starts[index]), int(ends[index])
        raise InvalidArgument(
            Reason.BOUNDARY_STRADDLED,
            f"token {index} (id {tokens.ids[index]}, characters {start}-{end}, text {text[start:end]!r}) crosses the "
            f"end of the prompt at character {len(prompt)}; move the boundary, or ask for JOINT or SEPARATE",
            field="boundary",
        )
    return Cut(tokens, count, bool(len(straddling)))


def _cut_separate(encode: Encode, prompt: str, completion: str) -> Cut:
    left, right = encode(prompt), encode(completion)
    if not len(right):
        raise _no_completion_token(completion)
    left_starts, left_ends = _offsets(left)
    right_starts, right_ends = _offsets(right)
    shift = np.int32(len(prompt))
    tokens = Tokens(
        ids=np.concatenate([left.ids, right.ids]),
        pieces=left.pieces + right.pieces,
        starts=np.concatenate([left_starts, right_starts + shift]),
        ends=np.concatenate([left_ends, right_ends + shift]),
    )
    return Cut(tokens, len(left), False)


def _offsets(tokens: Tokens) -> tuple[IntArray, IntArray]:
    assert tokens.starts is not None and tokens.ends is not None, "encoded text has offsets"  # noqa: PT018
    return tokens.starts, tokens.ends


def _no_completion_token(completion: str) -> InvalidArgument:
    return InvalidArgument(
        Reason.EMPTY_COMPLETION,
        f"the completion's {len(completion)} characters become no token: this tokenizer drops them; "
        "there is nothing to score",
        field="completion",
    )
