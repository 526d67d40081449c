"""Processes of our own as children: started, waited for until they say where they listen, and always ended.

Each has a session of its own, so that Ctrl-C reaches only us and we end it; and it watches the pipe to us, so that it
ends too when we are killed, however that happens. It must not know what a child serves.
"""

from __future__ import annotations

import os
import queue
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

from dualtrace.problems import Reason, Unavailable

GRACE_SECONDS = 5.0
START_SECONDS = 180.0
KEPT = frozenset({"DUALTRACE_CACHE"})
"""Of our variables, those that are meant for children too."""


class ChildProcess:
    """One child. `await_ready`, and `end` whatever happened in between. `--stop-with-stdin` is the command's to say."""

    def __init__(self, name: str, command: Sequence[str], ready: re.Pattern[str]) -> None:
        self.name = name  # in messages: "torch sidecar"
        self._ready = ready
        self._begun = time.monotonic()
        self._lines: queue.Queue[str] = queue.Queue()
        self._talk: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `end` closes it
        self._child = subprocess.Popen(  # noqa: S603 - our own interpreter and command line
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._talk,
            text=True,
            env=_environment(),
            start_new_session=True,
        )
        threading.Thread(target=_read_lines, args=(self._child, self._lines), daemon=True).start()

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def age_seconds(self) -> float:
        return time.monotonic() - self._begun

    @property
    def has_ended(self) -> bool:
        return self._child.poll() is not None

    def match_ready(self, timeout_seconds: float = START_SECONDS) -> re.Match[str]:
        """What the pattern found in its first line. The time counts from its start."""
        try:
            left = self._begun + timeout_seconds - time.monotonic()
            match = self._ready.search(self._lines.get(timeout=max(0.0, left)))
            what = "ended before it was ready"
        except queue.Empty:
            match, what = None, f"was not ready within {timeout_seconds:g} s"
        if match is None:
            said = self.last_words() or "nothing"
            raise Unavailable(Reason.NOT_READY, f"the {self.name} {what}; it said:\n{said}")
        return match

    def last_words(self, characters: int = 2000) -> str:
        """The end of what it told on standard error."""
        end = os.fstat(self._talk.fileno()).st_size
        return os.pread(self._talk.fileno(), characters, max(0, end - characters)).decode(errors="replace").strip()

    def ask_to_end(self) -> None:
        self._child.terminate()

    def end(self) -> None:
        try:
            self._child.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(GRACE_SECONDS)
        finally:  # too slow, or a second Ctrl-C: it must not outlive us either way
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout, self._talk):
                if pipe is not None:
                    pipe.close()


def end_all(children: Sequence[ChildProcess]) -> None:
    """Each is ended even when an earlier one's end is interrupted."""
    if not children:
        return
    try:
        for child in children:
            child.ask_to_end()  # all first: they drain side by side
        children[0].end()
    finally:
        end_all(children[1:])


def _environment() -> dict[str, str]:
    """Ours without settings of the user's own servers: a token file or port of theirs is not meant for this one."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("DUALTRACE_") or name in KEPT}
    return {**own, "PYTHONUNBUFFERED": "1"}


def _read_lines(child: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    assert child.stdout is not None
    with suppress(ValueError):  # it was closed under us by `end`
        for line in child.stdout:
            lines.put(line)
    lines.put("")  # it ended
