"""A Scorer over an engine in this process: plans questions as rows, queues them, reads the answers back.

It must not know the wire, sockets or processes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from dualtrace import __version__
from dualtrace.artifacts import ArtifactStore
from dualtrace.calls import Ticket
from dualtrace.card import Capabilities, Card, Limits, QuestionKind, limits_for
from dualtrace.engine import Engine, Read
from dualtrace.masks.resolve import geometry_of
from dualtrace.metrics import Metrics
from dualtrace.problems import BadNumbers, Problem, Reason, Unsupported
from dualtrace.questions.answers import (
    AnswerEvent,
    AnswerSummary,
    ArtifactKept,
    Execution,
    MaskExplanation,
    NextTokenAnswer,
    PreflightAnswer,
    PreflightResult,
    ScoreAnswer,
    StreamEvent,
    TokenizeAnswer,
    Usage,
)
from dualtrace.questions.asked import (
    ArtifactQuestion,
    ExplainMaskQuestion,
    LogprobQuestion,
    MaskedForwardQuestion,
    NextTokenQuestion,
    PreflightQuestion,
    Question,
    RollingQuestion,
    ScoreQuestion,
    StreamQuestion,
    TokenizeQuestion,
    Variant,
)
from dualtrace.questions.compose import ONE_HEAD, Context, check_count
from dualtrace.questions.explain import answer_explain
from dualtrace.questions.logprob import plan_logprob
from dualtrace.questions.masked_forward import plan_masked_forward
from dualtrace.questions.next_token import plan_next_token, read_next_token
from dualtrace.questions.outcome import Outcome, view_receipts
from dualtrace.questions.rolling import plan_rolling
from dualtrace.questions.score import plan_score, read_score
from dualtrace.questions.sight import check_variant
from dualtrace.questions.token_plan import TokenPlan
from dualtrace.questions.token_stream import TokenStream
from dualtrace.questions.tokenize import answer_tokenize
from dualtrace.rows import Row, plain_row
from dualtrace.scheduler import Scheduler, SchedulerLimits
from dualtrace.tokens import Tokenizer
from dualtrace.views import View

T = TypeVar("T")
Q = TypeVar("Q")

SENTINEL = "Two and two are four. Die Straße war naß; 猫が好き. 🙂"
"""The fixed text of the preflight: several scripts, so that a damaged tokenizer or embedding shows."""


@dataclass(frozen=True)
class StreamPace:
    """When scored tokens leave: as soon as a chunk is full, or when the oldest has waited so long."""

    chunk_tokens: int = 64
    flush_seconds: float = 0.05


class EngineScorer:
    """Owns the scheduler's thread and the engine until `close`."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        *,
        limits: Limits | None = None,
        scheduling: SchedulerLimits | None = None,
        pace: StreamPace | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._engine = engine
        self._metrics = metrics or Metrics()
        self._pace = pace or StreamPace()
        self._card = describe_engine(engine, tokenizer, limits)
        self._artifacts = ArtifactStore()
        self._context = _context(self._card, tokenizer, engine, self._artifacts)
        self._scheduler = Scheduler(engine, scheduling or SchedulerLimits(), self._metrics)
        self._scheduler.start()

    @property
    def scheduler(self) -> Scheduler:
        return self._scheduler

    async def describe(self) -> Card:
        return self._card

    async def close(self) -> None:
        await asyncio.to_thread(self._scheduler.close)
        self._engine.close()

    def ask(self, question: Question, *, deadline: float | None = None) -> AsyncIterator[AnswerEvent]:
        self._refuse_what_the_engine_cannot(question)
        match question:
            case LogprobQuestion() | RollingQuestion() | MaskedForwardQuestion():
                return self._stream(question, deadline)
            case NextTokenQuestion():
                return self._next_token(question, deadline)
            case ScoreQuestion():
                return self._score(question, deadline)
            case TokenizeQuestion():
                return self._tokenize(question)
            case PreflightQuestion():
                return self._preflight(question, deadline)
            case ExplainMaskQuestion():
                return self._explain(question)
            case ArtifactQuestion():
                return self._keep(question)

    def _refuse_what_the_engine_cannot(self, question: Question) -> None:
        if isinstance(question, MaskedForwardQuestion | ExplainMaskQuestion) and not self._context.masks:
            message = f"{question.kind.value} asked; this engine applies no masks (see Describe)"
            raise Unsupported(Reason.UNSUPPORTED_MASK, message)
        asked = getattr(question, "deterministic", False)
        if asked and not self._card.capabilities.deterministic:
            message = "deterministic asked; this engine cannot promise it (see Describe); leave it out"
            raise Unsupported(Reason.NOT_IMPLEMENTED, message, field="execution.deterministic")

    async def _stream(self, question: StreamQuestion, deadline: float | None) -> AsyncIterator[StreamEvent]:
        begun = time.monotonic()
        plan = await self._in_thread(_plan_stream, question)
        planned = time.monotonic()
        stream = TokenStream(plan, self._pace.chunk_tokens)
        yield stream.header(self._card.provenance, streams=self._card.capabilities.streams)
        for event in stream.opening():
            yield event
        rows = [planned_row.row for planned_row in plan.rows]
        ticket = self._scheduler.submit(rows, deadline=deadline, deterministic=question.deterministic)
        try:
            async for events in self._paced(stream, ticket):
                for event in events:
                    yield event
        finally:
            ticket.cancel()
        execution = self._execution(ticket, begun, planned - begun, question.deterministic)
        self._metrics.scored_tokens.inc(sum(row.read.rows.size for row in rows))
        usage = Usage(plan.prompt_tokens, execution.computed_tokens)
        yield AnswerSummary(usage, execution, stream.done, stream.failed)

    async def _paced(self, stream: TokenStream, ticket: Ticket) -> AsyncIterator[list[StreamEvent]]:
        """Events as they become complete; half-full chunks when they have waited long enough."""
        oldest: float | None = None
        while not ticket.is_done:
            wait = None if oldest is None else max(0.0, oldest + self._pace.flush_seconds - time.monotonic())
            events: list[StreamEvent] = []
            for delivery in await ticket.take(wait):
                if delivery.problem is not None:
                    events += stream.fail(delivery.row, delivery.problem)
                if delivery.readout is not None:
                    events += stream.push(delivery.row, delivery.readout)
            if oldest is not None and time.monotonic() - oldest >= self._pace.flush_seconds:
                events += stream.flush()
            if not stream.has_pending:
                oldest = None
            elif oldest is None:
                oldest = time.monotonic()
            if events:
                yield events

    async def _next_token(self, question: NextTokenQuestion, deadline: float | None) -> AsyncIterator[NextTokenAnswer]:
        begun = time.monotonic()
        plan = await self._in_thread(plan_next_token, question)
        tokenize_seconds = time.monotonic() - begun
        outcomes, ticket = await self._collect(plan.rows, deadline, question.deterministic)
        execution = self._execution(ticket, begun, tokenize_seconds, question.deterministic)
        results = read_next_token(plan, outcomes, self._context)
        usage = Usage(plan.prompt_tokens, execution.computed_tokens)
        worn = view_receipts((p.variant, outcomes[p.row]) for p in plan.places if p.row is not None)
        yield NextTokenAnswer(results, self._card.provenance, usage, execution, worn)

    async def _score(self, question: ScoreQuestion, deadline: float | None) -> AsyncIterator[ScoreAnswer]:
        begun = time.monotonic()
        plan = await self._in_thread(plan_score, question)
        tokenize_seconds = time.monotonic() - begun
        outcomes, ticket = await self._collect(plan.rows, deadline, question.deterministic)
        execution = self._execution(ticket, begun, tokenize_seconds, question.deterministic)
        usage = Usage(plan.prompt_tokens, execution.computed_tokens)
        worn = view_receipts((p.variant, outcomes[p.row]) for p in plan.places if p.problem is None)
        yield ScoreAnswer(read_score(plan, outcomes), self._card.provenance, usage, execution, worn)

    async def _tokenize(self, question: TokenizeQuestion) -> AsyncIterator[TokenizeAnswer]:
        yield await self._in_thread(answer_tokenize, question)

    async def _explain(self, question: ExplainMaskQuestion) -> AsyncIterator[MaskExplanation]:
        yield await self._in_thread(answer_explain, question)

    async def _keep(self, question: ArtifactQuestion) -> AsyncIterator[ArtifactKept]:
        size = await asyncio.to_thread(self._artifacts.put, question.data, question.digest)
        yield ArtifactKept(question.digest, size)

    async def _preflight(self, question: PreflightQuestion, deadline: float | None) -> AsyncIterator[PreflightAnswer]:
        check_count(len(question.views), self._card.limits, "views", least=1)
        results = []
        for index, view in enumerate(question.views):
            check_variant(Variant(view), self._context, f"views[{index}]")
            outcomes, _ticket = await self._collect([self._sentinel_row(view)], deadline, deterministic=False)
            problem = _judge_sentinel(outcomes[0], view)
            results.append(PreflightResult(problem is None, problem))
        yield PreflightAnswer(tuple(results))

    def _sentinel_row(self, view: View) -> Row:
        tokenizer = self._context.tokenizer
        if tokenizer is None:
            ids = np.arange(min(16, self._card.vocab_size), dtype=np.int32)
        else:
            ids = tokenizer.encode(SENTINEL, special_tokens=True).ids
            ids = ids[ids < self._card.vocab_size]
        ids = ids[: self._card.limits.max_positions]
        rows = np.arange(ids.size, dtype=np.int32)
        return replace(plain_row(ids, Read(rows, targets=ids, top_k=1, tail=True)), view=view)

    async def _collect(
        self, rows: Sequence[Row], deadline: float | None, deterministic: bool
    ) -> tuple[dict[int, Outcome], Ticket]:
        """Wait for all rows."""
        ticket = self._scheduler.submit(rows, deadline=deadline, deterministic=deterministic)
        outcomes = {index: Outcome() for index in range(len(rows))}
        try:
            while not ticket.is_done:
                for delivery in await ticket.take():
                    outcome = outcomes[delivery.row]
                    outcome.problem = outcome.problem or delivery.problem
                    if delivery.readout is not None:
                        outcome.add(delivery.readout)
        finally:
            ticket.cancel()
        return outcomes, ticket

    async def _in_thread(self, plan: Callable[[Q, Context], T], question: Q) -> T:
        """Planning encodes text, which may take long: never on the event loop."""
        return await asyncio.to_thread(plan, question, self._context)

    def _execution(self, ticket: Ticket, begun: float, tokenize_seconds: float, deterministic: bool) -> Execution:
        stats = ticket.stats
        return Execution(
            queue_seconds=stats.queue_seconds,
            tokenize_seconds=tokenize_seconds,
            compute_seconds=stats.compute_seconds,
            total_seconds=time.monotonic() - begun,
            batches=stats.batches,
            computed_tokens=stats.computed_tokens,
            shared_tokens=stats.shared_tokens,
            step_tokens=stats.step_tokens,
            deterministic=deterministic,
            buckets=tuple(sorted(stats.buckets)),
            padded_tokens=stats.padded_tokens,
            server_version=__version__,
        )


