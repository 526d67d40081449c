"""The two sides of a comparison while they are asked: who they are, what each is asked, and what they say by turns.

It knows Scorers and what a question must become for a side. It must not know how answers are compared.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TypeVar

from dualtrace.card import Card
from dualtrace.compare.sides import SideName
from dualtrace.comparing.tokenized_question import inputs_of, needs_tokenizer, take_ids_of_run, tokenize_question
from dualtrace.fanout import GRACE_SECONDS, Asked, SideEnded, fan_out, is_cancelled, name_deadline, tell_bug
from dualtrace.model_card import ModelProvenance
from dualtrace.problems import Cancelled, DeadlineExceeded, FailedPrecondition, Problem, Reason
from dualtrace.questions.answers import (
    AnswerEvent,
    AnswerHeader,
    AnswerSummary,
    ItemDone,
    ItemProblem,
    NextTokenAnswer,
    ScoreAnswer,
    TokenChunk,
    Usage,
)
from dualtrace.questions.asked import ForwardQuestion, RollingQuestion, Variant
from dualtrace.records import to_json
from dualtrace.runs.collector import RunCollector
from dualtrace.runs.run import Run, ScoredItem
from dualtrace.runs.stored_scorer import StoredScorer
from dualtrace.scorer import Scorer

T = TypeVar("T")

PLAIN = Variant()
MOMENT_SECONDS = 0.05
"""Deadlines so near to each other are one: each side counts its seconds from when it was made."""

_VARIANT = re.compile(r"variants\[([0-9]+)\]")


@dataclass(frozen=True, eq=False)
class LiveSide:
    """Who answers a side, under which face and mask, how long it may take. A StoredScorer brings its own variant."""

    target: str  # as written by whoever asked
    scorer: Scorer
    variant: Variant = PLAIN
    timeout_seconds: float | None = None


class Lane:
    """One side, from the first word to the last."""

    def __init__(self, name: SideName, side: LiveSide, question: ForwardQuestion) -> None:
        self.name = name
        self.side = side
        self.stored = side.scorer if isinstance(side.scorer, StoredScorer) else None
        self.question = replace(question, variants=(side.variant,)) if self.stored is None else self.stored.question
        self.variant = self.question.variants[0]
        self.deadline = None if side.timeout_seconds is None else time.monotonic() + side.timeout_seconds
        self.card: Card | None = None
        self.problem: Problem | None = None
        self.seconds: float | None = None  # spent answering; None for a stored run
        self._collector: RunCollector | None = None

    @property
    def label(self) -> str:
        return f"{self.name.lower()} ({self.side.target})"

    @property
    def provenance(self) -> ModelProvenance | None:
        return None if self.card is None else self.card.provenance

    def keep(self, event: AnswerEvent) -> None:
        """Add an event to the side's run."""
        if self._collector is None:
            self._collector = RunCollector(self.side.target, self.question)
        self._collector.push(event)

    @property
    def run(self) -> Run | None:
        """The side's answer as far as it came; None while nothing has come."""
        if self.stored is not None:
            return self.stored.narrowed_run
        try:
            return None if self._collector is None else self._collector.run()
        except Problem:  # it broke off before it said who it is
            return None

    def add_seconds(self, seconds: float) -> None:
        if self.stored is None:
            self.seconds = (self.seconds or 0.0) + seconds


Said = AnswerEvent | Problem | None
"""What a lane says: an event, the problem with which it ended, or None when it ended well."""

Asking = Sequence[tuple[Lane, ForwardQuestion]]


async def prepare(lanes: Sequence[Lane], question: ForwardQuestion) -> None:
    """Meet both sides and settle what each is asked. What cannot be settled becomes that lane's problem."""
    await asyncio.gather(*(_meet(lane) for lane in lanes))
    for lane in lanes:
        if lane.stored is not None and lane.problem is None:
            lane.problem = _refuse_another(question, lane)
    _settle_windows([lane for lane in lanes if lane.problem is None])
    for lane, other in (tuple(lanes), tuple(reversed(lanes))):
        knows_ids_only = lane.card is not None and not lane.card.capabilities.text
        if lane.problem is None and knows_ids_only and needs_tokenizer(lane.question):
            await _give_ids(lane, other)


async def _meet(lane: Lane) -> None:
    try:
        lane.card = await within(lane, lane.side.scorer.describe())
    except Problem as problem:
        lane.problem = problem


