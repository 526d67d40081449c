"""The upper seam: anything that answers questions about text.

A `Scorer` describes itself and answers a question as a series of events. The sidecar serves any Scorer, the client
is one, and whoever compares two sides consumes any two. It must not know the wire, processes or how engines work.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol, overload

from dualtrace.card import Card
from dualtrace.problems import Internal, Reason
from dualtrace.questions.answers import (
    AnswerEvent,
    ArtifactKept,
    MaskExplanation,
    NextTokenAnswer,
    PreflightAnswer,
    ScoreAnswer,
    TokenizeAnswer,
    UnaryAnswer,
)
from dualtrace.questions.asked import (
    ArtifactQuestion,
    ExplainMaskQuestion,
    NextTokenQuestion,
    PreflightQuestion,
    Question,
    ScoreQuestion,
    TokenizeQuestion,
)


class Scorer(Protocol):
    """Something that scores. Answers are given as `questions.answers` says."""

    async def describe(self) -> Card: ...

    def ask(self, question: Question, *, deadline: float | None = None) -> AsyncIterator[AnswerEvent]:
        """The events of the answer. `deadline` is on the clock of time.monotonic; None waits for ever.

        Leaving the iterator (aclose, cancellation) drops what is still to be computed.
        """
        ...

    async def close(self) -> None: ...


@overload
async def ask_one(scorer: Scorer, question: NextTokenQuestion, *, deadline: float | None = None) -> NextTokenAnswer: ...
@overload
async def ask_one(scorer: Scorer, question: ScoreQuestion, *, deadline: float | None = None) -> ScoreAnswer: ...
@overload
async def ask_one(scorer: Scorer, question: TokenizeQuestion, *, deadline: float | None = None) -> TokenizeAnswer: ...
@overload
async def ask_one(scorer: Scorer, question: PreflightQuestion, *, deadline: float | None = None) -> PreflightAnswer: ...
@overload
async def ask_one(
    scorer: Scorer, question: ExplainMaskQuestion, *, deadline: float | None = None
) -> MaskExplanation: ...
@overload
async def ask_one(scorer: Scorer, question: ArtifactQuestion, *, deadline: float | None = None) -> ArtifactKept: ...
async def ask_one(scorer: Scorer, question: Question, *, deadline: float | None = None) -> UnaryAnswer:
    """Ask a question whose answer is one event."""
    answer: UnaryAnswer | None = None
    async for event in scorer.ask(question, deadline=deadline):
        assert isinstance(event, UnaryAnswer), "a streamed question was asked with ask_one"
        answer = event
    if answer is None:
        raise Internal(Reason.BUG, "the scorer ended without an answer")
    return answer
