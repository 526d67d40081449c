"""Two sides asked one question and held against each other while they answer; the report comes last, whatever happens.

The command line uses it in process, the coordinator likewise. It knows Scorers, runs and the comparator. It must not
know targets, processes or the wire.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

from dualtrace.compare.assembly import find_differences
from dualtrace.compare.comparator import Comparator, SideFacts
from dualtrace.compare.events import CompareEvent, CompareHeader
from dualtrace.compare.gates import DEFAULT_GATES, GatePolicy
from dualtrace.compare.report import BenchmarkReport, CompareReport
from dualtrace.compare.sides import SideName
from dualtrace.compare.tolerance import Tolerance, choose_tolerance
from dualtrace.comparing.lanes import Lane, LiveSide, Said, listen, prepare
from dualtrace.comparing.union_reading import (
    Second,
    Union,
    check_next_tokens,
    group_prompts,
    keep_union,
    likely_ids,
    merge,
    name_ids,
    refuse_bad_numbers,
    second_question,
    unite,
)
from dualtrace.fanout import tell_bug
from dualtrace.problems import Internal, InvalidArgument, Problem, Reason, Unsupported
from dualtrace.questions.answers import NextTokenAnswer, NextTokens
from dualtrace.questions.asked import ForwardQuestion, NextTokenQuestion, TokenizeQuestion
from dualtrace.runs.run import AskedQuestion, Run
from dualtrace.runs.stored_scorer import StoredScorer

__all__ = ["CompareOptions", "Comparison", "LiveSide", "choose_question"]

Told = CompareEvent | CompareReport


@dataclass(frozen=True)
class CompareOptions:
    tolerance: Tolerance | None = None  # None: the profile of the two precisions
    policy: GatePolicy = DEFAULT_GATES
    debug_token_limit: int = 4096  # tokens a side kept in the report
    reproduce: str = ""  # a command that asks the same again
    benchmark: BenchmarkReport | None = None  # latencies that somebody measured beside the comparison


DEFAULT_OPTIONS = CompareOptions()


class Comparison:
    """One comparison. `events` may be read once; the runs are there as far as they came, at any time after."""

    def __init__(
        self, question: AskedQuestion | None, left: LiveSide, right: LiveSide, options: CompareOptions = DEFAULT_OPTIONS
    ) -> None:
        """`question` may be left out where a side is a stored run. Variants in it are ignored: the sides name them."""
        self._question = choose_question(question, left, right)
        self._options = options
        self._sides = {SideName.LEFT: left, SideName.RIGHT: right}
        self._lanes: dict[SideName, Lane] = {}
        self._comparator: Comparator

    @property
    def question(self) -> ForwardQuestion:
        return self._question

    @property
    def left_run(self) -> Run | None:
        return self._run_of(SideName.LEFT)

    @property
    def right_run(self) -> Run | None:
        return self._run_of(SideName.RIGHT)

    def _run_of(self, name: SideName) -> Run | None:
        return self._lanes[name].run if name in self._lanes else None

    async def events(self) -> AsyncGenerator[Told, None]:
        """Everything as it becomes known, then the report. Leaving it leaves both sides.

        It raises only what is wrong with the comparison itself: no profile fits and no tolerance was given.
        """
        self._lanes = {name: Lane(name, side, self._question) for name, side in self._sides.items()}
        lanes = list(self._lanes.values())
        await prepare(lanes, self._question)
        left, right = lanes
        tolerance = self._options.tolerance
        if tolerance is None and left.provenance is not None and right.provenance is not None:
            tolerance = choose_tolerance(left.provenance, right.provenance)
        compared = replace(self._question, variants=(left.variant,))
        self._comparator = Comparator(
            compared, tolerance, self._options.policy, debug_token_limit=self._options.debug_token_limit
        )
        header = _introduce(left, right, tolerance)
        if header is not None:
            yield header
        async with aclosing(self._read(lanes)) as told:
            async for event in told:
                if event != header:  # the answers say who they are of once more
                    yield event
        yield self._report(left, right)

    async def _read(self, lanes: list[Lane]) -> AsyncGenerator[CompareEvent, None]:
        for lane in lanes:
            for event in () if lane.problem is None else self._fail(lane, lane.problem):
                yield event
        reading = self._read_twice if isinstance(self._question, NextTokenQuestion) else self._read_once
        async with aclosing(reading([lane for lane in lanes if lane.problem is None])) as told:
            async for event in told:
                yield event

    async def _read_once(self, lanes: list[Lane]) -> AsyncGenerator[CompareEvent, None]:
        async with aclosing(listen([(lane, lane.question) for lane in lanes])) as heard:
            async for lane, said in heard:
                for event in self._take(lane, said):
                    yield event

    def _take(self, lane: Lane, said: Said) -> tuple[CompareEvent, ...]:
        if said is None or lane.problem is not None:
            return ()
        if isinstance(said, Problem):
            return self._fail(lane, said)
        try:
            if lane.stored is None:
                lane.keep(said)
            return self._comparator.push(lane.name, said)
        except Problem as problem:
            return self._fail(lane, problem)
        except Exception as error:  # noqa: BLE001 - an answer that nobody foresaw ends its side, not the comparison
            return self._fail(lane, tell_bug(error, lane.label))

    def _fail(self, lane: Lane, problem: Problem) -> tuple[CompareEvent, ...]:
        lane.problem = problem
        return self._comparator.fail(lane.name, problem)

    async def _read_twice(self, lanes: list[Lane]) -> AsyncGenerator[CompareEvent, None]:
        """Next tokens: what both found likely is asked of both, and all numbers come from that second reading."""
        firsts: dict[SideName, NextTokenAnswer] = {}
        async with aclosing(listen([(lane, lane.question) for lane in lanes])) as heard:
            async for lane, said in heard:
                for event in self._take_next(lane, _next(lane), said, firsts):
                    yield event
        answered = [lane for lane in lanes if lane.name in firsts and lane.problem is None]
        async with aclosing(self._read_again(answered, firsts)) as told:
            async for event in told:
                yield event

    def _take_next(
        self, lane: Lane, question: NextTokenQuestion, said: Said, taken: dict[SideName, NextTokenAnswer]
    ) -> tuple[CompareEvent, ...]:
        """Take a side's answer to a first or second reading, as far as it can be one."""
        if said is None or lane.problem is not None:
            return ()
        try:
            if isinstance(said, Problem):
                raise said
            if not isinstance(said, NextTokenAnswer) or lane.name in taken:
                what = f"{type(said).__name__} is no part of an answer, or came after its end"
                raise Internal(Reason.INCOMPLETE_STREAM, f"the answer is broken: {what}")
            problem = check_next_tokens(said, question)
            if problem is not None:
                raise problem
            if question is lane.question and lane.stored is None:
                lane.keep(said)
            taken[lane.name] = refuse_bad_numbers(said)
        except Problem as problem:
            return self._fail(lane, problem)
        except Exception as error:  # noqa: BLE001 - as in _take
            return self._fail(lane, tell_bug(error, lane.label))
        return ()

    async def _read_again(
        self, lanes: list[Lane], firsts: dict[SideName, NextTokenAnswer]
    ) -> AsyncGenerator[CompareEvent, None]:
        assert isinstance(self._question, NextTokenQuestion)
        union = unite([likely_ids(firsts[lane.name], _next(lane)) for lane in lanes])
        seconds: dict[SideName, list[Second]] = {lane.name: [] for lane in lanes}
        for group in group_prompts(union, len(self._question.prompts)) if len(lanes) > 1 else ():
            asked = {
                lane.name: second_question(_next(lane), group, _vocab_size(firsts[lane.name]))
                for lane in lanes if lane.stored is None and lane.problem is None
            }  # fmt: skip
            taken: dict[SideName, NextTokenAnswer] = {}
            pairs = [(self._lanes[name], question) for name, question in asked.items() if question.extra_token_ids]
            async with aclosing(listen(pairs)) as heard:
                async for lane, said in heard:
                    for event in self._take_next(lane, asked[lane.name], said, taken):
                        yield event
            for name, answer in taken.items():
                seconds[name].append((group, asked[name], answer))
        for lane in lanes:
            if lane.problem is None:
                pieces = {name: piece for one in lanes for name, piece in name_ids(firsts[one.name]).items()}
                own = {**pieces, **name_ids(firsts[lane.name])}
                for event in self._show(lane, firsts[lane.name], seconds[lane.name], own, union):
                    yield event

    def _show(
        self, lane: Lane, first: NextTokenAnswer, again: list[Second], pieces: dict[int, bytes], union: Union
    ) -> tuple[CompareEvent, ...]:
        try:
            answer = keep_union(merge(first, _next(lane), again, pieces), union)
            self._comparator.reread(lane.name, replace(_next(lane), extra_token_ids=()))  # all ids are in one list
            return self._comparator.push(lane.name, answer)
        except Problem as problem:
            return self._fail(lane, problem)
        except Exception as error:  # noqa: BLE001 - as in _take
            return self._fail(lane, tell_bug(error, lane.label))

    def _report(self, left: Lane, right: Lane) -> CompareReport:
        return self._comparator.report(
            _facts(left), _facts(right), reproduce=self._options.reproduce, benchmark=self._options.benchmark
        )