def describe_engine(engine: Engine, tokenizer: Tokenizer | None, limits: Limits | None) -> Card:
    """The card of an engine together with its tokenizer."""
    model = engine.card
    questions = [QuestionKind.LOGPROB, QuestionKind.ROLLING_LOGPROB, QuestionKind.NEXT_TOKEN_DIST, QuestionKind.SCORE]
    if tokenizer is not None:
        questions.insert(0, QuestionKind.TOKENIZE)
    if model.capabilities.masks:
        questions += [QuestionKind.MASKED_FORWARD, QuestionKind.EXPLAIN_MASK]
    capabilities = Capabilities(
        questions=tuple(questions),
        text=tokenizer is not None,
        streams=model.capabilities.steps,
        shares_prefixes=model.capabilities.shares_prefixes,
        deterministic=model.capabilities.deterministic,
        masks=model.capabilities.masks,
        views=model.capabilities.views,
    )
    provenance = model.provenance
    if tokenizer is not None:
        provenance = replace(provenance, tokenizer_digest=tokenizer.digest)
    return Card(
        provenance=provenance,
        capabilities=capabilities,
        limits=limits_for(model, limits or Limits(model.max_positions)),
        vocab_size=model.vocab_size,
        layers=model.layers,
        query_heads=model.query_heads,
        kv_heads=model.kv_heads,
        hidden_size=model.hidden_size,
        windows=model.windows,
        buckets=model.buckets,
        bos_token_id=None if tokenizer is None else tokenizer.bos_id,
        eos_token_id=None if tokenizer is None else tokenizer.eos_id,
        tokenizer_prefix_ids=() if tokenizer is None else tokenizer.own_prefix,
        adapters=tuple(name for name, _digest in model.provenance.adapter_digests),
        server_version=__version__,
    )


