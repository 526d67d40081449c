"""One caller over gRPC, with a clock: the whole call as its caller sees it, and what came back.

It knows the client. It must not know shapes or engines.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dualtrace.client import Client, Connection
from dualtrace.questions.answers import AnswerSummary, Execution, ItemDone, ItemProblem, TokenChunk
from dualtrace.questions.asked import Question, StreamQuestion


@dataclass
class Answer:
    """What the last call of a question brought."""

    seconds: float = 0.0
    totals: dict[tuple[int, int], float] = field(default_factory=dict)  # (item, variant) -> sum of logprobs, nats
    kl: dict[tuple[int, int], float] = field(default_factory=dict)  # the same for KL(base || masked), where asked
    execution: Execution = field(default_factory=Execution)

    def sums(self) -> list[float]:
        """By item, then variant."""
        return [self.totals[key] for key in sorted(self.totals)]


class Caller:
    """Asks one sidecar, one question at a time."""

    def __init__(self, client: Client, runner: asyncio.Runner) -> None:
        self._client = client
        self._runner = runner

    def ask(self, question: StreamQuestion) -> Answer:
        return self._runner.run(self._ask(question))

    def seconds(self, question: Question) -> float:
        """The whole call of any question, its answer thrown away."""
        return self._runner.run(self._drain(question))

    async def _ask(self, question: StreamQuestion) -> Answer:
        answer = Answer()
        begun = time.perf_counter()
        async for event in self._client.ask(question):
            match event:
                case ItemProblem():
                    raise event.problem
                case TokenChunk(item=item, variant=variant) if event.kl_base_masked is not None:
                    key = (item, variant)
                    answer.kl[key] = answer.kl.get(key, 0.0) + float(event.kl_base_masked.sum())
                case ItemDone():
                    answer.totals[event.item, event.variant] = event.total_logprob or 0.0
                case AnswerSummary():
                    answer.execution = event.execution
        answer.seconds = time.perf_counter() - begun
        return answer

    async def _drain(self, question: Question) -> float:
        begun = time.perf_counter()
        async for _event in self._client.ask(question):
            pass
        return time.perf_counter() - begun


@contextmanager
def caller(address: str) -> Iterator[Caller]:
    with asyncio.Runner() as runner:
        client = runner.run(_connect(address))
        try:
            yield Caller(client, runner)
        finally:
            runner.run(client.close())


async def _connect(address: str) -> Client:
    return Client(Connection(address))
