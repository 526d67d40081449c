"""Next tokens read twice: what both sides found likely at first is what both are asked for the second time.

Pure: answers in, questions and answers out. It must not know who is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dualtrace.engine import int_array
from dualtrace.problems import Internal, Problem, Reason
from dualtrace.questions.answers import NextTokenAnswer, NextTokenResult, NextTokens, Tail, Usage
from dualtrace.questions.asked import NextTokenQuestion
from dualtrace.questions.soundness import find_bad_numbers
from dualtrace.questions.tails import UNDERFLOW_LOGPROB

GROUP_ENTRIES = 32_768
"""Prompts times ids of one second question: its answer is one message."""


@dataclass(frozen=True)
class Group:
    """Prompts start .. stop - 1, asked together for all their ids."""

    start: int
    stop: int
    ids: tuple[int, ...]


def likely_ids(answer: NextTokenAnswer, question: NextTokenQuestion) -> dict[int, dict[int, float]]:
    """Item -> id -> logprob: everything the answer says. Items that failed are left out."""
    found = {}
    for result in answer.results:
        if isinstance(result.outcome, NextTokens):
            found[result.item] = _all_logprobs(result.outcome, question.extra_token_ids)
    return found


Union = Mapping[int, tuple[int, ...]]
"""Item -> the ids that any side named."""


def unite(sides: Sequence[Mapping[int, Mapping[int, float]]]) -> Union:
    """Item -> the ids that any side named, for items that no side failed at."""
    if not sides:
        return {}
    shared = set.intersection(*(set(side) for side in sides))
    return {item: tuple(sorted(set().union(*(side[item] for side in sides)))) for item in sorted(shared)}


def group_prompts(union: Union, prompts: int, entries: int = GROUP_ENTRIES) -> Iterator[Group]:
    """Consecutive prompts whose second question stays small enough; each prompt stands in exactly one group."""
    start, ids = 0, set[int]()
    for prompt in range(prompts):
        wider = ids | set(union.get(prompt, ()))
        if prompt > start and len(wider) * (prompt + 1 - start) > entries:
            yield Group(start, prompt, tuple(sorted(ids)))
            start, wider = prompt, set(union.get(prompt, ()))
        ids = wider
    if prompts:
        yield Group(start, prompts, tuple(sorted(ids)))


def second_question(question: NextTokenQuestion, group: Group, vocab_size: int) -> NextTokenQuestion:
    """The group's prompts, read on its ids as far as this side has them."""
    ids = tuple(token_id for token_id in group.ids if token_id < vocab_size)
    return replace(question, prompts=question.prompts[group.start : group.stop], top_k=0, extra_token_ids=ids)


def check_next_tokens(answer: NextTokenAnswer, question: NextTokenQuestion) -> Problem | None:
    """Why an answer cannot be one to the question, whatever its numbers are; None when it can."""
    items = sorted(result.item for result in answer.results)
    if items != list(range(len(question.prompts))):
        return _broken(f"it holds results for {len(items)} prompts; one for each of {len(question.prompts)} is needed")
    for result in answer.results:
        found = result.outcome
        if isinstance(found, Problem):
            continue
        ids, logprobs, extra = len(found.top_ids), len(found.top_logprobs), len(found.extra_logprobs)
        if ids != logprobs or len(set(found.top_ids.tolist())) != ids:
            return _broken(f"{ids} token ids came with {logprobs} logprobs for prompt {result.item}, each id once")
        if extra != len(question.extra_token_ids):
            return _broken(f"{extra} extra logprobs came for {len(question.extra_token_ids)} ids")
    return None


def _broken(what: str) -> Problem:
    return Internal(Reason.INCOMPLETE_STREAM, f"the answer is broken: {what}")


def refuse_bad_numbers(answer: NextTokenAnswer) -> NextTokenAnswer:
    """A prompt with a number that is none becomes a problem, before its numbers are merged with others."""
    results = []
    for result in answer.results:
        bad = None if isinstance(result.outcome, Problem) else find_bad_numbers(result.outcome)
        results.append(result if bad is None else replace(result, outcome=bad.at(item=result.item)))
    return replace(answer, results=tuple(results))


