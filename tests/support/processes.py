"""Starts real processes for tests and always reaps them, with everything they started.

Each runs in a session of its own, so that its whole process group can be ended, by that group's id only. A watchdog
process holds the other end of a pipe: when this process dies in any way, kill -9 included, the pipe closes and the
watchdog kills the groups that are still listed. A process lists itself before it becomes the command, so that there is
no moment at which it runs unlisted. (PR_SET_PDEATHSIG would not do: it spares grandchildren, and it fires when the
starting *thread* ends.) It knows nothing of what the processes do.
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

POLL_SECONDS = 0.01

# Reads "+PGID" and "-PGID" lines until the pipe closes, then kills every group still listed.
WATCHDOG = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""

# Its standard input is the watchdog's pipe until it has told its number, which the command keeps: exec changes none.
LIST_AND_BECOME = ("/bin/sh", "-c", 'echo "+$$" >&0 && exec "$@" </dev/null', "listed")


class NotReadyError(AssertionError):
    """A process ended, or let its time pass, before it was ready. The message holds what it said."""


def list_group(group: int) -> list[int]:
    """The living members of a process group. Zombies do not count: they run nothing and only wait to be collected."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue  # it ended while we looked
        if int(pgrp) == group and state not in {"Z", "X"}:
            members.append(int(entry.name))
    return members


def wait_until(condition: Callable[[], bool], timeout_seconds: float) -> bool:
    """Poll until the condition holds; False when the time has passed."""
    end = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)
    return True


@cache
def watchdog() -> IO[bytes]:
    """The pipe to the one watchdog of this process, which lives as long as we do."""
    command = [sys.executable, "-I", "-S", "-c", WATCHDOG]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, start_new_session=True)
    atexit.register(started.communicate)  # it kills what is still listed, and ends
    assert started.stdin is not None
    return started.stdin


def launch(command: Sequence[str | Path], environ: Mapping[str, str] | None, **more: Any) -> subprocess.Popen[bytes]:
    """The command, listed with the watchdog, in a group of its own."""
    return subprocess.Popen(
        [*LIST_AND_BECOME, *(str(part) for part in command)],
        stdin=watchdog(),
        env={**os.environ, **(environ or {})},
        start_new_session=True,
        **more,
    )


def forget(group: int) -> None:
    """Its number may become somebody else's."""
    watchdog().write(f"-{group}\n".encode())


def run_command(
    command: Sequence[str | Path], *, environ: Mapping[str, str] | None = None, timeout_seconds: float = 60.0
) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end. What it started is ended with it, and it ends with us."""
    process = launch(command, environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        try:
            stdout, stderr = process.communicate(timeout=timeout_seconds)
        finally:
            if list_group(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
    forget(process.pid)
    return subprocess.CompletedProcess(list(map(str, command)), process.returncode, stdout, stderr)


@dataclass
class Process:
    """One process and its output, which goes to files so that no full pipe can stall it."""

    name: str
    popen: subprocess.Popen[bytes]
    stdout_file: Path
    stderr_file: Path
    ready: re.Match[str] | None = field(default=None)  # what the ready pattern matched: groups hold ports and the like

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def stdout(self) -> str:
        return self.stdout_file.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self.stderr_file.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def wait(self, timeout_seconds: float = 20.0) -> int:
        """The exit code, negative for a signal; raises subprocess.TimeoutExpired."""
        return self.popen.wait(timeout_seconds)

    def send(self, number: signal.Signals) -> None:
        """Signal this very process, not its group."""
        self.popen.send_signal(number)

    def tell(self) -> str:
        """What it said, for a failure's message."""
        state = "running" if self.running else f"ended with {self.popen.returncode}"
        return f"{self.name} (pid {self.pid}, {state})\n-- stdout --\n{self.stdout}\n-- stderr --\n{self.stderr}"


class Processes:
    """All processes of one test. Leaving the block ends every one of them."""

    def __init__(self, folder: Path, *, grace_seconds: float = 3.0) -> None:
        self.folder = folder
        self.grace_seconds = grace_seconds
        self.started: list[Process] = []

    def start(
        self,
        command: Sequence[str | Path],
        *,
        name: str = "",
        ready: str = "",
        port: int | None = None,
        timeout_seconds: float = 20.0,
        environ: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Process:
        """Start a command; wait for a line that matches `ready`, for `port` on loopback, for both, or for nothing."""
        name = name or Path(command[0]).name
        stem = self.folder / f"{len(self.started)}-{name}"
        stdout_file, stderr_file = stem.with_suffix(".stdout"), stem.with_suffix(".stderr")
        with stdout_file.open("wb") as stdout, stderr_file.open("wb") as stderr:
            popen = launch(command, {"PYTHONUNBUFFERED": "1", **(environ or {})}, stdout=stdout, stderr=stderr, cwd=cwd)
        process = Process(name, popen, stdout_file, stderr_file)
        self.started.append(process)
        self.await_ready(process, ready, port, timeout_seconds)
        return process

    def await_ready(self, process: Process, ready: str, port: int | None = None, timeout_seconds: float = 20.0) -> None:
        """For what was started to wait for nothing, so that several can get ready at once."""
        pattern = re.compile(ready, re.MULTILINE) if ready else None

        def is_settled() -> bool:
            if pattern is not None and process.ready is None:
                process.ready = pattern.search(process.stdout) or pattern.search(process.stderr)
            if (pattern is None or process.ready is not None) and (port is None or answers(port)):
                return True
            if not process.running:
                raise NotReadyError(f"ended before it was ready: {process.tell()}")
            return False

        if not wait_until(is_settled, timeout_seconds):
            raise NotReadyError(f"not ready after {timeout_seconds} s (waited for {ready or port!r}): {process.tell()}")

    def stop(self, process: Process) -> None:
        """End a process and its whole group: ask, wait, then kill."""
        self._signal_group(process, signal.SIGTERM)
        if not wait_until(lambda: self._is_gone(process), self.grace_seconds):
            self._signal_group(process, signal.SIGKILL)
            if not wait_until(lambda: self._is_gone(process), self.grace_seconds):
                raise AssertionError(
                    f"{process.name}: group {process.pid} lives after SIGKILL: {list_group(process.pid)}"
                )
        forget(process.pid)

    def tell(self) -> list[tuple[str, str]]:
        """A title and the output of every process, for a failure's report."""
        return [(f"process {process.name}", process.tell()) for process in self.started]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.started:  # ask all first: they end side by side
            self._signal_group(process, signal.SIGTERM)
        self._stop_each(self.started)

    def _stop_each(self, processes: Sequence[Process]) -> None:
        """The last first; one that cannot be stopped spares none of the others."""
        if processes:
            try:
                self.stop(processes[-1])
            finally:
                self._stop_each(processes[:-1])

    @staticmethod
    def _is_gone(process: Process) -> bool:
        # The leader first: all the rest means a look at every process of the machine.
        return process.popen.poll() is not None and not list_group(process.pid)

    @staticmethod
    def _signal_group(process: Process, number: signal.Signals) -> None:
        if list_group(process.pid):  # never an id that may have become somebody else's
            os.killpg(process.pid, number)


def answers(port: int) -> bool:
    """Whether something accepts connections on that loopback port."""
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", port)) == 0
