"""ScoringService over any Scorer: translates, times, cuts deadlines, and answers failures in one way.

It knows the wire and a Scorer. It must not know engines, batching or how numbers come about.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf.message import Message
from grpc_status import rpc_status

from dualtrace.metrics import Metrics, ProcessMetrics
from dualtrace.problems import Internal, Problem, Reason, Unavailable
from dualtrace.questions.answers import StreamEvent
from dualtrace.questions.asked import StreamQuestion
from dualtrace.scorer import Scorer, ask_one
from dualtrace.v1 import scoring_pb2 as pb
from dualtrace.v1 import scoring_pb2_grpc
from dualtrace.wire import answers, events, questions
from dualtrace.wire.artifact import artifact_from_pb
from dualtrace.wire.model import card_to_pb
from dualtrace.wire.problem import to_status
from dualtrace.wire.strict import refuse_unknown

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["ScoringService"].full_name

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Message)
E = TypeVar("E", pb.LogprobResponse, pb.RollingLogprobResponse, pb.MaskedForwardResponse)


def register(server: grpc.aio.Server, servicer: ScoringServicer) -> None:
    scoring_pb2_grpc.add_ScoringServiceServicer_to_server(servicer, server)


class Readiness:
    """Whether calls are accepted. Set by whoever serves; Describe is answered always."""

    def __init__(self, metrics: ProcessMetrics, why_not_yet: str = "the model is still being checked") -> None:
        self._metrics = metrics
        self.refusal: Problem | None = Unavailable(Reason.NOT_READY, f"{why_not_yet}; retry soon")

    def accept(self) -> None:
        self.refusal = None
        self._metrics.ready.set(1)

    def refuse(self, problem: Problem) -> None:
        self.refusal = problem
        self._metrics.ready.set(0)


class ScoringServicer(scoring_pb2_grpc.ScoringServiceServicer):
    """The service. Every method is the same few steps: accept, translate, ask, translate back."""

    def __init__(self, scorer: Scorer, readiness: Readiness, metrics: Metrics) -> None:
        self._scorer = scorer
        self._readiness = readiness
        self._metrics = metrics

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:  # noqa: N802
        async def answer(_deadline: float | None) -> pb.DescribeResponse:
            refuse_unknown(request)
            return pb.DescribeResponse(card=card_to_pb(await self._scorer.describe()))

        return await self._unary("Describe", context, answer, always=True)

    async def Preflight(self, request: pb.PreflightRequest, context: Context) -> pb.PreflightResponse:  # noqa: N802
        async def answer(deadline: float | None) -> pb.PreflightResponse:
            question = questions.preflight_from_pb(request)
            return answers.preflight_to_pb(await ask_one(self._scorer, question, deadline=deadline))

        return await self._unary("Preflight", context, answer, always=True)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:  # noqa: N802
        async def answer(deadline: float | None) -> pb.TokenizeResponse:
            question = questions.tokenize_from_pb(request)
            return answers.tokenize_to_pb(await ask_one(self._scorer, question, deadline=deadline))

        return await self._unary("Tokenize", context, answer)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:  # noqa: N802
        async def answer(deadline: float | None) -> pb.ScoreResponse:
            question = questions.score_from_pb(request)
            return answers.score_to_pb(await ask_one(self._scorer, question, deadline=deadline))

        return await self._unary("Score", context, answer)

    async def NextTokenDist(  # noqa: N802
        self, request: pb.NextTokenDistRequest, context: Context
    ) -> pb.NextTokenDistResponse:
        async def answer(deadline: float | None) -> pb.NextTokenDistResponse:
            question = questions.next_token_from_pb(request)
            return answers.next_token_to_pb(await ask_one(self._scorer, question, deadline=deadline))

        return await self._unary("NextTokenDist", context, answer)

    # The streams write to the context instead of yielding: then a cancelled call is cancelled inside our code, also
    # while it waits for a slow reader, and its work is dropped at once.

    async def Logprob(self, request: pb.LogprobRequest, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        await self._stream("Logprob", context, lambda: questions.logprob_from_pb(request), pb.LogprobResponse)

    async def RollingLogprob(  # type: ignore[override]  # noqa: N802
        self, request: pb.RollingLogprobRequest, context: Context
    ) -> None:
        await self._stream(
            "RollingLogprob", context, lambda: questions.rolling_from_pb(request), pb.RollingLogprobResponse
        )

    async def MaskedForward(  # type: ignore[override]  # noqa: N802
        self, request: pb.MaskedForwardRequest, context: Context
    ) -> None:
        await self._stream(
            "MaskedForward", context, lambda: questions.masked_forward_from_pb(request), pb.MaskedForwardResponse
        )

    async def ExplainMask(self, request: pb.ExplainMaskRequest, context: Context) -> pb.ExplainMaskResponse:  # noqa: N802
        async def answer(deadline: float | None) -> pb.ExplainMaskResponse:
            question = questions.explain_from_pb(request)
            return answers.explanation_to_pb(await ask_one(self._scorer, question, deadline=deadline))

        return await self._unary("ExplainMask", context, answer)

    async def PutArtifact(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.PutArtifactRequest], context: Context
    ) -> pb.PutArtifactResponse:
        async def answer(deadline: float | None) -> pb.PutArtifactResponse:
            question = await artifact_from_pb(request_iterator)
            kept = await ask_one(self._scorer, question, deadline=deadline)
            return pb.PutArtifactResponse(digest=kept.digest, size_bytes=kept.size_bytes)

        return await self._unary("PutArtifact", context, answer)

    async def _unary(
        self, method: str, context: Context, answer: Callable[[float | None], Awaitable[R]], *, always: bool = False
    ) -> R:
        begun = time.monotonic()
        code = "OK"
        try:
            if self._readiness.refusal is not None and not always:
                raise self._readiness.refusal
            return await answer(_deadline(context))
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except Exception as error:
            problem = as_problem(error)
            code = problem.code_name
            await context.abort_with_status(rpc_status.to_status(to_status(problem)))
            raise AssertionError("abort raises") from error
        finally:
            self._metrics.calls.labels(method=method, code=code).inc()
            self._metrics.call_seconds.labels(method=method).observe(time.monotonic() - begun)

    async def _stream(
        self, method: str, context: Context, question: Callable[[], StreamQuestion], response: type[E]
    ) -> None:
        begun = time.monotonic()
        code = "CANCELLED"  # unless we come to an end of our own
        try:
            if self._readiness.refusal is not None:
                raise self._readiness.refusal
            answer = self._scorer.ask(question(), deadline=_deadline(context))
            try:
                sequence = 0
                async for event in answer:
                    assert isinstance(event, StreamEvent)
                    await context.write(response(event=events.event_to_pb(event, sequence)))
                    sequence += 1
            finally:
                await _close(answer)
            code = "OK"
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - the one place where failures become statuses
            problem = as_problem(error)
            code = problem.code_name
            await context.abort_with_status(rpc_status.to_status(to_status(problem)))
        finally:
            self._metrics.calls.labels(method=method, code=code).inc()
            self._metrics.call_seconds.labels(method=method).observe(time.monotonic() - begun)


def as_problem(error: Exception) -> Problem:
    """A Problem as it is; anything else is our fault, and says no more than its kind to the network."""
    if isinstance(error, Problem):
        return error
    log.error("a call failed", exc_info=error)
    return Internal(Reason.BUG, f"the server failed with {type(error).__name__}; its log has the details")


def _deadline(context: Context) -> float | None:
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


async def _close(events: AsyncIterator[object]) -> None:
    close = getattr(events, "aclose", None)
    if close is not None:
        await close()
