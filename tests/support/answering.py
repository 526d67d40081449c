"""Questions answered in one thread, without queue or clock: planned, laid out, run, read back.

It knows the questions and the waist. It must not know schedulers, sockets or any engine's insides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dualtrace.arrays import FloatArray, IntArray
from dualtrace.batching import lay_out
from dualtrace.card import Limits
from dualtrace.engine import Batch, Engine, Live, Read, Readout, Segment, int_array
from dualtrace.fake import FakeEngine, FakeSpec, fake_tokenizer
from dualtrace.problems import Problem
from dualtrace.questions.answers import ItemDone, ItemProblem, NextTokenResult, ScoreResult, TokenChunk
from dualtrace.questions.asked import (
    Input,
    LogprobItem,
    LogprobQuestion,
    NextTokenQuestion,
    RollingQuestion,
    ScoreQuestion,
)
from dualtrace.questions.compose import Context
from dualtrace.questions.logprob import plan_logprob
from dualtrace.questions.next_token import plan_next_token, read_next_token
from dualtrace.questions.outcome import Outcome
from dualtrace.questions.rolling import plan_rolling
from dualtrace.questions.score import plan_score, read_score
from dualtrace.questions.token_plan import TokenPlan
from dualtrace.questions.token_stream import TokenStream
from dualtrace.rows import Row

TOKENIZER = fake_tokenizer()


def text(value: str) -> Input:
    return Input(text=value)


def ids(*values: int) -> Input:
    return Input(ids=int_array(values))


def ask_logprob(*pairs: tuple[Input, Input], **fields: Any) -> LogprobQuestion:
    return LogprobQuestion(tuple(LogprobItem(*pair) for pair in pairs), **fields)


def fake_context(
    *, tokenizer: bool = True, vocab_size: int | None = None, positions: int = 512, **limits: Any
) -> Context:
    """What a question is planned against when the fake engine will answer it."""
    width = TOKENIZER.size if vocab_size is None else vocab_size
    return Context(width, Limits(positions, **limits), TOKENIZER if tokenizer else None)


def fake_engine(**spec: Any) -> FakeEngine:
    return FakeEngine(FakeSpec(**{"vocab": TOKENIZER.size, **spec}))


def wanted(_segment: int) -> bool:
    """Somebody still wants every segment."""
    return True


def run_rows(
    engine: Engine, rows: Sequence[Row], *, share: bool = True, deterministic: bool = False, live: Live = wanted
) -> list[tuple[int, Readout]]:
    """(row, readout) in the order the engine gave them; readouts without a read row are left out, as the queue does."""
    layout = lay_out(rows, share=share, deterministic=deterministic)
    given = []
    for step in engine.forward(layout.batch, layout.reads, live):
        for readout in step:
            row = layout.row_of_segment[readout.segment]
            if row is not None and readout.rows.size:
                given.append((row, readout))
    return given


def forward_alone(engine: Engine, sequence: Sequence[int] | IntArray, read: Read | None = None) -> list[Readout]:
    """One plain row from position 0. Without `read`: every row read, the next token as its target."""
    row = int_array(sequence)
    positions = np.arange(row.size, dtype=np.int32)
    if read is None:
        read = Read(int_array(range(row.size - 1)), targets=row[1:])
    batch = Batch((Segment(row, positions),))
    return [readout for step in engine.forward(batch, (read,), wanted) for readout in step]


def next_logprobs(engine: Engine, sequence: Sequence[int] | IntArray) -> list[float]:
    """log p(sequence[i] | sequence[:i]) for i = 1, 2, ..., by one plain forward."""
    parts = [readout.logprobs for readout in forward_alone(engine, sequence) if readout.logprobs is not None]
    return np.concatenate(parts).tolist() if parts else []


@dataclass
class Scored:
    """The tokens of one item under one variant, put together from its chunks."""

    first_index: int | None = None
    ids: list[int] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    ties: list[int] = field(default_factory=list)
    top_ids: list[list[int]] = field(default_factory=list)
    top_logprobs: list[list[float]] = field(default_factory=list)
    chunk_sizes: list[int] = field(default_factory=list)
    done: ItemDone | None = None
    problem: Problem | None = None

    def add(self, chunk: TokenChunk) -> None:
        assert self.done is None and self.problem is None, "nothing may follow the end of an item"  # noqa: PT018
        if self.first_index is None:
            self.first_index = chunk.first_index
        assert chunk.first_index == self.first_index + len(self.ids), "tokens come once each, in order, without gap"
        self.ids += chunk.tokens.ids.tolist()
        self.pieces += chunk.tokens.pieces
        self.logprobs += chunk.logprobs.tolist()
        self.ranks += chunk.ranks.tolist()
        self.ties += chunk.ties.tolist()
        self.top_ids += [] if chunk.top_ids is None else chunk.top_ids.tolist()
        self.top_logprobs += [] if chunk.top_logprobs is None else chunk.top_logprobs.tolist()
        self.chunk_sizes.append(len(chunk.tokens))


def gather(events: Iterable[Any]) -> dict[tuple[int, int], Scored]:
    """(item, variant) -> its tokens; fails on a token twice, a gap, or anything after an item's end."""
    gathered: dict[tuple[int, int], Scored] = {}
    for event in events:
        if not isinstance(event, TokenChunk | ItemDone | ItemProblem):
            continue
        scored = gathered.setdefault((event.item, event.variant), Scored())
        if isinstance(event, TokenChunk):
            scored.add(event)
            continue
        assert scored.done is None and scored.problem is None, "an item ends once"  # noqa: PT018
        if isinstance(event, ItemDone):
            scored.done = event
        else:
            scored.problem = event.problem
    return gathered


