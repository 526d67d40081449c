"""What one side has told so far, beside the tokens themselves, and what is wrong with it.

It checks that events can be an answer to the question. It must not know the other side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from dualtrace.compare.align import broken
from dualtrace.compare.columns import Column
from dualtrace.model_card import ModelProvenance
from dualtrace.problems import Problem
from dualtrace.questions.answers import (
    AnswerHeader,
    AnswerSummary,
    Applied,
    Execution,
    ItemDone,
    ItemHeader,
    ItemProblem,
    NextTokenAnswer,
    NextTokens,
    ScoreAnswer,
    ScoreResult,
    StreamEvent,
    Usage,
)
from dualtrace.questions.soundness import find_bad_numbers

Whole = NextTokenAnswer | ScoreAnswer


@dataclass
class SideAnswer:
    """Filled event by event."""

    item_count: int  # that the question has
    provenance: ModelProvenance | None = None
    headers: tuple[ItemHeader, ...] | None = None  # None: no header has come
    early: list[StreamEvent] = field(default_factory=list)  # that came before the other side's header
    done: dict[int, ItemDone] = field(default_factory=dict)
    problems: dict[int, Problem] = field(default_factory=dict)  # of single items
    problem: Problem | None = None  # of the whole side
    ended: bool = False
    usage: Usage | None = None
    execution: Execution | None = None
    whole: dict[int, NextTokens | ScoreResult] = field(default_factory=dict)
    applied: dict[int, Applied] = field(default_factory=dict)
    delta_modules: tuple[str, ...] = ()
    pieces: Mapping[int, bytes] = field(default_factory=dict)  # of ids, where told beside the answer
    ranks: Column = field(default_factory=lambda: Column(np.int32))  # of every scored token

    @property
    def is_over(self) -> bool:
        return self.ended or self.problem is not None

    def take_header(self, header: AnswerHeader) -> None:
        if self.headers is not None:
            raise broken("it has two headers")
        if len(header.items) != self.item_count:
            raise broken(f"its header announces {len(header.items)} items; {self.item_count} were asked")
        self.headers, self.provenance = header.items, header.provenance

    def take_done(self, event: ItemDone) -> None:
        self.done[event.item] = event
        self.delta_modules = self.delta_modules or event.delta_modules
        if event.applied is not None:
            self.applied[event.item] = event.applied

    def take_problem(self, event: ItemProblem) -> Problem:
        self.problems[event.item] = event.problem.at(item=event.item)
        return self.problems[event.item]

    def take_summary(self, event: AnswerSummary) -> None:
        missing = [item for item in range(self.item_count) if item not in self.done and item not in self.problems]
        if missing:
            raise broken(f"it ended and said nothing of how item {missing[0]} ended ({len(missing)} such items)")
        self.usage, self.execution, self.ended = event.usage, event.execution, True

    def check_item(self, item: int) -> None:
        """An item that was asked and that has not ended yet."""
        if not 0 <= item < self.item_count:
            raise broken(f"it speaks of item {item}; {self.item_count} were asked")
        if item in self.done or item in self.problems:
            raise broken(f"item {item} had ended, and more of it came")

    def take_whole(self, answer: Whole) -> None:
        """A unary answer: everything at once."""
        self.provenance, self.usage, self.execution = answer.provenance, answer.usage, answer.execution
        self.delta_modules = next((view.delta_modules for view in answer.views if view.delta_modules), ())
        items = sorted(result.item for result in answer.results)
        if items != list(range(self.item_count)):
            raise broken(f"it holds results for {len(items)} items; one for each of {self.item_count} is needed")
        for result in answer.results:
            found = result if isinstance(result, ScoreResult) else result.outcome
            problem = _problem_of(found)
            if problem is not None:
                self.problems[result.item] = problem.at(item=result.item)
            elif not isinstance(found, Problem):
                self.whole[result.item] = found
                if found.applied is not None:
                    self.applied[result.item] = found.applied
        self.ended = True


def _problem_of(found: NextTokens | ScoreResult | Problem) -> Problem | None:
    """Why a result cannot be compared: its own problem, or numbers that no score can be."""
    if isinstance(found, Problem):
        return found
    if isinstance(found, ScoreResult):
        if found.problem is not None:
            return found.problem
    elif len(found.top_ids) != len(found.top_logprobs):
        return broken(f"{len(found.top_ids)} token ids came with {len(found.top_logprobs)} logprobs")
    return find_bad_numbers(found)
