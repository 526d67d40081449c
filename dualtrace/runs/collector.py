"""Makes a Run out of the events of an answer, while they arrive. Whatever has come can be taken at any time.

Pure: it takes and returns values. It must not know who asks, files or the wire. What it is told may come from another
machine, so it checks that indices follow one another and sets aside no room for tokens that were only announced. A
number that is none is never kept: it is absent, and a problem of its item.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np

from dualtrace.arrays import FloatArray, IntArray
from dualtrace.model_card import ModelProvenance
from dualtrace.problems import BadNumbers, Internal, Problem, Reason
from dualtrace.questions.answers import (
    AnswerEvent,
    AnswerHeader,
    AnswerSummary,
    Execution,
    ItemDone,
    ItemHeader,
    ItemProblem,
    NextTokenAnswer,
    NextTokenResult,
    NextTokens,
    ScoreAnswer,
    ScoreResult,
    TokenChunk,
    TokenizeAnswer,
    Usage,
)
from dualtrace.questions.asked import NextTokenQuestion, ScoreQuestion, StreamQuestion
from dualtrace.questions.soundness import find_bad_numbers
from dualtrace.runs.run import (
    AskedQuestion,
    Entry,
    NextEntry,
    Run,
    ScoredItem,
    ScoreEntry,
    TokenizedEntry,
    store_problem,
)
from dualtrace.tokens import Tokens

MAX_GAP = 65_536
"""Tokens between two chunks that nothing was told about: more is a broken answer."""


@dataclass
class _Track:
    """One item under one variant, as far as it is known. All lists are equally long."""

    header: ItemHeader
    pieces: list[bytes | None] = field(default_factory=list)
    ids: list[int | None] = field(default_factory=list)
    starts: list[int | None] = field(default_factory=list)
    ends: list[int | None] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    ties: list[int | None] = field(default_factory=list)
    kl_base_masked: list[float | None] = field(default_factory=list)
    kl_masked_base: list[float | None] = field(default_factory=list)
    candidates: dict[int, dict[int, float]] = field(default_factory=dict)
    done: ItemDone | None = None
    problem: Problem | None = None
    bad_number: str = ""  # the first number that is none

    def add_tokens(self, tokens: Tokens) -> None:
        blank: list[None] = [None] * len(tokens)
        self.ids += tokens.ids.tolist()
        self.pieces += tokens.pieces or blank
        self.starts += blank if tokens.starts is None else tokens.starts.tolist()
        self.ends += blank if tokens.ends is None else tokens.ends.tolist()

    def add_chunk(self, chunk: TokenChunk) -> None:
        """The numbers of tokens that follow; every column there is has their length."""
        first, count = chunk.first_index, len(chunk.tokens)
        self.add_tokens(chunk.tokens)
        self.logprobs += self._keep_finite(chunk.logprobs, "logprob", first, count)
        self.ranks += _keep_told(chunk.ranks, 1, count)
        self.ties += _keep_told(chunk.ties, 0, count)
        self.kl_base_masked += self._keep_finite(chunk.kl_base_masked, "KL(base || masked)", first, count)
        self.kl_masked_base += self._keep_finite(chunk.kl_masked_base, "KL(masked || base)", first, count)
        if chunk.top_ids is not None and chunk.top_logprobs is not None:
            pairs = zip(chunk.top_ids.tolist(), chunk.top_logprobs, strict=True)
            for place, (ids, logprobs) in enumerate(pairs, first):
                kept = zip(ids, self._keep_finite(logprobs, "candidate", place, len(ids), step=0), strict=True)
                self.candidates[place] = {one: value for one, value in kept if value is not None}

    def _keep_finite(
        self, column: FloatArray | None, what: str, first: int, count: int, step: int = 1
    ) -> list[float | None]:
        """The column, with None for what is no number; the first such number is remembered. `step`: tokens a value."""
        if column is None:
            return [None] * count
        values: list[float | None] = column.tolist()
        finite = np.isfinite(column)
        if not finite.all():
            wrong = int(np.argmin(finite))
            self.bad_number = self.bad_number or f"the {what} of token {first + step * wrong} is {values[wrong]}"
            values = [value if good else None for value, good in zip(values, finite.tolist(), strict=True)]
        return values

    def end(self) -> tuple[ItemDone | None, Problem | None]:
        """How the item ended: with its totals, or why it has none. A number that is none is an error, never a score."""
        done, bad = self.done, self.bad_number
        if done is not None and not bad:
            totals = {name: getattr(done, name) for name in ("total_logprob", "mean_logprob", "perplexity")}
            told = (f"{name} is {one}" for name, one in totals.items() if one is not None and not math.isfinite(one))
            bad = next(told, "")
        if not bad or self.problem is not None:
            return (None if bad else done), self.problem
        message = f"{bad}, which is no number that can be kept: the answer is lost, ask again"
        return None, BadNumbers(Reason.NON_FINITE_LOGITS, message)

    def level(self) -> None:
        """Give unscored tokens their absent numbers, so that the lists are equally long."""
        blank: list[None] = [None] * (len(self.ids) - len(self.logprobs))
        self.logprobs += blank
        self.ranks += blank
        self.ties += blank
        self.kl_base_masked += blank
        self.kl_masked_base += blank

    def leave_gap(self, count: int) -> None:
        blank: list[None] = [None] * count
        self.ids += blank
        self.pieces += blank
        self.starts += blank
        self.ends += blank
        self.level()


class RunCollector:
    """Feed it every event with `push`, in order; `run` is what they amount to."""

    def __init__(
        self,
        target: str,
        question: AskedQuestion,
        *,
        created: datetime | None = None,
        provenance: ModelProvenance | None = None,
    ) -> None:
        """`provenance`: for answers that do not carry it (Tokenize), from Describe."""
        self._target = target
        self._question = question
        self._created = created or datetime.now(UTC)
        self._provenance = provenance
        self._header: AnswerHeader | None = None
        self._tracks: dict[tuple[int, int], _Track] = {}
        self._entries: tuple[Entry, ...] = ()
        self._usage: Usage | None = None
        self._execution: Execution | None = None
        self._complete = False
        self.scored_tokens = 0

    def push(self, event: AnswerEvent) -> None:
        match event:
            case AnswerHeader():
                self._take_header(event)
            case TokenChunk():
                self._take_chunk(event)
            case ItemDone():
                self._track(event.item, event.variant).done = event
            case ItemProblem():
                self._track(event.item, event.variant).problem = event.problem
            case AnswerSummary():
                self._usage, self._execution, self._complete = event.usage, event.execution, True
            case NextTokenAnswer() | ScoreAnswer() | TokenizeAnswer():
                self._take_whole(event)
            case _:
                raise Internal(Reason.BUG, f"{type(event).__name__} is no part of a run")

    def run(self) -> Run:
        if self._provenance is None:
            raise Internal(Reason.INCOMPLETE_STREAM, "the answer broke off before it said which model answers")
        entries = self._entries
        if self._header is not None:
            tracks = sorted(self._tracks.items(), key=lambda pair: (pair[0][1], pair[0][0]))
            entries = tuple(self._scored_item(item, variant, track) for (item, variant), track in tracks)
        return Run(
            created=self._created.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            target=self._target,
            question=self._question,
            provenance=self._provenance,
            entries=entries,
            usage=self._usage,
            execution=self._execution,
            complete=self._complete,
        )

    def _take_header(self, header: AnswerHeader) -> None:
        assert isinstance(self._question, StreamQuestion), "only streamed answers have a header"
        if self._header is not None or header.variants != len(self._question.variants):
            message = f"the answer must have one header, of {len(self._question.variants)} variants"
            raise Internal(Reason.INCOMPLETE_STREAM, message)
        self._header, self._provenance = header, header.provenance
        for item, item_header in enumerate(header.items):
            for variant in range(header.variants):
                track = self._tracks[item, variant] = _Track(item_header)
                if item_header.unscored is not None:
                    track.add_tokens(item_header.unscored)
                    track.level()

    def _track(self, item: int, variant: int) -> _Track:
        track = self._tracks.get((item, variant))
        if track is None:
            message = f"item {item} variant {variant} was answered, but the header did not announce it"
            raise Internal(Reason.INCOMPLETE_STREAM, message)
        return track

    def _take_chunk(self, chunk: TokenChunk) -> None:
        track = self._track(chunk.item, chunk.variant)
        gap = chunk.first_index - len(track.ids)
        count = len(chunk.tokens)
        if not 0 <= gap <= MAX_GAP or chunk.first_index + count > track.header.token_count:
            message = (
                f"tokens {chunk.first_index} to {chunk.first_index + count - 1} of item {chunk.item} do not follow"
            )
            raise Internal(Reason.INCOMPLETE_STREAM, message)
        _check_columns(chunk)
        track.leave_gap(gap)
        track.add_chunk(chunk)
        self.scored_tokens += count

    def _scored_item(self, item: int, variant: int, track: _Track) -> ScoredItem:
        assert self._header is not None
        header, whole = track.header, track.done
        done, problem = track.end()
        ranks = [rank for rank in track.ranks if rank is not None]
        return ScoredItem(
            item=item,
            variant=variant,
            prefix_token_id=header.prefix_token_id,
            prompt_tokens=header.prompt_tokens,
            scored_start=header.scored_start,
            boundary_token_merged=header.boundary_token_merged,
            windows=header.windows,
            tokens=tuple(track.pieces) if self._header.has_pieces else None,
            token_ids=tuple(track.ids),
            char_starts=tuple(track.starts) if self._header.has_offsets else None,
            char_ends=tuple(track.ends) if self._header.has_offsets else None,
            token_logprobs=tuple(track.logprobs),
            token_nll=tuple(None if value is None else 0.0 - value for value in track.logprobs),
            token_ranks=tuple(track.ranks),
            token_ties=tuple(track.ties),
            token_kl_base_masked=tuple(track.kl_base_masked) if self._header.kl_base_masked else None,
            token_kl_masked_base=tuple(track.kl_masked_base) if self._header.kl_masked_base else None,
            token_candidates=track.candidates if self._header.top_k else None,
            total_logprob=None if done is None else done.total_logprob,
            mean_logprob=None if done is None else done.mean_logprob,
            perplexity=None if done is None else done.perplexity,
            is_greedy=None if done is None else done.is_greedy,
            mrr=sum(1 / rank for rank in ranks) / len(ranks) if ranks and done is not None else None,
            rank1_share=ranks.count(1) / len(ranks) if ranks and done is not None else None,
            applied=None if whole is None else whole.applied,
            document_starts=() if whole is None else whole.document_starts,
            delta_modules=() if whole is None else whole.delta_modules,
            problem=None if problem is None else store_problem(problem),
        )

    def _take_whole(self, answer: NextTokenAnswer | ScoreAnswer | TokenizeAnswer) -> None:
        if isinstance(answer, TokenizeAnswer):
            results = enumerate(answer.results)
            self._entries = tuple(_tokenized(item, result) for item, result in results)
        else:
            self._provenance, self._usage, self._execution = answer.provenance, answer.usage, answer.execution
            if isinstance(answer, NextTokenAnswer):
                assert isinstance(self._question, NextTokenQuestion)
                extra = self._question.extra_token_ids
                self._entries = tuple(_next_entry(result, extra) for result in answer.results)
            else:
                assert isinstance(self._question, ScoreQuestion)
                self._entries = tuple(_score_entry(result, self._question) for result in answer.results)
        self._complete = True


def _check_columns(chunk: TokenChunk) -> None:
    """A scorer without ranks sends none; every other column counts the tokens."""
    count = len(chunk.tokens)
    columns = {name: getattr(chunk, name) for name in ("logprobs", "kl_base_masked", "kl_masked_base")}
    columns |= {name: found for name in ("ranks", "ties") if len(found := getattr(chunk, name))}
    columns |= {"top_ids": chunk.top_ids, "top_logprobs": chunk.top_logprobs}
    for name, column in columns.items():
        if column is not None and len(column) != count:
            raise Internal(Reason.INCOMPLETE_STREAM, f"{count} tokens came with {len(column)} {name}")


def _keep_told(column: IntArray, least: int, count: int) -> list[int | None]:
    """A column of ranks or ties, with None for what cannot be one."""
    return [value if value >= least else None for value in column.tolist()] if len(column) else [None] * count


def _next_entry(result: NextTokenResult, extra_ids: tuple[int, ...]) -> NextEntry:
    found = result.outcome
    if isinstance(found, NextTokens):
        _check_lists(found, extra_ids)
    bad = found if isinstance(found, Problem) else find_bad_numbers(found)
    if isinstance(found, Problem) or bad is not None:
        problem = None if bad is None else store_problem(bad)
        return NextEntry(result.item, result.variant, 0, None, 0, (), None, (), None, {}, None, None, problem)
    return NextEntry(
        item=result.item,
        variant=result.variant,
        prompt_tokens=found.prompt_tokens,
        prefix_token_id=found.prefix_token_id,
        vocab_size=found.vocab_size,
        top_ids=tuple(found.top_ids.tolist()),
        top_tokens=found.top_pieces if len(found.top_pieces) == len(found.top_ids) else None,
        top_logprobs=tuple(found.top_logprobs.tolist()),
        tail=found.tail,
        extra_logprobs=dict(zip(extra_ids, found.extra_logprobs.tolist(), strict=True)),
        tail_beyond_extra=found.tail_beyond_extra,
        applied=found.applied,
        problem=None,
    )


def _check_lists(found: NextTokens, extra_ids: tuple[int, ...]) -> None:
    if len(found.extra_logprobs) != len(extra_ids):
        message = f"{len(found.extra_logprobs)} extra logprobs came for {len(extra_ids)} ids"
        raise Internal(Reason.INCOMPLETE_STREAM, message)
    if len(found.top_ids) != len(found.top_logprobs):
        message = f"{len(found.top_ids)} token ids came with {len(found.top_logprobs)} logprobs"
        raise Internal(Reason.INCOMPLETE_STREAM, message)


def _score_entry(result: ScoreResult, question: ScoreQuestion) -> ScoreEntry:
    labels = question.labels
    if question.item_labels is not None and result.item < len(question.item_labels):
        labels = question.item_labels[result.item]
    bad = find_bad_numbers(result)
    if result.label_logprobs and len(result.scores) != len(result.label_logprobs):
        message = f"{len(result.scores)} scores came with {len(result.label_logprobs)} logprobs of their labels"
        bad = Internal(Reason.INCOMPLETE_STREAM, message)
    problem = bad if result.problem is None else result.problem
    return ScoreEntry(
        item=result.item,
        variant=result.variant,
        prompt_tokens=result.prompt_tokens,
        label_token_ids=labels or (),
        scores=() if bad is not None else result.scores,
        label_logprobs=() if bad is not None else result.label_logprobs,
        applied=result.applied,
        problem=None if problem is None else store_problem(problem),
    )


def _tokenized(item: int, result: Tokens | Problem) -> TokenizedEntry:
    if isinstance(result, Problem):
        return TokenizedEntry(item, (), (), None, None, store_problem(result))
    return TokenizedEntry(
        item=item,
        tokens=result.pieces,
        token_ids=tuple(result.ids.tolist()),
        char_starts=None if result.starts is None else tuple(result.starts.tolist()),
        char_ends=None if result.ends is None else tuple(result.ends.tolist()),
        problem=None,
    )
