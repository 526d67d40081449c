"""The command line as real processes: serving, asking, dying in every way, and leaving nobody behind."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dualtrace.runs.run import read_run
from tests.support.coordinated import count_steps
from tests.support.processes import Process, Processes, list_group, run_command, wait_until
from tests.support.tiny import tiny_model

DUALTRACE = [sys.executable, "-m", "dualtrace.cli"]
LISTENING = r"listening on (\S+)"
SLOW = "step=1,step_ms=100"
IDS = ",".join(["5"] * 400)  # forty seconds of it


def serve(processes: Processes, *arguments: str | Path, engine: str = "fake") -> tuple[Process, str]:
    """A running sidecar and its target."""
    command = [*DUALTRACE, "serve", engine, "--port", "0", "--no-preflight", *arguments]
    process = processes.start(command, name="sidecar", ready=LISTENING)
    assert process.ready is not None
    return process, f"grpc://{process.ready[1]}"


def call(*arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    return run_command([*DUALTRACE, *arguments])


def call_json(*arguments: str | Path) -> Any:
    done = call(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def serve_slowly(processes: Processes, *arguments: str, spec: str = SLOW) -> tuple[Process, str]:
    return serve(processes, "--spec", spec, "--metrics-port", "0", "--chunk-tokens", "1", *arguments)


def ask_slowly(processes: Processes, sidecar: Process, target: str, ids: str = IDS) -> Process:
    """A client that is in the middle of an answer when this returns."""
    client = processes.start([*DUALTRACE, "rolling", target, "--ids", ids, "--json"], name="client")
    assert wait_until(lambda: count_steps(sidecar) > 2, 20), client.tell()
    return client


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, str]]:
    """A sidecar that nobody harms, and its target."""
    with Processes(tmp_path_factory.mktemp("plain")) as started:
        yield serve(started)


@pytest.fixture(scope="module")
def plain_target(plain: tuple[Process, str]) -> str:
    return plain[1]


def test_what_listens_is_told_on_standard_output_alone(plain: tuple[Process, str]) -> None:
    process, target = plain
    assert process.stdout == f"listening on {target.removeprefix('grpc://')}\n"
    assert "loaded in" in process.stderr


@pytest.mark.parametrize("engine", ["fake", "reference"])
def test_a_sidecar_answers_as_the_engine_in_process_does(processes: Processes, plain_target: str, engine: str) -> None:
    model = tiny_model()
    target = plain_target if engine == "fake" else serve(processes, "--model", model, engine=engine)[1]
    asked = ["--text", "The answer is 🙂.", "--top-k", "3"]
    remote = call_json("rolling", target, *asked)
    local = call_json("rolling", f"reference:{model}" if engine == "reference" else "fake:", *asked)
    assert remote["items"] == local["items"]
    assert remote["identity"] == local["identity"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["describe"],
        ["health"],
        ["tokenize", "--text", "one two"],
        ["logprob", "--prompt", "one", "--completion", " two", "--top-k", "2"],
        ["next", "--prompt", "one"],
        ["score", "--query", "q", "--item", "a", "--labels", "5,6"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_question_is_answered_over_the_socket(plain_target: str, arguments: list[str]) -> None:
    done = call(arguments[0], plain_target, *arguments[1:])
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_sidecar_that_is_told_to_stop_ends_well(processes: Processes, number: signal.Signals) -> None:
    process, _ = serve(processes)
    process.send(number)
    assert process.wait() == 0
    assert process.stderr.endswith("stopped\n")
    assert "Traceback" not in process.stderr


def test_a_running_call_ends_before_its_sidecar_does(processes: Processes) -> None:
    process, target = serve_slowly(processes)
    client = ask_slowly(processes, process, target, ids=",".join(["5"] * 15))
    process.send(signal.SIGTERM)
    assert client.wait() == 0
    assert read_run(client.stdout).complete


def test_a_second_signal_does_not_wait_for_running_calls(processes: Processes) -> None:
    process, target = serve_slowly(processes)
    client = ask_slowly(processes, process, target)
    process.send(signal.SIGTERM)
    assert wait_until(lambda: "draining" in process.stderr, 5)
    process.send(signal.SIGTERM)
    process.wait(5)
    assert client.wait() == 3


def test_a_sidecar_killed_in_the_middle_ends_its_client_with_3_and_what_had_come(processes: Processes) -> None:
    process, target = serve_slowly(processes)
    client = ask_slowly(processes, process, target)
    process.send(signal.SIGKILL)
    assert client.wait() == 3
    assert "Traceback" not in client.stderr
    assert read_run(client.stdout).complete is False


def test_a_sidecar_that_drains_refuses_new_calls_with_3(processes: Processes) -> None:
    process, target = serve_slowly(processes)
    ask_slowly(processes, process, target)
    process.send(signal.SIGTERM)
    assert wait_until(lambda: "draining" in process.stderr, 5)
    assert call("next", target, "--prompt", "a").returncode == 3


def test_health_ends_with_3_when_nobody_is_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        done = call("health", f"grpc://127.0.0.1:{taken.getsockname()[1]}")
    assert (done.returncode, done.stdout) == (3, b"")


def test_a_port_that_is_taken_is_named_and_leaves_no_traceback(plain_target: str) -> None:
    port = plain_target.rsplit(":", 1)[1]
    done = call("serve", "fake", "--port", port)
    assert done.returncode == 3
    assert port.encode() in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_model_whose_numbers_are_bad_never_listens() -> None:
    done = call("serve", "fake", "--port", "0", "--spec", "nan_at=1")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"NON_FINITE_LOGITS" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_sidecar_told_to_stops_with_its_standard_input() -> None:
    done = call("serve", "fake", "--port", "0", "--stop-with-stdin")  # which is empty here
    assert b"Fatal" not in done.stderr
    assert done.returncode in {0, -signal.SIGTERM}  # stopped while serving, or before it did


def test_a_token_is_needed_where_the_sidecar_has_a_token_file(processes: Processes, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("letmein\n")
    _, target = serve(processes, "--token-file", tokens)
    assert call("next", target, "--prompt", "a").returncode == 2
    assert call("next", target, "--prompt", "a", "--token-file", tokens).returncode == 0


def test_ctrl_c_ends_a_client_in_the_middle_with_130_and_one_word(processes: Processes) -> None:
    sidecar, target = serve_slowly(processes)
    client = ask_slowly(processes, sidecar, target)
    client.send(signal.SIGINT)
    assert client.wait(5) == 130
    assert (client.stdout, client.stderr) == ("", "interrupted\n")


def test_ctrl_c_does_not_wait_for_the_step_of_an_engine_in_our_own_process(processes: Processes) -> None:
    client = processes.start([*DUALTRACE, "rolling", "fake:step=1,step_ms=30000", "--ids", IDS], name="client")
    time.sleep(2)  # it says nothing while it computes
    client.send(signal.SIGINT)
    assert client.wait(5) == 130
    assert client.stderr == "interrupted\n"


@pytest.mark.parametrize("form", [["--json"], []], ids=["json", "table"])
def test_a_reader_that_leaves_early_is_no_failure_to_talk_about(form: list[str]) -> None:
    words = " ".join(["word"] * 1_500)
    command = [*DUALTRACE, "tokenize", "fake:", "--file", "-", *form]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(words.encode())
        process.stdin.close()
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == 141


def test_output_in_a_narrow_encoding_does_not_fail() -> None:
    command = [*DUALTRACE, "tokenize", "fake:", "--text", "é a"]
    done = run_command(command, environ={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert done.stdout.isascii()


def test_nothing_is_coloured_where_nobody_looks() -> None:
    assert b"\x1b" not in call("rolling", "fake:", "--text", "one two").stdout


QUICK_ENGINES = ("--engines", "reference,reference")


def demo_group(processes: Processes) -> tuple[Process, list[int]]:
    """A demo whose sidecars run; their process groups."""
    demo = processes.start([*DUALTRACE, "demo", "--model", tiny_model(), *QUICK_ENGINES], name="demo")
    children: list[int] = []

    def found() -> bool:
        children[:] = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and parent_of(entry) == demo.pid
        ]
        return bool(children)

    assert wait_until(found, 10), demo.tell()
    return demo, children


def parent_of(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0


def test_the_demo_compares_over_real_processes_and_ends_them() -> None:
    done = call("demo", "--model", tiny_model(), *QUICK_ENGINES)
    assert done.returncode == 0, done.stderr
    for word in ("verdict: PASS", "verdict: FAIL", "name: capitals", "PASS  capitals", "where the second document"):
        assert word.encode() in done.stdout
    assert b"have been stopped" in done.stderr


def test_the_demo_as_json_holds_its_reports_and_its_case(tmp_path: Path) -> None:
    saved = tmp_path / "capitals.yaml"
    found = call_json("demo", "--model", tiny_model(), *QUICK_ENGINES, "--save", saved)
    assert [report["verdict"] for report in found["comparisons"]] == ["PASS", "FAIL"]
    assert found["case_report"]["verdict"] == "PASS"
    assert saved.read_text() == found["case"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_demo_that_is_ended_leaves_no_sidecar_behind(processes: Processes, number: signal.Signals) -> None:
    demo, children = demo_group(processes)
    demo.send(number)
    code = demo.wait(20)
    assert wait_until(lambda: not any(list_group(child) for child in children), 10)
    assert code == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in demo.stderr


def test_a_demo_without_a_usable_model_says_what_the_sidecar_said(tmp_path: Path) -> None:
    done = call("demo", "--model", tmp_path, *QUICK_ENGINES)
    assert done.returncode == 3
    assert b"ended before it was ready" in done.stderr
    assert b"Traceback" not in done.stderr
