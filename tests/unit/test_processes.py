"""The process harness reaps everything, however a test ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import NotReadyError, Processes, list_group, run_command, wait_until

ROOT = Path(__file__).parents[2]
SHELL = "/bin/sh"


def test_everything_a_process_started_ends_with_the_block(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        process = processes.start([SHELL, "-c", "sleep 60 & echo up; sleep 60"], ready="^up$")
        assert len(list_group(process.pid)) >= 2
    assert list_group(process.pid) == []


def test_a_process_that_will_not_listen_is_killed(tmp_path: Path) -> None:
    with Processes(tmp_path, grace_seconds=0.2) as processes:
        process = processes.start([SHELL, "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done"], ready="^up$")
    assert process.popen.returncode == -signal.SIGKILL


def test_a_child_that_outlives_its_parent_is_reaped(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        process = processes.start([SHELL, "-c", "sleep 60 & echo left"], ready="^left$")
        assert process.wait(5) == 0
    assert list_group(process.pid) == []


def test_everything_ends_when_the_block_fails(tmp_path: Path) -> None:
    processes = Processes(tmp_path)

    def fail_inside() -> None:
        with processes:
            processes.start([SHELL, "-c", "sleep 60"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert list_group(processes.started[0].pid) == []


def test_everything_ends_when_a_later_process_is_not_ready(tmp_path: Path) -> None:
    processes = Processes(tmp_path)

    def start_two() -> None:
        with processes:
            processes.start([SHELL, "-c", "sleep 60"])
            processes.start([SHELL, "-c", "sleep 60"], ready="never", timeout_seconds=0.1)

    with pytest.raises(NotReadyError):
        start_two()
    assert [list_group(process.pid) for process in processes.started] == [[], []]


def test_a_process_that_ends_early_tells_what_it_said(processes: Processes) -> None:
    with pytest.raises(NotReadyError, match="no such model"):
        processes.start([SHELL, "-c", "echo no such model >&2; exit 3"], ready="^listening")


def test_a_command_that_takes_too_long_is_ended_with_what_it_started() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_command([SHELL, "-c", "sleep 61.5 & sleep 61.5"], timeout_seconds=0.2)
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "sleep 61.5" not in running.splitlines()


def test_the_ready_line_gives_its_groups(processes: Processes) -> None:
    process = processes.start([SHELL, "-c", "echo listening on 4711 >&2; sleep 60"], ready=r"^listening on (\d+)$")
    assert process.ready is not None
    assert process.ready[1] == "4711"


def test_a_port_is_waited_for(processes: Processes) -> None:
    code = "import socket, time; s = socket.create_server(('127.0.0.1', 0))\n"
    code += "print(s.getsockname()[1], flush=True); time.sleep(60)"
    first = processes.start([sys.executable, "-I", "-c", code], ready=r"^(\d+)$")
    assert first.ready is not None
    second = processes.start([SHELL, "-c", "sleep 60"], port=int(first.ready[1]), timeout_seconds=5)
    assert second.running


def test_a_port_nobody_opens_is_not_ready(processes: Processes) -> None:
    with pytest.raises(NotReadyError, match="not ready after"):
        processes.start([SHELL, "-c", "sleep 60"], port=1, timeout_seconds=0.1)


def test_a_kill_of_the_very_process_spares_its_group(processes: Processes) -> None:
    process = processes.start([SHELL, "-c", "sleep 60 & echo up; wait"], ready="^up$")
    process.send(signal.SIGKILL)
    assert process.wait(5) == -signal.SIGKILL
    assert len(list_group(process.pid)) == 1


STARTED = "Processes(Path('{folder}')).start(['/bin/sh', '-c', '{script}']); time.sleep(60)"
RUN = "run_command(['/bin/sh', '-c', '{script}'])"


@pytest.mark.parametrize("how", [STARTED, RUN], ids=["started", "run"])
def test_nothing_is_left_when_the_harness_itself_is_killed(tmp_path: Path, how: str) -> None:
    told = tmp_path / "group"
    script = f"sleep 60 & echo $$ > {told}.new; mv {told}.new {told}; sleep 60"
    code = (
        "import time; from pathlib import Path; from tests.support.processes import Processes, run_command; "
        + how.format(folder=tmp_path, script=script)
    )
    harness = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    assert wait_until(told.exists, 20)
    group = int(told.read_text())
    alive_before = len(list_group(group)) >= 2
    os.kill(harness.pid, signal.SIGKILL)
    harness.wait()
    assert alive_before
    assert wait_until(lambda: not list_group(group), 5)


def test_a_failed_test_shows_what_its_processes_said(tmp_path: Path) -> None:
    test = tmp_path / "test_planted.py"
    test.write_text(
        "import time\n"
        "def test_planted(processes):\n"
        f"    processes.start(['{SHELL}', '-c', 'echo its last words; sleep 600'], ready='^its')\n"
        "    assert False\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.conftest",
        "-c",
        "/dev/null",
        str(test),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "its last words" in done.stdout, done.stdout + done.stderr