async def within(lane: Lane, work: Awaitable[T]) -> T:
    """The work, before the lane's deadline; every failure is a Problem."""
    try:
        async with asyncio.timeout(None if lane.deadline is None else lane.deadline - time.monotonic() + GRACE_SECONDS):
            return await work
    except Problem as problem:
        raise name_deadline(problem, lane.label) from None
    except asyncio.CancelledError:
        if is_cancelled():
            raise
        raise Cancelled(Reason.CANCELLED, f"{lane.label} ended the call of its own accord") from None
    except Exception as error:
        is_late = lane.deadline is not None and time.monotonic() >= lane.deadline
        if not isinstance(error, TimeoutError) or not is_late:
            raise tell_bug(error, lane.label) from error
        message = f"{lane.label} did not answer within {lane.side.timeout_seconds:g} s; allow more time"
        raise DeadlineExceeded(Reason.DEADLINE, message) from None


async def _give_ids(lane: Lane, other: Lane) -> None:
    """The question in the ids that the other side reads."""
    try:
        if other.problem is not None or other.card is None:
            message = f"{lane.label} knows no tokenizer, and {other.label}, whose ids it was to receive, failed"
            raise FailedPrecondition(Reason.NO_TOKENIZER, message)
        if other.stored is not None:
            if any(given.text is not None for given in inputs_of(lane.question)):
                lane.question = take_ids_of_run(lane.question, other.stored.run, other.stored.variant)
        elif other.card.capabilities.text:
            asking = tokenize_question(lane.question, other.side.scorer, other.card, lane.deadline)
            lane.question = await within(lane, asking)
    except Problem as problem:
        lane.problem = problem


def _settle_windows(lanes: Sequence[Lane]) -> None:
    """A long text is read in the same windows on both sides, whatever the models could hold."""
    stored = next((lane.stored for lane in lanes if lane.stored is not None and lane.stored.window_tokens), None)
    live = [lane for lane in lanes if _leaves_windows_open(lane)]
    positions = {lane.name: lane.card.limits.max_positions for lane in live if lane.card is not None}
    least, asked = min(positions.values(), default=0), None if stored is None else stored.question
    if stored is None or not isinstance(asked, RollingQuestion):
        width, stride = least, None
    elif asked.max_tokens is None and _longest(stored.run) <= least:
        return  # one window on either side
    else:
        width, stride = stored.window_tokens or 0, asked.stride
    for lane in live:
        assert isinstance(lane.question, RollingQuestion)
        own = lane.question.stride or stride
        if positions[lane.name] != width or own != lane.question.stride:
            lane.question = replace(lane.question, max_tokens=width, stride=own)


def _leaves_windows_open(lane: Lane) -> bool:
    is_open = isinstance(lane.question, RollingQuestion) and lane.question.max_tokens is None
    return is_open and lane.stored is None and lane.card is not None


def _longest(run: Run) -> int:
    """Tokens of the longest text that was read in one window; endless where one needed several."""
    items = [entry for entry in run.entries if isinstance(entry, ScoredItem) and entry.windows is not None]
    if any(item.windows is not None and item.windows.count > 1 for item in items):
        return 1 << 62
    return max((len(item.token_ids) + 1 for item in items), default=0)


def _refuse_another(question: ForwardQuestion, lane: Lane) -> Problem | None:
    """A stored run is compared on its own question; text on one side and the ids of it on the other are the same."""
    difference = find_difference(question, lane.question)
    if difference is None:
        return None
    message = (
        f"{lane.label} holds the answer to another question: {difference} differs; compare runs of one question, or ask"
        " the other side what the run was asked"
    )
    return FailedPrecondition(Reason.CONFLICT, message)


def find_difference(left: ForwardQuestion, right: ForwardQuestion) -> str | None:
    """The first field in which two questions differ so that their numbers cannot be compared; None when there is none.

    Which tokens were read is left to the ids in the answers where one side was asked in text and the other in ids, and
    in which windows to the answers' headers where one side was asked for none.
    """
    if left.kind is not right.kind:
        return "its kind"
    ignored = {"variants", "top_k", "extra_token_ids", "deterministic"}
    forms = {(given.text is None) for question in (left, right) for given in inputs_of(question)}
    if len(forms) > 1:
        ignored |= {"inputs", "items", "prompts", "input", "query", "prefix", "boundary", "item_first"}
        if len(inputs_of(left)) != len(inputs_of(right)):
            return "the number of inputs"
    ours, theirs = to_json(left), to_json(right)
    ignored |= {name for name in ("max_tokens", "stride") if None in (ours.get(name), theirs.get(name))}
    return next((name for name in ours if name not in ignored and ours[name] != theirs[name]), None)