Second = tuple[Group, NextTokenQuestion, NextTokenAnswer]


def merge(
    first: NextTokenAnswer, question: NextTokenQuestion, seconds: Sequence[Second], pieces: Mapping[int, bytes]
) -> NextTokenAnswer:
    """One answer with the numbers of the second reading; ids become its list, best first, and there are no extras.

    A prompt that was not asked again, because no side named an id for it, keeps what it told to `question`.
    """
    outcomes: dict[int, NextTokens | Problem] = {}
    ids_of: dict[int, tuple[int, ...]] = {}
    for group, again, answer in seconds:
        for result in answer.results:
            outcomes[group.start + result.item] = result.outcome
            ids_of[group.start + result.item] = again.extra_token_ids
    results = []
    for result in first.results:
        outcome = result.outcome
        if isinstance(outcome, NextTokens):
            outcome = outcomes.get(result.item, outcome)
        if isinstance(outcome, NextTokens):
            outcome = list_ids(outcome, ids_of.get(result.item, question.extra_token_ids), None, pieces)
        results.append(replace(result, outcome=outcome))
    computed = sum(answer.usage.computed_tokens for _, _, answer in seconds)
    usage = Usage(first.usage.prompt_tokens, first.usage.computed_tokens + computed)
    return replace(first, results=tuple(results), usage=usage)


def keep_union(answer: NextTokenAnswer, union: Union) -> NextTokenAnswer:
    """Ids that were asked for other prompts of the group go into the tail: each prompt is judged by its own."""
    results = []
    for result in answer.results:
        outcome = result.outcome
        if isinstance(outcome, NextTokens) and result.item in union:
            outcome = list_ids(outcome, (), set(union[result.item]), pieces_of(outcome))
        results.append(NextTokenResult(result.item, result.variant, outcome))
    return replace(answer, results=tuple(results))


def list_ids(
    found: NextTokens, extra_ids: Sequence[int], kept: set[int] | None, pieces: Mapping[int, bytes]
) -> NextTokens:
    """All ids in one list, best first; those that are not kept are added to the tail."""
    known = _all_logprobs(found, extra_ids)
    listed = {one: value for one, value in known.items() if kept is None or one in kept}
    folded = [value for one, value in known.items() if one not in listed]
    tail = found.tail if found.tail_beyond_extra is None or not extra_ids else found.tail_beyond_extra
    order = sorted(listed, key=lambda one: (-listed[one], one))
    return replace(
        found,
        top_ids=int_array(order),
        top_logprobs=np.asarray([listed[one] for one in order], np.float64),
        top_pieces=tuple(pieces[one] for one in order) if order and all(one in pieces for one in order) else (),
        tail=_widen(tail, folded),
        extra_logprobs=np.empty(0, np.float64),
        tail_beyond_extra=None,
    )


def _widen(tail: Tail, logprobs: Sequence[float]) -> Tail:
    if not logprobs:
        return tail
    parts = [*logprobs, *([tail.logprob] if tail.logprob is not None else [])]
    total = float(np.logaddexp.reduce(np.asarray(parts, np.float64)))
    return Tail("UNDERFLOW") if total < UNDERFLOW_LOGPROB else Tail("MEASURED", min(total, 0.0))


def _all_logprobs(found: NextTokens, extra_ids: Sequence[int]) -> dict[int, float]:
    known = dict(zip(found.top_ids.tolist(), found.top_logprobs.tolist(), strict=True))
    return {**known, **dict(zip(extra_ids, found.extra_logprobs.tolist(), strict=True))}


def name_ids(answer: NextTokenAnswer) -> dict[int, bytes]:
    """What the ids of an answer's lists stand for, where its scorer knows."""
    named: dict[int, bytes] = {}
    for result in answer.results:
        if isinstance(result.outcome, NextTokens):
            named |= pieces_of(result.outcome)
    return named


def pieces_of(found: NextTokens) -> dict[int, bytes]:
    if len(found.top_pieces) != len(found.top_ids):
        return {}
    return dict(zip(found.top_ids.tolist(), found.top_pieces, strict=True))
