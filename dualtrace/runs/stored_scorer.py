"""A Scorer that replays a stored run: its own question is the only one it can answer.

It knows runs. It must not know where they are kept, files or the wire.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from dualtrace.arrays import FloatArray, IntArray
from dualtrace.card import Capabilities, Card, Limits, QuestionKind
from dualtrace.engine import int_array
from dualtrace.problems import FailedPrecondition, Internal, InvalidArgument, Problem, Reason, Unsupported
from dualtrace.questions.answers import (
    AnswerEvent,
    AnswerHeader,
    AnswerSummary,
    ItemDone,
    ItemHeader,
    ItemProblem,
    NextTokenAnswer,
    NextTokenResult,
    NextTokens,
    ScoreAnswer,
    ScoreResult,
    TokenChunk,
)
from dualtrace.questions.asked import (
    ForwardQuestion,
    MaskedForwardQuestion,
    NextTokenQuestion,
    Question,
    StreamQuestion,
    TokenizeQuestion,
)
from dualtrace.records import to_json
from dualtrace.runs.run import NextEntry, Run, ScoredItem, ScoreEntry, TokenizedEntry, restore_problem
from dualtrace.tokens import Tokens

CHUNK_TOKENS = 256


class StoredScorer:
    """One variant of a run, as if it were answered now."""

    def __init__(self, run: Run, name: str, variant: int | None = None) -> None:
        """`name`: of the run, for messages. `variant` may be left out where the run has one."""
        if isinstance(run.question, TokenizeQuestion):
            message = f"{name} holds tokens and no numbers; only runs of scoring questions can be replayed"
            raise Unsupported(Reason.NOT_IMPLEMENTED, message)
        self._run = run
        self._name = name
        self._variant = _choose_variant(run.question, name, variant)
        self._question = replace(run.question, variants=(run.question.variants[self._variant],))
        self._entries = tuple(entry for entry in run.entries if getattr(entry, "variant", 0) == self._variant)
        items = [item.item for item in self._items()]
        if items != list(range(len(items))):
            message = f"{name} holds items {items[:8]}; they must be 0, 1, 2, ... in order"
            raise InvalidArgument(Reason.MALFORMED, message, field="items")
        if run.complete and (run.usage is None or run.execution is None):
            message = (
                f"{name} says that it is complete, and has no usage or no execution; such a run cannot be replayed"
            )
            raise InvalidArgument(Reason.MISSING, message, field="usage")

    @property
    def run(self) -> Run:
        return self._run

    @property
    def narrowed_run(self) -> Run:
        """The run as if only the chosen variant had been asked."""
        entries = tuple(
            entry if isinstance(entry, TokenizedEntry) else replace(entry, variant=0) for entry in self._entries
        )
        whole = len(self._run.question.variants) == 1 if isinstance(self._run.question, ForwardQuestion) else True
        later = self._run.later_identity if whole else None  # that of all variants together
        return replace(self._run, question=self._question, entries=entries, later_identity=later)

    @property
    def variant(self) -> int:
        return self._variant

    @property
    def question(self) -> ForwardQuestion:
        """What was asked, under the one variant that is replayed."""
        return self._question

    @property
    def window_tokens(self) -> int | None:
        """The windows in which a rolling text was read; None where there were none."""
        items = (entry for entry in self._entries if isinstance(entry, ScoredItem))
        return next((item.windows.max_tokens for item in items if item.windows is not None), None)

    @property
    def _has_ranks(self) -> bool:
        ranks = {rank is not None for item in self._items() for rank in item.token_ranks}
        return True in ranks or not ranks

    async def describe(self) -> Card:
        """Who answered then. A run does not hold the model's shape, and nothing else can be asked of it."""
        kind = self._question.kind
        capabilities = Capabilities(
            questions=(kind,),
            text=True,
            masks=kind is QuestionKind.MASKED_FORWARD,
            ranks=self._has_ranks,
            distributions=True,
        )
        return Card(
            self._run.provenance, capabilities, Limits(max_positions=0), vocab_size=0, layers=0, query_heads=0,
            kv_heads=0, hidden_size=0,
        )  # fmt: skip

    async def close(self) -> None:
        """Nothing is held."""

    def ask(self, question: Question, *, deadline: float | None = None) -> AsyncIterator[AnswerEvent]:
        if not isinstance(question, ForwardQuestion) or not is_same_question(question, self._question):
            message = (
                f"{self._name} is a stored answer; it can answer its own question only, which is another one:"
                " ask what it was asked, or ask a live side"
            )
            raise FailedPrecondition(Reason.CONFLICT, message)
        return self._replay()

    async def _replay(self) -> AsyncIterator[AnswerEvent]:
        if isinstance(self._question, StreamQuestion):
            for event in self._stream(self._question):
                yield event
        if not self._run.complete:
            message = f"{self._name} broke off when it was made; what it holds is not the whole answer"
            raise Internal(Reason.INCOMPLETE_STREAM, message)
        assert self._run.usage is not None and self._run.execution is not None, "checked in __init__"  # noqa: PT018
        if isinstance(self._question, StreamQuestion):
            items = self._items()
            failed = sum(item.problem is not None for item in items)
            yield AnswerSummary(self._run.usage, self._run.execution, len(items) - failed, failed)
        else:
            yield self._whole()

    def _items(self) -> tuple[ScoredItem, ...]:
        return tuple(entry for entry in self._entries if isinstance(entry, ScoredItem))

    def _stream(self, question: StreamQuestion) -> Iterator[AnswerEvent]:
        items = self._items()
        masked = question if isinstance(question, MaskedForwardQuestion) else None
        yield AnswerHeader(
            provenance=self._run.provenance,
            items=tuple(_item_header(item) for item in items),
            variants=1,
            top_k=question.top_k,
            streams=False,
            has_pieces=any(item.tokens is not None for item in items),
            has_offsets=any(item.char_starts is not None for item in items),
            kl_base_masked=masked is not None and masked.kl_base_masked,
            kl_masked_base=masked is not None and masked.kl_masked_base,
        )
        for index, item in enumerate(items):
            yield from _chunks(index, item, question.top_k)
            if item.problem is not None:
                yield ItemProblem(index, 0, restore_problem(item.problem, index))
            elif self._run.complete or item.total_logprob is not None:
                yield _item_done(index, item)

    def _whole(self) -> NextTokenAnswer | ScoreAnswer:
        run = self._run
        assert run.usage is not None and run.execution is not None, "checked in __init__"  # noqa: PT018
        if isinstance(self._question, NextTokenQuestion):
            extra = self._question.extra_token_ids
            found = (entry for entry in self._entries if isinstance(entry, NextEntry))
            results = tuple(NextTokenResult(entry.item, 0, _next_tokens(entry, extra)) for entry in found)
            return NextTokenAnswer(results, run.provenance, run.usage, run.execution)
        scored = tuple(_score_result(entry) for entry in self._entries if isinstance(entry, ScoreEntry))
        return ScoreAnswer(scored, run.provenance, run.usage, run.execution)


