"""A sidecar as a child process: started on a free port, waited for, and always ended, however the parent ends.

It knows processes. It must not know what is asked of the sidecar.
"""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from dualtrace.problems import Reason, Unavailable

READY = re.compile(r"listening on (\S+)")
GRACE_SECONDS = 5.0


@contextmanager
def child_sidecar(model: Path, *, timeout_seconds: float = 180.0) -> Iterator[str]:
    """A reference sidecar over `model` for as long as the block lasts; gives its target.

    The child has a session of its own, so that Ctrl-C reaches only us and we end it; and it watches the pipe to us, so
    that it ends too when we are killed.
    """
    command = [sys.executable, "-m", "dualtrace.cli", "serve", "reference", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", "0", "--drain-seconds", "1", "--stop-with-stdin"]
    with tempfile.TemporaryFile("w+") as talk:
        child = subprocess.Popen(  # noqa: S603 - our own interpreter and command line
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=talk,
            text=True,
            env=_environment(),
            start_new_session=True,
        )
        try:
            yield f"grpc://{_await_ready(child, talk, timeout_seconds)}"
        finally:
            _end(child)


def _environment() -> dict[str, str]:
    """Ours without settings of the user's own sidecars: a token file or port of theirs is not meant for this one."""
    kept = {"DUALTRACE_CACHE"}
    own = {name: value for name, value in os.environ.items() if not name.startswith("DUALTRACE_") or name in kept}
    return {**own, "PYTHONUNBUFFERED": "1"}


def _await_ready(child: subprocess.Popen[str], talk: IO[str], timeout_seconds: float) -> str:
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read_lines, args=(child, lines), daemon=True).start()
    try:
        match = READY.search(lines.get(timeout=timeout_seconds))
        what = "ended before it was ready"
    except queue.Empty:
        match, what = None, f"was not ready within {timeout_seconds:g} s"
    if match is None:
        talk.seek(0)
        said = talk.read()[-2000:].strip()
        raise Unavailable(Reason.NOT_READY, f"the sidecar {what}; it said:\n{said or 'nothing'}")
    return match[1]


def _read_lines(child: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        lines.put(line)
    lines.put("")  # it ended


def _end(child: subprocess.Popen[str]) -> None:
    try:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_SECONDS)
    finally:  # too slow, or a second Ctrl-C: it must not outlive us either way
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