def _context(card: Card, tokenizer: Tokenizer | None, engine: Engine, artifacts: ArtifactStore) -> Context:
    able = engine.card.capabilities
    return Context(
        card.vocab_size,
        card.limits,
        tokenizer,
        geometry=geometry_of(engine.card) if able.masks else ONE_HEAD,
        masks=able.masks,
        views=able.views,
        contrasts=able.contrasts,
        adapters=card.adapters,
        fetch_array=artifacts.fetch,
    )


def _plan_stream(question: StreamQuestion, context: Context) -> TokenPlan:
    match question:
        case LogprobQuestion():
            return plan_logprob(question, context)
        case RollingQuestion():
            return plan_rolling(question, context)
        case MaskedForwardQuestion():
            return plan_masked_forward(question, context)


def _judge_sentinel(outcome: Outcome, view: View) -> Problem | None:
    """What is wrong with the model's numbers on the sentinel text, or None."""
    if outcome.problem is not None:
        return outcome.problem
    for readout in outcome.readouts:
        if readout.bad_rows:
            row = readout.bad_rows[0]
            message = f"view {view}: the logits hold NaN or infinity at row {row} of the sentinel text"
            message += f"; the first that is not finite is the output of {readout.broken_at}" * bool(readout.broken_at)
            return BadNumbers(Reason.NON_FINITE_LOGITS, message)
        assert readout.logprobs is not None
        assert readout.tail_logprobs is not None
        if not (np.isfinite(readout.logprobs).all() and np.isfinite(readout.tail_logprobs).all()):
            message = f"view {view}: a logprob or tail of the sentinel text is not finite"
            return BadNumbers(Reason.NON_FINITE_LOGITS, message)
    return None
