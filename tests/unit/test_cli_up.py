"""`dualtrace up`: everything starts, one Ctrl-C ends everything, and nothing outlives it however it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from dualtrace.cli import main
from dualtrace.cli.up import _choose
from dualtrace.engine_registry import FRAMEWORKS
from tests.support.processes import Process, Processes, wait_until

SECONDS = 60.0
UP = [sys.executable, "-m", "dualtrace.cli", "up"]


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path, grace_seconds=8) as started:
        yield started


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One that is only looked at."""
    folder = tmp_path_factory.mktemp("up")
    with Processes(folder, grace_seconds=8) as started:
        yield start(started, folder)


def start(processes: Processes, folder: Path, *more: str) -> Process:
    """Up over the fake engine, when it has said that all is ready."""
    command = [*UP, "--engines", "fake", "--port", "0", "--http-port", "0", "--data", str(folder / "data"), *more]
    return processes.start(command, name="up", ready=r"(?s)Ctrl-C stops|dualtrace\.up", timeout_seconds=SECONDS)


def children(process: Process) -> list[int]:
    """The processes it said it started."""
    return [int(found) for found in re.findall(r"\(process (\d+)\)", process.stderr)]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state not in {"Z", "X"}


def all_gone(pids: list[int]) -> bool:
    return len(pids) == 2 and wait_until(lambda: not any(map(is_alive, pids)), 15)


def test_everything_it_names_is_there(running: Process) -> None:
    address = re.search(r"http://(\S+)", running.stdout)
    assert address is not None
    request = urllib.request.Request(
        f"{address[0]}/dualtrace.v1.LibraryService/ListBackends", b"{}", {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        assert [backend["name"] for backend in json.load(reply)["backends"]] == ["fake"]


def test_it_names_a_first_command(running: Process) -> None:
    assert re.search(r"try:\n  dualtrace \w+", running.stdout)


def test_where_everything_is_can_be_read_as_json(processes: Processes, tmp_path: Path) -> None:
    document = json.loads(start(processes, tmp_path, "--json").stdout)
    assert (document["kind"], set(document["backends"])) == ("dualtrace.up", {"fake"})


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_one_signal_ends_everything_well(processes: Processes, tmp_path: Path, number: signal.Signals) -> None:
    process = start(processes, tmp_path)
    pids = children(process)
    process.send(number)
    assert (process.wait(), all_gone(pids)) == (0, True)


def test_nothing_outlives_a_kill(processes: Processes, tmp_path: Path) -> None:
    process = start(processes, tmp_path)
    pids = children(process)
    process.send(signal.SIGKILL)
    process.wait()
    assert all_gone(pids)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["fake sidecar", "coordinator"])
def test_a_child_that_dies_is_named_and_ends_the_rest(processes: Processes, tmp_path: Path, victim: int) -> None:
    process = start(processes, tmp_path)
    pids = children(process)
    os.kill(pids[victim], signal.SIGKILL)
    name = ["the fake sidecar ended by itself", "the coordinator ended by itself"][victim]
    assert (process.wait(), name in process.stderr, all_gone(pids)) == (3, True, True)


def test_a_child_that_cannot_start_ends_the_rest(tmp_path: Path) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    command = [*UP, "--engines", "fake,reference", "--model", str(broken), "--port", "0", "--http-port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (done.returncode, "the reference sidecar ended before it was ready" in done.stderr) == (3, True)


@pytest.mark.parametrize(
    "wrong",
    [["--engines", "nothing"], ["--engines", "fake,fake"], ["--engines", "reference"]],
    ids=["an unknown engine", "an engine twice", "no model"],
)
def test_what_cannot_work_is_refused_before_anything_starts(wrong: list[str]) -> None:
    result = CliRunner().invoke(main, ["up", *wrong])
    assert (result.exit_code, "starting" in result.output) == (2, False)


def test_the_installed_engines_are_started_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualtrace.engine_registry.find_spec", lambda name: None if name == "jax" else name)
    assert _choose(None) == ("torch",)


def test_without_an_installed_engine_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualtrace.engine_registry.find_spec", lambda _name: None)
    result = CliRunner().invoke(main, ["up", "--model", "."])
    assert (result.exit_code, all(name in result.output for name in FRAMEWORKS)) == (2, True)
