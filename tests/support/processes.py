"""Starts real processes for tests and always reaps them, with everything they started.

Each runs in a session of its own, so that its whole process group can be ended, by that group's id only. A watchdog
process holds the other end of a pipe: when this process dies in any way, kill -9 included, the pipe closes and the
watchdog kills the groups that are still listed. (PR_SET_PDEATHSIG would not do: it spares grandchildren, and it fires
when the starting *thread* ends.) It knows nothing of what the processes do.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

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
        self._watchdog: subprocess.Popen[str] | None = None

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
            popen = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environ or {})},
                cwd=cwd,
                start_new_session=True,
            )
        process = Process(name, popen, stdout_file, stderr_file)
        self.started.append(process)
        self._tell_watchdog(f"+{process.pid}")
        self._await_ready(process, ready, port, timeout_seconds)
        return process

    def stop(self, process: Process) -> None:
        """End a process and its whole group: ask, wait, then kill."""
        self._signal_group(process, signal.SIGTERM)
        if not wait_until(lambda: self._is_gone(process), self.grace_seconds):
            self._signal_group(process, signal.SIGKILL)
            if not wait_until(lambda: self._is_gone(process), self.grace_seconds):
                raise AssertionError(
                    f"{process.name}: group {process.pid} lives after SIGKILL: {list_group(process.pid)}"
                )
        self._tell_watchdog(f"-{process.pid}")

    def tell(self) -> list[tuple[str, str]]:
        """A title and the output of every process, for a failure's report."""
        return [(f"process {process.name}", process.tell()) for process in self.started]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for process in self.started:  # ask all first: they end side by side
                self._signal_group(process, signal.SIGTERM)
            for process in reversed(self.started):
                self.stop(process)
        finally:
            if self._watchdog is not None:  # its pipe closes: it kills what is still listed, and ends
                self._watchdog.communicate()
                self._watchdog = None

    def _await_ready(self, process: Process, ready: str, port: int | None, timeout_seconds: float) -> None:
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

    def _tell_watchdog(self, line: str) -> None:
        if self._watchdog is None:
            self._watchdog = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", WATCHDOG], stdin=subprocess.PIPE, text=True, start_new_session=True
            )
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.write(line + "\n")
        self._watchdog.stdin.flush()

    @staticmethod
    def _is_gone(process: Process) -> bool:
        return not list_group(process.pid) and process.popen.poll() is not None  # poll collects the leader

    @staticmethod
    def _signal_group(process: Process, number: signal.Signals) -> None:
        if list_group(process.pid):  # never an id that may have become somebody else's
            os.killpg(process.pid, number)


def answers(port: int) -> bool:
    """Whether something accepts connections on that loopback port."""
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", port)) == 0
