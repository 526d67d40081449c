"""Clients that are not ours, or die without a word: grpcurl by reflection, and kill -9 in the middle of a stream."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from tests.support.processes import Process, Processes, wait_until

GRPCURL = Path(sys.executable).with_name("grpcurl")
DUALTRACE = [sys.executable, "-m", "dualtrace.cli"]
SERVICE = "dualtrace.v1.ScoringService"


def serve(processes: Processes, spec: str) -> tuple[Process, str]:
    command = [*DUALTRACE, "serve", "fake", "--port", "0", "--spec", spec, "--metrics-port", "0", "--no-preflight"]
    process = processes.start(command, name="sidecar", ready=r"listening on (\S+)")
    assert process.ready is not None
    return process, process.ready[1]


def grpcurl(*arguments: str) -> str:
    done = subprocess.run([GRPCURL, "-plaintext", *arguments], capture_output=True, text=True, timeout=30, check=False)
    return done.stdout + done.stderr


def metric(sidecar: Process, name: str) -> float:
    address = re.search(r"metrics on (\S+)", sidecar.stderr)
    assert address is not None, sidecar.tell()
    with urllib.request.urlopen(address[1], timeout=5) as answer:
        found = re.search(rf"^{name} (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found is not None, f"no metric {name}"
    return float(found[1])


def test_grpcurl_finds_the_services_by_reflection_and_gets_an_answer(processes: Processes) -> None:
    _sidecar, address = serve(processes, "")
    listed = grpcurl(address, "list")
    assert SERVICE in listed
    assert "grpc.health.v1.Health" in listed
    request = json.dumps({"prompts": [{"text": "Hello"}], "top_k": 2})
    answer = json.loads(grpcurl("-d", request, address, f"{SERVICE}/NextTokenDist"))
    assert len(answer["results"][0]["next"]["top_ids"]) == 2
    streamed = grpcurl("-d", json.dumps({"inputs": [{"text": "Hello"}]}), address, f"{SERVICE}/RollingLogprob")
    assert "item_done" in streamed
    assert "summary" in streamed


def test_grpcurl_is_told_the_reason_and_the_field(processes: Processes) -> None:
    _sidecar, address = serve(processes, "")
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
    assert wait_until(lambda: metric(sidecar, "dualtrace_computed_tokens_total") > 100, 20), sidecar.tell()
    assert wait_until(lambda: metric(sidecar, "dualtrace_batch_rows_count") >= 1, 20)
    for client in clients:
        client.send(signal.SIGKILL)

    def is_idle() -> bool:
        before = metric(sidecar, "dualtrace_computed_tokens_total")
        time.sleep(0.2)
        return metric(sidecar, "dualtrace_computed_tokens_total") == before

    assert wait_until(is_idle, 10), "the engine went on for a caller that is dead"
    assert metric(sidecar, "dualtrace_computed_tokens_total") < 20_000
    assert metric(sidecar, "dualtrace_waiting_calls") == 0
    answered = grpcurl("-d", json.dumps({"prompts": [{"text": "a"}]}), address, f"{SERVICE}/NextTokenDist")
    assert "results" in answered