def plan(question: LogprobQuestion | RollingQuestion, context: Context) -> TokenPlan:
    return plan_logprob(question, context) if isinstance(question, LogprobQuestion) else plan_rolling(question, context)


def stream_tokens(made: TokenPlan, given: Iterable[tuple[int, Readout]], chunk_tokens: int = 64) -> list[Any]:
    """All events between header and summary."""
    stream = TokenStream(made, chunk_tokens)
    events: list[Any] = stream.opening()
    for row, readout in given:
        events += stream.push(row, readout)
    return events


def answer_tokens(
    question: LogprobQuestion | RollingQuestion, context: Context, engine: Engine, *, share: bool = True
) -> dict[tuple[int, int], Scored]:
    made = plan(question, context)
    rows = [planned.row for planned in made.rows]
    return gather(stream_tokens(made, run_rows(engine, rows, share=share, deterministic=question.deterministic)))


def collect(engine: Engine, rows: Sequence[Row], *, share: bool = True) -> dict[int, Outcome]:
    """What came of each row that is read at a few places."""
    outcomes = {index: Outcome() for index in range(len(rows))}
    for row, readout in run_rows(engine, rows, share=share):
        outcomes[row].add(readout)
    return outcomes


def answer_next(
    question: NextTokenQuestion, context: Context, engine: Engine, *, share: bool = True
) -> tuple[NextTokenResult, ...]:
    made = plan_next_token(question, context)
    return read_next_token(made, collect(engine, made.rows, share=share), context)


def answer_score(
    question: ScoreQuestion, context: Context, engine: Engine, *, share: bool = True
) -> tuple[ScoreResult, ...]:
    made = plan_score(question, context)
    return read_score(made, collect(engine, made.rows, share=share))


def cut_readout(readout: Readout, first: int, stop: int) -> Readout:
    """Read rows number first .. stop-1 of a readout as a readout of their own."""
    part = slice(first, stop)

    def take(column: Any) -> Any:
        return None if column is None else column[part]

    rows = readout.rows[part]
    return replace(
        readout,
        rows=rows,
        start=int(rows[0]) if rows.size else readout.start,
        stop=int(rows[-1]) + 1 if rows.size else readout.start,
        logprobs=take(readout.logprobs),
        ranks=take(readout.ranks),
        ties=take(readout.ties),
        top_ids=take(readout.top_ids),
        top_logprobs=take(readout.top_logprobs),
        bad_rows=tuple(row for row in readout.bad_rows if row in rows),
    )


def random_row(stream: np.random.Generator, length: int, vocab_size: int) -> IntArray:
    row: IntArray = stream.integers(0, vocab_size, length).astype(np.int32)
    return row


def joined(columns: Iterable[FloatArray | None]) -> FloatArray:
    """The columns of several readouts, one after another."""
    return np.concatenate([column for column in columns if column is not None])