def is_same_question(left: ForwardQuestion, right: ForwardQuestion) -> bool:
    return left.kind is right.kind and to_json(left) == to_json(right)


def _choose_variant(question: ForwardQuestion, name: str, variant: int | None) -> int:
    count = len(question.variants)
    if variant is None and count == 1:
        return 0
    if variant is None or not 0 <= variant < count:
        asked = "none was chosen" if variant is None else f"{variant} was asked"
        message = f"{name} holds {count} variants and {asked}; choose one of 0-{count - 1}"
        raise InvalidArgument(Reason.OUT_OF_RANGE, message, field="variant", allowed=f"0-{count - 1}")
    return variant


def _item_header(item: ScoredItem) -> ItemHeader:
    if item.problem is not None and not item.token_ids:
        return ItemHeader()
    start = next((i for i, value in enumerate(item.token_logprobs) if value is not None), len(item.token_ids))
    known = next((i for i, token_id in enumerate(item.token_ids[:start]) if token_id is None), start)
    return ItemHeader(
        token_count=len(item.token_ids),
        prompt_tokens=item.prompt_tokens,
        scored_start=item.scored_start,
        prefix_token_id=item.prefix_token_id,
        boundary_token_merged=item.boundary_token_merged,
        unscored=_tokens(item, 0, known),
        windows=item.windows,
    )


def _tokens(item: ScoredItem, start: int, stop: int) -> Tokens:
    ids = [token_id for token_id in item.token_ids[start:stop] if token_id is not None]
    pieces = () if item.tokens is None else tuple(piece or b"" for piece in item.tokens[start:stop])
    offsets = [
        None if column is None else int_array([value or 0 for value in column[start:stop]])
        for column in (item.char_starts, item.char_ends)
    ]
    return Tokens(int_array(ids), pieces, *offsets)


