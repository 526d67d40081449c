"""The JAX sidecar as a process of its own: it serves, in float64 where it is told so, and says what it gets ready."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dualtrace.arrays import FloatArray
from dualtrace.client import BlockingClient, Connection
from dualtrace.engine import Batch, Read, Segment, int_array
from dualtrace.questions.answers import TokenChunk
from dualtrace.questions.asked import Input, RollingQuestion
from tests.support.processes import Process, Processes
from tests.support.tiny import tiny_model, tiny_reference
from tests.support.tolerances import FLOAT32_HIGHEST, FLOAT64

IDS = int_array(np.random.default_rng(8).integers(0, 200, 40).tolist())
SERVE = [sys.executable, "-m", "backend_jax", "--port", "0"]
LISTENING = r"listening on (\S+)"


def serve(processes: Processes, model: Path, *flags: str) -> Process:
    return processes.start([*SERVE, "--model", model, *flags], name="sidecar", ready=LISTENING, timeout_seconds=60)


def answered(process: Process) -> tuple[str, FloatArray]:
    """The number type of the sidecar, and the logprobs of the ids but the first."""
    assert process.ready is not None
    with BlockingClient(Connection(process.ready[1])) as client:
        dtype = client.describe().provenance.dtype
        events = list(client.rolling(RollingQuestion((Input(ids=IDS),)), timeout=60))
    chunks = [event.logprobs for event in events if isinstance(event, TokenChunk)]
    return dtype, np.concatenate(chunks)


def reference() -> FloatArray:
    rows = int_array(range(IDS.size - 1))
    batch = Batch((Segment(IDS, int_array(range(IDS.size))),))
    (readout,) = next(tiny_reference().forward(batch, (Read(rows, IDS[1:]),), lambda _: True))
    assert readout.logprobs is not None
    return readout.logprobs


@pytest.mark.parametrize(
    ("flags", "dtype", "epsilon"),
    [
        ((), "float32", FLOAT32_HIGHEST.abs_epsilon),
        (("--dtype", "float64"), "float64", FLOAT64.abs_epsilon),
    ],
)
def test_it_serves_in_the_number_type_it_was_told(
    processes: Processes, flags: tuple[str, ...], dtype: str, epsilon: float
) -> None:
    said, logprobs = answered(serve(processes, tiny_model(), "--no-warm-up", *flags))
    assert said == dtype
    assert np.abs(logprobs - reference()).max() <= epsilon


def test_it_tells_what_it_warms_up_before_it_listens(processes: Processes) -> None:
    process = serve(processes, tiny_model(max_positions=32))
    lines = process.stderr.splitlines()
    steps = [line for line in lines if line.startswith("warming up ")]
    assert steps[0].startswith(f"warming up 1 of {len(steps)}: ")
    assert lines[lines.index(steps[-1]) + 1].startswith("warmed up in ")


def test_without_warming_up_it_compiles_when_it_is_asked(processes: Processes) -> None:
    process = serve(processes, tiny_model(max_positions=32), "--no-warm-up")
    assert "warming up" not in process.stderr


def test_it_ends_when_it_is_told_to(processes: Processes) -> None:
    process = serve(processes, tiny_model(max_positions=32), "--no-warm-up", "--no-preflight")
    process.send(signal.SIGTERM)
    assert process.wait() == 0


COMPILING = """
import asyncio, sys
from dualtrace.metrics import Metrics
from dualtrace.server import serve
from dualtrace.settings import SidecarSettings

def load(tell):
    import jax, jax.numpy as jnp
    square = jnp.ones((64, 64))
    tell("compiling")
    for count in range(10_000):
        jax.jit(lambda x: sum(jnp.sin(x * i + count) @ x for i in range(40))).lower(square).compile()

announce = lambda message: print(message, file=sys.stderr)
asyncio.run(serve(load, SidecarSettings(port=0), Metrics(), announce))
"""


def test_it_ends_well_when_it_is_told_to_in_the_middle_of_a_compilation(processes: Processes) -> None:
    """An orderly end would break the compiler's threads, and the process with them."""
    process = processes.start([sys.executable, "-c", COMPILING], name="sidecar", ready="compiling", timeout_seconds=60)
    time.sleep(0.5)
    process.send(signal.SIGTERM)
    assert process.wait(10) == 0
    assert process.stderr.endswith("stopped while loading\n")
