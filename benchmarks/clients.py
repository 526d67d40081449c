"""Sixteen callers at once, each with its next request as soon as the last is answered, against one caller."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from benchmarks import shapes
from benchmarks.quiet import rounds, tell_others
from benchmarks.sidecars import model_sidecar
from benchmarks.table import Missing, Row, ratio, spread
from dualtrace.client import Client, Connection
from dualtrace.questions.asked import LogprobQuestion

REPEATS = 4
CALLERS = 16
REQUESTS = 48


def measure() -> list[Row]:
    rows: list[Row] = []
    requests = shapes.short_requests(6, REQUESTS)
    shape = f"{REQUESTS} requests of 70-130 tokens, 16 scored"
    for engine in ("torch", "jax"):
        try:
            with model_sidecar(engine) as sidecar:
                address = sidecar.address
                figures = rounds(
                    {
                        "serial": lambda: asyncio.run(_answer_all(address, requests, 1)),  # noqa: B023 - run at once
                        "together": lambda: asyncio.run(_answer_all(address, requests, CALLERS)),  # noqa: B023
                    },
                    REPEATS,
                )
        except Missing as reason:
            rows.append(Row(f"{CALLERS} callers, {engine}", shape, "not measured", note=str(reason)))
            continue
        note = f"one caller {spread(figures['serial'], 's', 1)}; {tell_others(figures)}"
        rows.append(Row(f"{CALLERS} callers, {engine}", shape, spread(figures["together"], "s", 1), note=note))
        target = ">= 1.3" if engine == "torch" else ""
        rows.append(Row("  one caller over 16", "", ratio(figures["serial"], figures["together"]), target))
    return rows


async def _answer_all(address: str, requests: Sequence[LogprobQuestion], callers: int) -> float:
    waiting = iter(requests)

    async def call() -> None:
        async with Client(Connection(address)) as client:
            for request in waiting:
                async for _event in client.logprob(request):
                    pass

    begun = time.perf_counter()
    await asyncio.gather(*(call() for _ in range(callers)))
    return time.perf_counter() - begun