def _chunks(index: int, item: ScoredItem, top_k: int) -> Iterator[TokenChunk]:
    """Scored tokens in chunks; a token without a number, or without an id, is a gap. A chunk has all ranks or none."""
    scored = [
        i for i, (value, token_id) in enumerate(zip(item.token_logprobs, item.token_ids, strict=True))
        if value is not None and token_id is not None
    ]  # fmt: skip
    for _, group in groupby(enumerate(scored), key=lambda pair: (pair[1] - pair[0], _has_rank(item, pair[1]))):
        run = [place for _, place in group]
        for start in range(0, len(run), CHUNK_TOKENS):
            yield _chunk(index, item, run[start], run[start] + len(run[start : start + CHUNK_TOKENS]), top_k)


def _has_rank(item: ScoredItem, place: int) -> bool:
    return item.token_ranks[place] is not None and item.token_ties[place] is not None


def _chunk(index: int, item: ScoredItem, start: int, stop: int, top_k: int) -> TokenChunk:
    ranked = slice(start, stop if _has_rank(item, start) else start)  # a scorer without ranks sends none
    top_ids, top_logprobs = _candidates(item, start, stop, top_k)
    return TokenChunk(
        item=index,
        variant=0,
        first_index=start,
        tokens=_tokens(item, start, stop),
        logprobs=_floats(item.token_logprobs[start:stop]),
        ranks=int_array([rank or 0 for rank in item.token_ranks[ranked]]),
        ties=int_array([tie or 0 for tie in item.token_ties[ranked]]),
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        kl_base_masked=_kl(item.token_kl_base_masked, start, stop),
        kl_masked_base=_kl(item.token_kl_masked_base, start, stop),
    )


def _candidates(item: ScoredItem, start: int, stop: int, top_k: int) -> tuple[IntArray, FloatArray] | tuple[None, None]:
    """[C, k] best first; none where a token of the chunk has not all of them."""
    found = [(item.token_candidates or {}).get(place, {}) for place in range(start, stop)]
    if not top_k or any(len(one) != top_k for one in found):
        return None, None
    ordered = [sorted(one.items(), key=lambda pair: (-pair[1], pair[0])) for one in found]
    ids = np.asarray([[token_id for token_id, _ in one] for one in ordered], np.int32)
    return ids, np.asarray([[value for _, value in one] for one in ordered], np.float64)


def _kl(column: tuple[float | None, ...] | None, start: int, stop: int) -> FloatArray | None:
    part = None if column is None else column[start:stop]
    return None if part is None or None in part else _floats(part)


def _floats(values: Sequence[float | None]) -> FloatArray:
    return np.asarray(values, np.float64)


def _item_done(index: int, item: ScoredItem) -> ItemDone:
    return ItemDone(
        item=index,
        variant=0,
        scored_tokens=sum(value is not None for value in item.token_logprobs),
        total_logprob=item.total_logprob,
        mean_logprob=item.mean_logprob,
        perplexity=item.perplexity,
        is_greedy=item.is_greedy,
        applied=item.applied,
        document_starts=item.document_starts,
        delta_modules=item.delta_modules,
    )


def _next_tokens(entry: NextEntry, extra_ids: tuple[int, ...]) -> NextTokens | Problem:
    if entry.problem is not None:
        return restore_problem(entry.problem, entry.item)
    missing = [one for one in extra_ids if one not in entry.extra_logprobs]
    if entry.tail is None or missing:
        message = f"prompt {entry.item} of the run has no tail, or not all of its extra ids; it cannot be replayed"
        return InvalidArgument(Reason.MISSING, message, item=entry.item)
    return NextTokens(
        top_ids=int_array(entry.top_ids),
        top_logprobs=_floats(entry.top_logprobs),
        top_pieces=entry.top_tokens or (),
        tail=entry.tail,
        extra_logprobs=_floats([entry.extra_logprobs[one] for one in extra_ids]),
        tail_beyond_extra=entry.tail_beyond_extra,
        vocab_size=entry.vocab_size,
        prompt_tokens=entry.prompt_tokens,
        prefix_token_id=entry.prefix_token_id,
        applied=entry.applied,
    )


def _score_result(entry: ScoreEntry) -> ScoreResult:
    return ScoreResult(
        item=entry.item,
        variant=0,
        prompt_tokens=entry.prompt_tokens,
        scores=entry.scores,
        label_logprobs=entry.label_logprobs,
        problem=None if entry.problem is None else restore_problem(entry.problem, entry.item),
        applied=entry.applied,
    )
