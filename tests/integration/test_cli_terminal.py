"""Commands as people run them: what a pipe and a terminal get to see, when, and what Ctrl-C leaves behind."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.support.coordinated import case_text, write_case_file
from tests.support.processes import forget, launch, list_group
from tests.support.tiny import tiny_model

SECONDS = 20.0
STALLED = "fake:step=1,step_ms=30000"
TEXT = ("--text", "one two three")


class Start(Protocol):
    def __call__(
        self, *arguments: str | Path, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE
    ) -> subprocess.Popen[Any]: ...


@pytest.fixture
def start() -> Iterator[Start]:
    """Commands that end with their test, however that ends."""
    started: list[subprocess.Popen[Any]] = []

    def begin(
        *arguments: str | Path, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE
    ) -> subprocess.Popen[Any]:
        command = [sys.executable, "-m", "dualtrace.cli", *arguments]
        started.append(launch(command, None, stdout=stdout, stderr=stderr, text=True))
        return started[-1]

    yield begin
    for process in started:
        with process:
            if list_group(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
        forget(process.pid)


def interrupt(process: subprocess.Popen[Any]) -> tuple[int, str]:
    """As Ctrl-C does: to all that belong to the terminal. The exit code, and what was said."""
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=SECONDS)
    return process.returncode, said


def read_until(process: subprocess.Popen[Any], word: str) -> list[str]:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if word in line:
            return lines
    raise AssertionError(f"{word} did not come: {lines}")


def test_in_what_the_sides_differ_comes_through_a_pipe_before_any_has_answered(start: Start) -> None:
    process = start("compare", "fake:", f"{STALLED},plant_at=1", *TEXT)
    told = "".join(read_until(process, "tolerance"))
    assert "weights_digest" in told
    assert interrupt(process) == (130, "interrupted\n")


def test_ctrl_c_ends_a_case_whose_side_stalls(start: Start, tmp_path: Path) -> None:
    quick = case_text("quick", "fake:", "fake:")
    process = start("case", "run", write_case_file(tmp_path, quick, case_text("slow", "fake:", STALLED)))
    read_until(process, "quick")
    begun = time.monotonic()
    assert interrupt(process) == (130, "interrupted\n")
    assert time.monotonic() - begun < SECONDS / 2


@pytest.mark.parametrize("seconds", [1.0, 2.5], ids=["starting", "under way"])
def test_ctrl_c_takes_the_engines_along(start: Start, seconds: float) -> None:
    process = start("compare", f"reference:{tiny_model()}", STALLED, *TEXT)
    time.sleep(seconds)
    assert interrupt(process)[0] == 130
    assert list_group(process.pid) == []
    assert not [line for line in commands() if str(tiny_model()) in line and "serve" in line]


def commands() -> Sequence[str]:
    found = []
    for pid in os.listdir("/proc"):
        if pid.isdigit():
            try:
                found.append(Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except OSError:
                continue  # it ended while we looked
    return found


@pytest.mark.parametrize("command", ["compare", "case"])
def test_a_stalling_side_in_this_process_does_not_hold_us_beyond_the_time(
    start: Start, command: str, tmp_path: Path
) -> None:
    if command == "compare":
        process = start("compare", "fake:", STALLED, *TEXT, "--timeout", "1")
    else:
        process = start("case", "run", write_case_file(tmp_path, case_text("a", "fake:", STALLED)), "--timeout", "1")
    out, _ = process.communicate(timeout=SECONDS)
    assert (process.returncode, "DEADLINE" in out) == (3, True)


def test_data_goes_to_standard_output_even_where_a_terminal_shows_the_progress(start: Start, tmp_path: Path) -> None:
    file = write_case_file(tmp_path, case_text("good", "fake:", "fake:"))
    terminal, theirs = pty.openpty()
    try:
        process = start("case", "run", file, stderr=theirs)
        out, _ = process.communicate(timeout=SECONDS)
    finally:
        os.close(theirs)
        os.close(terminal)
    assert [line.split()[0] for line in out.splitlines()] == ["PASS", "1"]


def test_a_terminal_gets_colours_unless_it_wants_none(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    seen = []
    for value in ("", "1"):
        monkeypatch.setenv("NO_COLOR", value)
        seen.append(show_on_terminal(start, "compare", "fake:", "fake:plant_at=1", *TEXT))
    assert ["\x1b[" in text and "31m" in text for text in seen] == [True, False]
    assert "verdict: FAIL" in seen[1]


def show_on_terminal(start: Start, *arguments: str) -> str:
    terminal, theirs = pty.openpty()
    process = start(*arguments, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # how a terminal ends on Linux
            break
        if not part:
            break
        shown += part
    os.close(terminal)
    process.wait(SECONDS)
    return shown.decode(errors="replace")
