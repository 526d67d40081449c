"""Clients that are not ours, or die without a word: grpcurl by reflection, and kill -9 in the middle of a stream."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.coordinated import read_metric
from tests.support.processes import Process, Processes, run_command, wait_until

GRPCURL = Path(sys.executable).with_name("grpcurl")
DUALTRACE = [sys.executable, "-m", "dualtrace.cli"]
SERVICE = "dualtrace.v1.ScoringService"


def serve(processes: Processes, spec: str) -> tuple[Process, str]:
    command = [*DUALTRACE, "serve", "fake", "--port", "0", "--spec", spec, "--metrics-port", "0", "--no-preflight"]
    process = processes.start(command, name="sidecar", ready=r"listening on (\S+)")
    assert process.ready is not None
    return process, process.ready[1]


def grpcurl(*arguments: str) -> str:
    done = run_command([GRPCURL, "-plaintext", *arguments])
    return (done.stdout + done.stderr).decode()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A sidecar that nobody harms."""
    with Processes(tmp_path_factory.mktemp("plain")) as started:
        yield serve(started, "")[1]


def test_grpcurl_finds_the_services_by_reflection_and_gets_an_answer(address: str) -> None:
    listed = grpcurl(address, "list")
    assert SERVICE in listed
    assert "grpc.health.v1.Health" in listed
    request = json.dumps({"prompts": [{"text": "Hello"}], "top_k": 2})
    answer = json.loads(grpcurl("-d", request, address, f"{SERVICE}/NextTokenDist"))
    assert len(answer["results"][0]["next"]["top_ids"]) == 2
    streamed = grpcurl("-d", json.dumps({"inputs": [{"text": "Hello"}]}), address, f"{SERVICE}/RollingLogprob")
    assert "item_done" in streamed
    assert "summary" in streamed


def test_grpcurl_is_told_the_reason_and_the_field(address: str) -> None:
    refused = grpcurl("-d", json.dumps({"top_k": -1}), address, f"{SERVICE}/NextTokenDist")
    assert "InvalidArgument" in refused
    assert "OUT_OF_RANGE" in refused
    assert "top_k" in refused


def test_a_client_killed_in_mid_stream_leaves_no_work_in_the_queue(processes: Processes) -> None:
    sidecar, address = serve(processes, "step=20,step_ms=20")
    ids = ",".join(["5"] * 20_000)  # twenty seconds of it
    clients = [
        processes.start([*DUALTRACE, "rolling", f"grpc://{address}", "--ids", ids, "--json"], name=f"client-{number}")
        for number in range(2)
    ]
    # One runs, one waits behind it.
    assert wait_until(lambda: read_metric(sidecar, "dualtrace_computed_tokens_total") > 100, 20), sidecar.tell()
    assert wait_until(lambda: read_metric(sidecar, "dualtrace_batch_rows_count") >= 1, 20)
    for client in clients:
        client.send(signal.SIGKILL)

    def is_idle() -> bool:
        before = read_metric(sidecar, "dualtrace_computed_tokens_total")
        time.sleep(0.2)
        return read_metric(sidecar, "dualtrace_computed_tokens_total") == before

    assert wait_until(is_idle, 10), "the engine went on for a caller that is dead"
    assert read_metric(sidecar, "dualtrace_computed_tokens_total") < 20_000
    assert read_metric(sidecar, "dualtrace_waiting_calls") == 0
    answered = grpcurl("-d", json.dumps({"prompts": [{"text": "a"}]}), address, f"{SERVICE}/NextTokenDist")
    assert "results" in answered