def choose_question(question: AskedQuestion | None, left: LiveSide, right: LiveSide) -> ForwardQuestion:
    """What is asked: the question given, or that of the stored run on the left, or else on the right."""
    if isinstance(question, TokenizeQuestion):
        message = "a comparison compares numbers, and TOKENIZE has none; ask ROLLING_LOGPROB: it compares the ids too"
        raise Unsupported(Reason.NOT_IMPLEMENTED, message, field="question")
    if question is not None:
        return question
    for side in (left, right):
        if isinstance(side.scorer, StoredScorer):
            return side.scorer.question
    message = "no question was given, and no side is a stored run that could say it"
    raise InvalidArgument(Reason.MISSING, message, field="question")


def _introduce(left: Lane, right: Lane, tolerance: Tolerance | None) -> CompareHeader | None:
    """Who the two are, from their cards: known before either has read a token. None where one could not be met."""
    if left.provenance is None or right.provenance is None or tolerance is None:
        return None
    differences = find_differences(left.provenance, right.provenance)
    return CompareHeader(left.provenance, right.provenance, differences, tolerance)


def _facts(lane: Lane) -> SideFacts:
    run = lane.run
    problem = lane.problem
    if run is None and problem is None:
        problem = Internal(Reason.INCOMPLETE_STREAM, f"{lane.label} ended without an answer")
    return SideFacts(lane.side.target, lane.variant, run, lane.seconds, problem)


def _next(lane: Lane) -> NextTokenQuestion:
    assert isinstance(lane.question, NextTokenQuestion)
    return lane.question


def _vocab_size(answer: NextTokenAnswer) -> int:
    """Of the side's logits; 0 when it answered no prompt."""
    found = (one.outcome.vocab_size for one in answer.results if isinstance(one.outcome, NextTokens))
    return next(found, 0)
