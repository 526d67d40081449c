"""Answers of two made-up sides, event by event, from plain JSON or arrays: what the comparator is tested with.

It knows the events. It must not know any engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from dualtrace.compare.comparator import Comparator
from dualtrace.compare.events import CompareEvent
from dualtrace.compare.gates import DEFAULT_GATES, GatePolicy
from dualtrace.compare.report import CompareReport
from dualtrace.compare.sides import SIDES, SideFacts, SideName
from dualtrace.compare.tolerance import Tolerance, request_tolerance
from dualtrace.engine import int_array
from dualtrace.model_card import ModelProvenance
from dualtrace.problems import BY_CODE, Problem, Reason
from dualtrace.questions.answers import (
    AnswerEvent,
    AnswerHeader,
    AnswerSummary,
    Execution,
    ItemDone,
    ItemHeader,
    ItemProblem,
    TokenChunk,
    Usage,
)
from dualtrace.questions.asked import Input, RollingQuestion
from dualtrace.tokens import Tokens

CREATED = datetime(2025, 3, 1, 12, 30, tzinfo=UTC)
PROVENANCE = ModelProvenance(
    model_id="m", revision="", family="llama", weights_digest="sha256:1", tokenizer_digest="sha256:2",
    framework="reference", framework_version="1", dtype="float32", matmul_precision="highest", device="cpu",
    attention_implementation="dense",
)  # fmt: skip
STRICT = request_tolerance(0.0, 0.0)

Event = AnswerEvent | Problem  # a Problem: the side gives up


def tokens_of(ids: Sequence[int], pieces: Sequence[str] | None = None) -> Tokens:
    made = tuple(piece.encode() for piece in pieces) if pieces is not None else tuple(b"<%d>" % one for one in ids)
    return Tokens(int_array(ids), made, None, None)


def header_of(*items: ItemHeader, provenance: ModelProvenance = PROVENANCE, top_k: int = 0) -> AnswerHeader:
    return AnswerHeader(provenance, items, 1, top_k, streams=True, has_pieces=True, has_offsets=False)


def chunk_of(
    first: int, ids: Sequence[int], logprobs: Sequence[float], ranks: Sequence[int] | None = None, **more: Any
) -> TokenChunk:
    """`more`: item, pieces, top_ids, top_logprobs, kl_base_masked, kl_masked_base."""
    item, pieces = more.pop("item", 0), more.pop("pieces", None)
    given = int_array(ranks if ranks is not None else [1] * len(ids))
    columns = {name: None if value is None else np.array(value) for name, value in more.items()}
    if columns.get("top_ids") is not None:
        columns["top_ids"] = np.asarray(columns["top_ids"], np.int32)
    return TokenChunk(
        item, 0, first, tokens_of(ids, pieces), np.array(logprobs, np.float64), given, int_array([0] * len(ids)),
        **columns,
    )  # fmt: skip


def done_of(item: int = 0, scored: int = 0, **more: Any) -> ItemDone:
    return ItemDone(item, 0, scored, **more)


def summary_of(done: int = 1, failed: int = 0) -> AnswerSummary:
    return AnswerSummary(Usage(0, 0), Execution(), done, failed)


def problem_of(code: str = "UNAVAILABLE", reason: str = "UNREACHABLE", message: str = "it is gone") -> Problem:
    kind = next(kind for kind in BY_CODE.values() if kind.code_name == code)
    return kind(Reason(reason), message)


@dataclass
class SideText:
    """One item of one side: token 0 is unscored, the others have a logprob and a rank."""

    ids: list[int]
    logprobs: list[float]  # one less than ids
    ranks: list[int] = field(default_factory=list)  # of the same length; none: all 1
    top_ids: list[list[int]] | None = None
    top_logprobs: list[list[float]] | None = None

    def events(self, item: int = 0, chunk_tokens: int = 4) -> list[AnswerEvent]:
        ranks = self.ranks or [1] * len(self.logprobs)
        made: list[AnswerEvent] = []
        for start in range(0, len(self.logprobs), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            tops = (
                {}
                if self.top_ids is None or self.top_logprobs is None
                else {"top_ids": self.top_ids[part], "top_logprobs": self.top_logprobs[part]}
            )
            ids = self.ids[1:][part]
            made.append(chunk_of(start + 1, ids, self.logprobs[part], ranks[part], item=item, **tops))
        return [*made, done_of(item, len(self.logprobs))]

    @property
    def header(self) -> ItemHeader:
        scored = 1 if len(self.ids) > 1 else None
        return ItemHeader(len(self.ids), 0, scored, unscored=tokens_of(self.ids[:1]))


def answer_of(*items: SideText, chunk_tokens: int = 4, provenance: ModelProvenance = PROVENANCE) -> list[Event]:
    body = [event for item, text in enumerate(items) for event in text.events(item, chunk_tokens)]
    return [header_of(*[text.header for text in items], provenance=provenance), *body, summary_of(len(items))]


def rolling(items: int = 1, **more: Any) -> RollingQuestion:
    return RollingQuestion(tuple(Input(ids=int_array([item])) for item in range(items)), **more)


@dataclass
class Compared:
    """A comparison that was carried through."""

    comparator: Comparator
    events: list[CompareEvent]
    facts: tuple[SideFacts, SideFacts]

    @property
    def report(self) -> CompareReport:
        return self.comparator.report(*self.facts, created=CREATED)


def compare(
    left: Sequence[Event],
    right: Sequence[Event],
    question: Any = None,
    tolerance: Tolerance | None = STRICT,
    policy: GatePolicy = DEFAULT_GATES,
    *,
    order: Sequence[SideName] | None = None,
    limit: int = 4096,
    facts: tuple[SideFacts, SideFacts] = (SideFacts("left"), SideFacts("right")),
) -> Compared:
    """`order`: whose event comes next, as long as that side has any; left and right in turn where it says nothing."""
    comparator = Comparator(question or rolling(), tolerance, policy, debug_token_limit=limit)
    waiting = {SideName.LEFT: list(left), SideName.RIGHT: list(right)}
    told: list[CompareEvent] = []
    turns = [*(order or []), *(list(SIDES) * max(len(left), len(right)))]
    for side in turns:
        if waiting[side]:
            event = waiting[side].pop(0)
            told += comparator.fail(side, event) if isinstance(event, Problem) else comparator.push(side, event)
    return Compared(comparator, told, facts)


def read_events(raw: Sequence[dict[str, Any]], side: SideName) -> list[Event]:
    """The events of one side of a replay vector."""
    events = [event for one in raw for event in _read_event(one, side)]
    scored: Counter[int] = Counter()
    for place, event in enumerate(events):
        if isinstance(event, TokenChunk):
            scored[event.item] += len(event.tokens)
        elif isinstance(event, ItemDone):
            events[place] = replace(event, scored_tokens=scored[event.item])
    return events


def _read_event(raw: dict[str, Any], side: SideName) -> list[Event]:
    ((kind, body),) = raw.items()
    match kind:
        case "header":
            items = [
                ItemHeader(item["token_count"], unscored=tokens_of(item["unscored_ids"], item.get("unscored_pieces")))
                for item in body["items"]
            ]
            return [header_of(*items, provenance=replace(PROVENANCE, framework=side.lower()))]
        case "chunk":
            given = dict(body)
            numbers = [float(value) for value in given.pop("logprobs")]
            return [chunk_of(given.pop("first_index"), given.pop("ids"), numbers, given.pop("ranks", None), **given)]
        case "done":
            return [done_of(body["item"])]
        case "item_fails":
            return [ItemProblem(body["item"], 0, problem_of(body["code"], body["reason"]))]
        case "summary":
            return [summary_of()]
        case "side_fails":
            return [problem_of(body["code"], body["reason"])]
    raise ValueError(f"{kind} is no event of a vector")
