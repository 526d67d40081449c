"""Two answers in, what they amount to out: pairs as soon as both sides have them, the report at the end.

Pure and incremental: `push` takes one event of one side and returns what is newly known. Whatever order the events of
the two sides arrive in, and however they are cut into pieces, the report is the same. It must not know scorers, clocks,
files or the wire.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from dualtrace.compare.align import Timeline, broken
from dualtrace.compare.assembly import Findings, assemble, find_differences
from dualtrace.compare.events import CompareEvent, CompareHeader, SideFailed
from dualtrace.compare.gates import DEFAULT_GATES, GatePolicy
from dualtrace.compare.labels import find_miscounted
from dualtrace.compare.pass_rule import PassRule
from dualtrace.compare.report import BenchmarkReport, CompareReport
from dualtrace.compare.side_answer import SideAnswer
from dualtrace.compare.sides import SIDES, SideFacts, SideName
from dualtrace.compare.tokens import ItemPairs
from dualtrace.compare.tolerance import Tolerance, choose_tolerance
from dualtrace.problems import InvalidArgument, Problem, Reason
from dualtrace.questions.answers import (
    AnswerEvent,
    AnswerHeader,
    AnswerSummary,
    ItemDone,
    ItemHeader,
    ItemProblem,
    NextTokenAnswer,
    NextTokens,
    ScoreAnswer,
    StreamEvent,
    TokenChunk,
)
from dualtrace.questions.asked import (
    LogprobQuestion,
    MaskedForwardQuestion,
    NextTokenQuestion,
    RollingQuestion,
    ScoreQuestion,
    StreamQuestion,
)
from dualtrace.runs.run import AskedQuestion

__all__ = ["Comparator", "SideFacts"]

NO_ROOM = PassRule(0.0, 0.0)
"""Where a side failed before a tolerance could be chosen: no token has two numbers then, so nothing is judged."""


class Comparator:
    """Each event of each side goes through `push`, in that side's order; `report` says what they amount to."""

    def __init__(
        self,
        question: AskedQuestion,
        tolerance: Tolerance | None,
        policy: GatePolicy = DEFAULT_GATES,
        *,
        debug_token_limit: int = 4096,
    ) -> None:
        """`tolerance` None: the profile of the two sides. `debug_token_limit`: tokens that the report shows."""
        if debug_token_limit < 0:
            message = f"debug_token_limit {debug_token_limit} asked; it must be 0 or above"
            raise InvalidArgument(Reason.OUT_OF_RANGE, message, field="debug_token_limit", allowed=">= 0")
        self._question = question
        self._tolerance = tolerance
        self._policy = policy
        self._limit = debug_token_limit
        count = _count_items(question)
        self._sides = {side: SideAnswer(count) for side in SIDES}
        self._items: tuple[ItemPairs, ...] | None = None  # None: not both sides have said how long their items are
        self._header: CompareHeader | None = None
        self._extra_ids: dict[SideName, tuple[int, ...]] = {}  # of sides that were reread

    def reread(self, side: SideName, question: NextTokenQuestion, pieces: Mapping[int, bytes] | None = None) -> None:
        """Say which ids a side's NextToken answer is about, where it is not the very question of this comparison.

        `pieces`: of the ids, as the first reading told them.
        """
        self._extra_ids[side] = question.extra_token_ids
        self._sides[side].pieces = dict(pieces or {})

    def push(self, side: SideName, event: AnswerEvent) -> tuple[CompareEvent, ...]:
        """Raises InvalidArgument where no tolerance was given and none is known for the two sides.

        An event that cannot be part of an answer makes its side fail.
        """
        answer = self._sides[side]
        if answer.problem is not None:
            return ()
        try:
            events = self._take(side, event)
        except Problem as problem:
            return self.fail(side, problem)
        return (*events, *self._open())

    def fail(self, side: SideName, problem: Problem) -> tuple[CompareEvent, ...]:
        """The side gave up. What it had told is kept; of the rest the other side's tokens are UNAVAILABLE."""
        answer = self._sides[side]
        if answer.problem is not None:
            return ()
        answer.problem = problem
        if isinstance(self._question, StreamQuestion) and answer.headers is None:
            answer.headers = (ItemHeader(),) * answer.item_count
        return (SideFailed(side, problem), *self._give_up(side), *self._open())

    def report(
        self,
        left: SideFacts,
        right: SideFacts,
        *,
        created: datetime | None = None,
        reproduce: str = "",
        benchmark: BenchmarkReport | None = None,
    ) -> CompareReport:
        """A side that has neither ended nor failed by now is held to have broken off."""
        facts = {SideName.LEFT: left, SideName.RIGHT: right}
        for side, known in facts.items():
            if self._sides[side].provenance is None and known.run is not None:
                self._sides[side].provenance = known.run.provenance  # it had answered before it failed
            if known.problem is not None:  # first of both: what a side told may wait for the other's header
                self.fail(side, known.problem)
        for side in facts:
            if not self._sides[side].is_over:
                self.fail(side, broken("it ended without its summary, so it is not whole"))
        extra_ids = {side: self._find_extra_ids(side, facts[side]) for side in SIDES}
        findings = Findings(
            question=self._question,
            tolerance=self._tolerance,
            policy=self._policy,
            answers=self._sides,
            facts=facts,
            items=self._items or (),
            extra_ids=extra_ids,
        )
        when = (created or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return assemble(findings, created=when, reproduce=reproduce, benchmark=benchmark)

    def _find_extra_ids(self, side: SideName, facts: SideFacts) -> tuple[int, ...]:
        """What a side's extra logprobs are about: as told by `reread`, else by its run, else by the question."""
        if not isinstance(self._question, NextTokenQuestion):
            return ()
        asked = self._question if facts.run is None else facts.run.question
        own = asked.extra_token_ids if isinstance(asked, NextTokenQuestion) else ()
        ids = self._extra_ids.get(side, own)
        whole = self._sides[side].whole
        sizes = {len(found.extra_logprobs) for found in whole.values() if isinstance(found, NextTokens)}
        if sizes - {len(ids)}:
            self.fail(side, broken(f"{max(sizes - {len(ids)})} extra logprobs came for {len(ids)} ids"))
            whole.clear()  # no number of it can be told from another
        return ids

    def _take(self, side: SideName, event: AnswerEvent) -> list[CompareEvent]:
        answer = self._sides[side]
        if answer.ended:
            raise broken(f"{type(event).__name__} came after its end")
        streams = isinstance(self._question, StreamQuestion)
        match event:
            case AnswerHeader() if streams:
                answer.take_header(event)
                return []
            case TokenChunk() | ItemDone() | ItemProblem() | AnswerSummary() if streams:
                if answer.headers is None:
                    raise broken("its header did not come first")
                if self._items is None:
                    answer.early.append(event)
                    return []
                return self._apply(side, event)
            case NextTokenAnswer() if isinstance(self._question, NextTokenQuestion):
                answer.take_whole(event)
            case ScoreAnswer() if isinstance(self._question, ScoreQuestion):
                answer.take_whole(event)
                for item, problem in find_miscounted(self._question, answer.whole).items():
                    del answer.whole[item]
                    answer.problems[item] = problem
            case _:
                raise broken(f"{type(event).__name__} is no part of an answer to {self._question.kind.value}")
        return [SideFailed(side, problem) for _, problem in sorted(answer.problems.items())]

    def _open(self) -> list[CompareEvent]:
        """Begin to pair, once both sides have said who they are and what they read."""
        left, right = (self._sides[side] for side in SIDES)
        events: list[CompareEvent] = []
        if self._header is None and left.provenance is not None and right.provenance is not None:
            if self._tolerance is None:
                self._tolerance = choose_tolerance(left.provenance, right.provenance)
            differences = find_differences(left.provenance, right.provenance)
            self._header = CompareHeader(left.provenance, right.provenance, differences, self._tolerance)
            events.append(self._header)
        if self._items is None and left.headers is not None and right.headers is not None:
            self._items = self._pair_items(left.headers, right.headers)
            for pairs in self._items:
                events += self._told(pairs.advance())
            for side in SIDES:
                events += self._catch_up(side)
        return events

    def _pair_items(self, left: tuple[ItemHeader, ...], right: tuple[ItemHeader, ...]) -> tuple[ItemPairs, ...]:
        rule = NO_ROOM if self._tolerance is None else self._tolerance.rule
        room = self._limit
        items = []
        for item, headers in enumerate(zip(left, right, strict=True)):
            keep = min(room, max(header.token_count for header in headers))
            items.append(ItemPairs(item, *headers, rule, keep))
            room -= keep
        return tuple(items)

    def _catch_up(self, side: SideName) -> list[CompareEvent]:
        """Take what came before the other side's header."""
        answer = self._sides[side]
        early, answer.early = answer.early, []
        events: list[CompareEvent] = []
        try:
            for event in early:
                events += self._apply(side, event)
        except Problem as problem:
            events += self.fail(side, problem)
        return events if answer.problem is None else [*events, *self._give_up(side)]

    def _give_up(self, side: SideName) -> list[CompareEvent]:
        """Of what has not ended on this side nothing more will come."""
        events: list[CompareEvent] = []
        for pairs in self._items or ():
            timeline = _timeline(pairs, side)
            timeline.failed = timeline.failed or not timeline.done
            events += self._told(pairs.advance())
        return events

    def _apply(self, side: SideName, event: StreamEvent) -> list[CompareEvent]:
        assert self._items is not None
        answer = self._sides[side]
        if isinstance(event, AnswerSummary):
            answer.take_summary(event)
            return []
        assert not isinstance(event, AnswerHeader)
        answer.check_item(event.item)
        pairs = self._items[event.item]
        timeline = _timeline(pairs, side)
        events: list[CompareEvent] = []
        if isinstance(event, TokenChunk):
            answer.ranks.append(timeline.add(event).ranks)
        elif isinstance(event, ItemDone):
            timeline.end(event.scored_tokens)
            answer.take_done(event)
        else:
            events.append(SideFailed(side, answer.take_problem(event)))
            timeline.failed = True
        return [*events, *self._told(pairs.advance())]

    def _told(self, events: list[CompareEvent]) -> list[CompareEvent]:
        """Pairs are told behind a header only: where a side failed before its own, they stand in the report alone."""
        return [] if self._header is None else events


def _timeline(pairs: ItemPairs, side: SideName) -> Timeline:
    return pairs.aligner.left if side is SideName.LEFT else pairs.aligner.right


def _count_items(question: AskedQuestion) -> int:
    match question:
        case LogprobQuestion() | ScoreQuestion():
            return len(question.items)
        case RollingQuestion():
            return len(question.inputs)
        case NextTokenQuestion():
            return len(question.prompts)
        case MaskedForwardQuestion():
            return 1
    message = f"{question.kind.value} asks for no numbers; compare a question that scores"
    raise InvalidArgument(Reason.CONFLICT, message, field="question")
