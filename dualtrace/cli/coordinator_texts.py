"""Questions that need a tokenizer, where only a coordinator's backends have one: label texts, regular expressions.

It knows a coordinator's client and questions as people write them. It must not know sides, plans or how a coordinator
is reached.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from dualtrace.card import Card
from dualtrace.cli.compare_question import QuestionAsked
from dualtrace.coordinator_client import CoordinatorClient
from dualtrace.problems import InvalidArgument, Reason, Unsupported
from dualtrace.questions.answers import AnswerEvent
from dualtrace.questions.asked import ForwardQuestion, Question, TokenizeQuestion

BACKEND = "backend:"


class BackendTokenizer:
    """A backend as the Scorer that labels and expressions ask: it cuts texts, and answers nothing else."""

    def __init__(self, client: CoordinatorClient, backend: str) -> None:
        """`backend`: its bare name; "" where there is none."""
        self._client = client
        self._backend = backend

    async def describe(self) -> Card:
        raise self._refusal()

    async def ask(self, question: Question, *, deadline: float | None = None) -> AsyncIterator[AnswerEvent]:
        if not self._backend:
            message = "label texts and expressions need a tokenizer, and no side is a backend; give ids instead"
            raise InvalidArgument(Reason.CONFLICT, message, field="--label")
        if not isinstance(question, TokenizeQuestion) or any(given.text is None for given in question.inputs):
            raise self._refusal()
        texts = [given.text or "" for given in question.inputs]
        yield await self._client.tokenize(self._backend, texts, deadline=deadline)

    async def close(self) -> None:
        """The client is the caller's."""

    def _refusal(self) -> Unsupported:
        return Unsupported(Reason.NOT_IMPLEMENTED, f"of backend {self._backend} only the tokenizer is asked here")


async def write_out(
    asked: QuestionAsked, client: CoordinatorClient, targets: Sequence[str], deadline: float | None
) -> ForwardQuestion | None:
    """The question as options wrote it, in full. None where no question was written."""
    return None if asked.is_empty else await complete(asked, asked.read(), client, targets, deadline)


async def complete(
    asked: QuestionAsked,
    question: ForwardQuestion,
    client: CoordinatorClient,
    targets: Sequence[str],
    deadline: float | None,
) -> ForwardQuestion:
    """What was read of the options, in full: what needs a tokenizer is asked of the first backend."""
    backend = next((one.removeprefix(BACKEND) for one in targets if one.startswith(BACKEND)), "")
    return await asked.complete(question, BackendTokenizer(client, backend), deadline)
