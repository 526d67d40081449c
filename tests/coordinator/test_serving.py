"""`python -m coordinator` as a process: it says where it listens, ends when told, and refuses what cannot work."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from coordinator.__main__ import main
from dualtrace.client import Connection
from dualtrace.coordinator_client import CoordinatorClient
from tests.support.processes import Process, Processes, wait_until

READY = r"listening on grpc (?P<grpc>\S+) http (?P<http>\S+)"
SECONDS = 60.0


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


def command(data: Path, *more: str) -> list[str]:
    ports = [] if "--port" in more else ["--port", "0"]
    return [sys.executable, "-m", "coordinator", "--data", str(data), *ports, "--http-port", "0", *more]


def start(processes: Processes, data: Path, *more: str) -> Process:
    return processes.start(command(data, *more), name="coordinator", ready=READY, timeout_seconds=SECONDS)


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=SECONDS, check=False)


def addresses(process: Process) -> tuple[str, str]:
    assert process.ready is not None
    return process.ready["grpc"], process.ready["http"]


def test_it_serves_both_faces_where_it_says(processes: Processes, tmp_path: Path) -> None:
    grpc, http = addresses(start(processes, tmp_path / "data", "--backend", "torch=127.0.0.1:1"))

    async def list_names() -> list[str]:
        async with CoordinatorClient(Connection(grpc)) as client:
            return [backend.name for backend in await client.list_backends()]

    with urllib.request.urlopen(f"http://{http}/readyz") as reply:
        assert (asyncio.run(list_names()), reply.status) == (["torch"], 200)


def test_only_where_it_listens_stands_on_standard_output(processes: Processes, tmp_path: Path) -> None:
    process = start(processes, tmp_path / "data")
    assert re.fullmatch(r"listening on grpc \S+ http \S+\n", process.stdout)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_well_when_it_is_told_to_stop(processes: Processes, tmp_path: Path, number: signal.Signals) -> None:
    process = start(processes, tmp_path / "data")
    process.send(number)
    assert (process.wait(), "stopped" in process.stderr) == (0, True)


def test_a_second_coordinator_on_the_same_folder_is_refused(processes: Processes, tmp_path: Path) -> None:
    first = start(processes, tmp_path / "data")
    second = run(command(tmp_path / "data"))
    assert (second.returncode, f"process {first.pid}" in second.stderr) == (2, True)


def test_the_folder_is_free_again_after_a_kill(processes: Processes, tmp_path: Path) -> None:
    first = start(processes, tmp_path / "data")
    first.send(signal.SIGKILL)
    first.wait()
    assert start(processes, tmp_path / "data").running


def test_a_port_that_is_taken_is_named(processes: Processes, tmp_path: Path) -> None:
    grpc, _ = addresses(start(processes, tmp_path / "data"))
    second = run(command(tmp_path / "other", "--port", grpc.rpartition(":")[2]))
    assert (second.returncode, grpc in second.stderr) == (3, True)


def test_it_ends_when_whoever_started_it_is_gone(tmp_path: Path) -> None:
    child = subprocess.Popen(
        command(tmp_path / "data", "--stop-with-stdin"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        assert re.match(READY, child.stdout.readline())
        child.stdin.close()
        assert wait_until(lambda: child.poll() is not None, SECONDS)
        assert child.returncode == 0
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def test_where_it_listens_can_be_read_as_json(processes: Processes, tmp_path: Path) -> None:
    ready = r'"grpc": "(?P<grpc>[^"]+)"'
    process = processes.start(command(tmp_path / "data", "--json"), ready=ready, timeout_seconds=SECONDS)
    assert set(json.loads(process.stdout)) == {"kind", "grpc", "http"}


@pytest.mark.parametrize(
    "wrong",
    [["--backend", "torch"], ["--backend", "torch=nowhere"], ["--drain-seconds", "-1"], ["--token-file", "/nowhere"]],
    ids=["no address", "no port", "a negative time", "no token file"],
)
def test_what_cannot_work_ends_with_2(tmp_path: Path, wrong: list[str]) -> None:
    assert CliRunner().invoke(main, command(tmp_path / "data", *wrong)[3:]).exit_code == 2


def test_its_settings_can_be_looked_at(tmp_path: Path) -> None:
    arguments = command(tmp_path / "data", "--backend", "torch=127.0.0.1:1", "--print-config")[3:]
    assert "backends.torch = 127.0.0.1:1" in CliRunner().invoke(main, arguments).output