async def listen(asked: Asking) -> AsyncGenerator[tuple[Lane, Said], None]:
    """What the lanes say, in the order of arrival, each lane's end last. One scorer on both sides is asked once.

    It stops when every lane has ended or has got a problem from whoever listens.
    """
    ended: set[SideName] = set()
    if _is_one_scorer(asked):
        async with aclosing(_listen_to_one(asked)) as told:
            async for lane, said in told:
                ended |= {lane.name} if said is None or isinstance(said, Problem) else set()
                yield lane, said
    left = [(lane, question) for lane, question in asked if lane.name not in ended and lane.problem is None]
    if left:
        async with aclosing(_listen_to_each(left)) as told:
            async for lane, said in told:
                yield lane, said


def _is_one_scorer(asked: Asking) -> bool:
    if len(asked) != 2 or asked[0][0].side.scorer is not asked[1][0].side.scorer or asked[0][0].stored is not None:
        return False
    if not _have_one_deadline([lane for lane, _ in asked]):
        return False  # asked together, one side would end with the other's
    left, right = (replace(question, variants=(PLAIN,)) for _, question in asked)
    return bool(to_json(left) == to_json(right))


def _have_one_deadline(lanes: Sequence[Lane]) -> bool:
    deadlines = [lane.deadline for lane in lanes if lane.deadline is not None]
    return not deadlines or (len(deadlines) == len(lanes) and max(deadlines) - min(deadlines) < MOMENT_SECONDS)


async def _listen_to_each(asked: Asking) -> AsyncGenerator[tuple[Lane, Said], None]:
    lanes = [lane for lane, _ in asked]
    sides = [Asked(lane.side.scorer, question, lane.deadline, lane.label) for lane, question in asked]
    open_lanes = set(lanes)
    async with aclosing(fan_out(sides)) as told:
        async for one in told:
            lane = lanes[one.index]
            if isinstance(one, SideEnded):
                lane.add_seconds(one.seconds)
                open_lanes.discard(lane)
                yield lane, one.problem
            else:
                yield lane, one.event
            if all(lane.problem is not None for lane in open_lanes):
                return


async def _listen_to_one(asked: Asking) -> AsyncGenerator[tuple[Lane, Said], None]:
    """Both variants in one batch. A refusal of one variant ends that lane alone; the other is then asked by itself."""
    lanes = [lane for lane, _ in asked]
    question = replace(asked[0][1], variants=tuple(question.variants[0] for _, question in asked))
    deadline = min((lane.deadline for lane in lanes if lane.deadline is not None), default=None)
    splits = [_Split(variant) for variant in range(len(lanes))]
    async with aclosing(fan_out([Asked(lanes[0].side.scorer, question, deadline, "both sides")])) as told:
        async for one in told:
            if isinstance(one, SideEnded):
                blamed = None if splits[0].count else _find_blamed(one.problem)
                for variant, lane in enumerate(lanes):
                    if blamed in {None, variant}:
                        lane.add_seconds(one.seconds)
                        yield lane, one.problem
                return
            for lane, split in zip(lanes, splits, strict=True):
                event = split.take(one.event)
                if event is not None:
                    yield lane, event
            if all(lane.problem is not None for lane in lanes):
                return


def _find_blamed(problem: Problem | None) -> int | None:
    """The variant that a refusal is about."""
    match = None if problem is None else _VARIANT.match(problem.detail.field)
    return None if match is None else int(match[1])


@dataclass
class _Split:
    """One variant's part of an answer to two."""

    variant: int
    count: int = 0  # events seen
    done: int = 0
    failed: int = 0

    def take(self, event: AnswerEvent) -> AnswerEvent | None:
        self.count += 1
        match event:
            case AnswerHeader():
                return replace(event, variants=1)
            case TokenChunk() | ItemDone() | ItemProblem():
                if event.variant != self.variant:
                    return None
                self.done += isinstance(event, ItemDone)
                self.failed += isinstance(event, ItemProblem)
                return replace(event, variant=0)
            case AnswerSummary():
                return replace(event, usage=_halve(event.usage), done=self.done, failed=self.failed)
            case NextTokenAnswer() | ScoreAnswer():
                return self._take_whole(event)
            case _:
                return event

    def _take_whole(self, answer: NextTokenAnswer | ScoreAnswer) -> AnswerEvent:
        views = tuple(replace(view, variant=0) for view in answer.views if view.variant == self.variant)
        usage = _halve(answer.usage)
        if isinstance(answer, NextTokenAnswer):
            found = tuple(replace(one, variant=0) for one in answer.results if one.variant == self.variant)
            return replace(answer, results=found, usage=usage, views=views)
        scored = tuple(replace(one, variant=0) for one in answer.results if one.variant == self.variant)
        return replace(answer, results=scored, usage=usage, views=views)


def _halve(usage: Usage) -> Usage:
    """Both variants read the same prompts; what the model ran for both cannot be told apart and is given to each."""
    return replace(usage, prompt_tokens=usage.prompt_tokens // 2)
