"""What the wire costs: 4,096 scored tokens streamed from the fake engine in a sidecar process of its own."""

from __future__ import annotations

import asyncio
import statistics
import time

from benchmarks.sidecars import sidecar
from benchmarks.table import Row, spread
from dualtrace.client import Client, Connection
from dualtrace.engine import int_array
from dualtrace.questions.answers import AnswerSummary, TokenChunk
from dualtrace.questions.asked import Input, RollingQuestion

TOKENS = 4096
REPEATS = 30


async def _stream(address: str) -> tuple[list[float], list[float], list[float], int]:
    """Per repeat: seconds of the whole call, of the engine inside it, to the first token; and chunks of one."""
    question = RollingQuestion((Input(ids=int_array([i % 50 for i in range(TOKENS + 1)])),))
    whole, inside, first = [], [], []
    chunks = 0
    async with Client(Connection(address)) as client:
        for number in range(REPEATS + 3):
            begun = time.perf_counter()
            first_token = chunks = 0
            compute = 0.0
            async for event in client.rolling(question):
                if isinstance(event, TokenChunk):
                    chunks += 1
                    first_token = first_token or time.perf_counter() - begun  # type: ignore[assignment]
                elif isinstance(event, AnswerSummary):
                    compute = event.execution.compute_seconds
            if number >= 3:
                whole.append(time.perf_counter() - begun)
                inside.append(compute)
                first.append(first_token)
    return sorted(whole), sorted(inside), sorted(first), chunks


def measure() -> list[Row]:
    with sidecar("fake", "--spec", "vocab=64") as started:
        whole, inside, first, chunks = asyncio.run(_stream(started.address))
    wire = statistics.median(whole) - statistics.median(inside)
    shape = f"{TOKENS} tokens, {chunks} chunks"
    return [
        Row("stream, whole call", shape, spread(whole), "", "client, wire, server and fake engine"),
        Row("stream, fake engine alone", shape, spread(inside)),
        Row("stream, on the wire", shape, f"{wire * 1e3:.1f} ms", "< 15 ms", "whole call less engine, medians"),
        Row("stream, first token", shape, spread(first)),
    ]
