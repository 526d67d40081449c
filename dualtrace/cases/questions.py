"""The written form of a question: its kind, then its fields by their names; a text is text, a list of numbers is ids.

    question:
      logprob:
        items:
          - {prompt: "The capital of France is", completion: " Paris"}
        top_k: 5

Fields that hold their default are left out. It knows questions. It must not know cases, sides or files.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dualtrace.cases.documents import Marked, name_kind
from dualtrace.cases.values import (
    FLAG,
    IDS,
    NUMBER,
    WHOLE,
    Part,
    build,
    list_of,
    object_of,
    read_array,
    read_object,
    read_text,
    read_whole,
    word_of,
)
from dualtrace.masks.packing import Convention
from dualtrace.masks.spec import Alignment, CharRange, Named, SegmentName, Span, TokenRange
from dualtrace.problems import Reason
from dualtrace.questions.asked import (
    PLAIN,
    Input,
    LogprobItem,
    LogprobQuestion,
    MaskedForwardQuestion,
    NextTokenQuestion,
    RollingQuestion,
    ScoreQuestion,
)
from dualtrace.runs.run import AskedQuestion
from dualtrace.tokens import Boundary, Prefix, PrefixKind

Segments = tuple[tuple[SegmentName, tuple[int, int]], ...]


def _read_input(node: Marked, path: str) -> Input:
    if isinstance(node.value, list):
        return Input(ids=read_array(node, path))
    if not isinstance(node.value, str):
        kind = name_kind(node.value)
        node.refuse(Reason.MALFORMED, f"{path} is {kind}; text in quotes or a list of token ids is needed")
    return Input(text=read_text(node, path))


def _write_input(given: Input) -> Any:
    return given.text if given.ids is None else np.asarray(given.ids).tolist()


_PREFIX_WORDS = {kind.value.lower(): kind for kind in PrefixKind}


def _read_prefix(node: Marked, path: str) -> Prefix:
    if isinstance(node.value, str):
        if node.value not in _PREFIX_WORDS:
            allowed = f"{', '.join(_PREFIX_WORDS)}, a token id"
            node.refuse(Reason.UNKNOWN_ENUM_VALUE, f"{path} is {node.value!r:.60}", allowed)
        return Prefix(_PREFIX_WORDS[node.value])
    token_id = read_whole(node, path)
    return build(node, path, lambda: Prefix(token_id=token_id))


def _write_prefix(prefix: Prefix) -> str | int | None:
    return prefix.token_id if prefix.kind is None else prefix.kind.value.lower()


def _read_pair(node: Marked, path: str) -> tuple[int, int]:
    ends = IDS.read(node, path)
    if len(ends) != 2:
        node.refuse(Reason.MALFORMED, f"{path} has {len(ends)} numbers; [START, END] is needed")
    return ends[0], ends[1]


def _read_segments(node: Marked, path: str) -> Segments:
    found = read_object(node, path, [name.value for name in SegmentName])
    return tuple((SegmentName(name), _read_pair(entry, f"{path}.{name}")) for name, entry in found.items())


def _write_segments(segments: Segments) -> dict[str, list[int]]:
    return {name.value: list(span) for name, span in segments}


def _read_span(node: Marked, path: str) -> Span:
    """As in masks."""
    found = read_object(node, path, ("tokens", "chars", "segment", "alignment"))
    kinds = [name for name in found if name != "alignment"]
    if len(kinds) != 1 or ("alignment" in found) != (kinds == ["chars"]):
        message = f"{path} must hold tokens, segment, or chars with alignment"
        node.refuse(Reason.CONFLICT, message)
    below = found[kinds[0]]
    match kinds[0]:
        case "segment":
            return Named(_SEGMENT.read(below, f"{path}.segment"))
        case "tokens":
            start, end = _read_pair(below, f"{path}.tokens")
            return build(below, path, lambda: TokenRange(start, end))
    start, end = _read_pair(below, f"{path}.chars")
    alignment = _ALIGNMENT.read(found["alignment"], f"{path}.alignment")
    return build(below, path, lambda: CharRange(start, end, alignment))


def _write_span(span: Span) -> dict[str, Any]:
    match span:
        case TokenRange(start, end):
            return {"tokens": [start, end]}
        case CharRange(start, end, alignment):
            return {"chars": [start, end], "alignment": alignment.value}
        case Named(segment):
            return {"segment": _SEGMENT.write(segment)}


_SEGMENT = word_of(SegmentName)
_ALIGNMENT = word_of(Alignment)
_INPUT = Part(_read_input, _write_input)
_INPUTS = list_of(_INPUT)
_PREFIX = Part(_read_prefix, _write_prefix)
_ITEMS = list_of(object_of(LogprobItem, {"prompt": _INPUT, "completion": _INPUT}))
_COMMON = {"prefix": _PREFIX, "top_k": WHOLE, "deterministic": FLAG}

FORMS: dict[str, tuple[type[AskedQuestion], Part]] = {
    "logprob": (
        LogprobQuestion,
        object_of(LogprobQuestion, {"items": _ITEMS, "boundary": word_of(Boundary), **_COMMON}),
    ),
    "rolling": (
        RollingQuestion,
        object_of(RollingQuestion, {"inputs": _INPUTS, "max_tokens": WHOLE, "stride": WHOLE, **_COMMON}),
    ),
    "next_token": (
        NextTokenQuestion,
        object_of(NextTokenQuestion, {"prompts": _INPUTS, "extra_token_ids": IDS, **_COMMON}),
    ),
    "score": (
        ScoreQuestion,
        object_of(
            ScoreQuestion,
            {
                "query": _INPUT, "items": _INPUTS, "labels": IDS, "item_labels": list_of(IDS), "apply_softmax": FLAG,
                "temperature": NUMBER, "item_first": FLAG, "packing": word_of(Convention),
                "delimiter_token_id": WHOLE, "deterministic": FLAG,
            },
        ),
    ),
    "masked_forward": (
        MaskedForwardQuestion,
        object_of(
            MaskedForwardQuestion,
            {
                "input": _INPUT, "segments": Part(_read_segments, _write_segments),
                "reads": list_of(Part(_read_span, _write_span)), **_COMMON,
                "kl_base_masked": FLAG, "kl_masked_base": FLAG,
            },
            given={"variants": PLAIN},
        ),
    ),
}  # fmt: skip
"""The kinds by their words, which are those of `dualtrace.v1.Ask`. Tokenize is no question that can be compared."""


def read_question(node: Marked, path: str) -> AskedQuestion:
    found = read_object(node, path, FORMS)
    if len(found) != 1:
        node.refuse(
            Reason.CONFLICT, f"{path} holds {len(found)} kinds of question; exactly one is needed", ", ".join(FORMS)
        )
    kind, content = next(iter(found.items()))
    question: AskedQuestion = FORMS[kind][1].read(content, f"{path}.{kind}")
    return question


def write_question(question: AskedQuestion) -> dict[str, Any]:
    kind, form = next((name, form) for name, (of, form) in FORMS.items() if isinstance(question, of))
    return {kind: form.write(question)}
