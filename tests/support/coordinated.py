"""Real sidecars and a real coordinator for tests, and the command line that speaks to them.

It knows how they are started. It must not know what is asked of them.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

import dualtrace.cli as cli
from tests.support.processes import Process, Processes

LISTENING = r"listening on (\S+)$"
COORDINATING = r"listening on grpc (\S+) http"
METRICS = re.compile(r"metrics on http://(\S+)/metrics")  # a sidecar's
HTTP = re.compile(r" http (\S+)$", re.MULTILINE)  # a coordinator's other face
TEXT = "The capital of France is Paris."


@dataclass
class House:
    """A coordinator over sidecars, by their names."""

    processes: Processes
    data: Path
    specs: Mapping[str, str]  # backend name -> what its engine does
    flags: tuple[str, ...] = ()  # of the coordinator
    models: Mapping[str, Path] = field(default_factory=dict)  # backend name -> checkpoint of a reference engine
    sidecars: dict[str, Process] = field(default_factory=dict)
    coordinator: Process | None = None

    def start(self) -> House:
        for name, spec in self.specs.items():
            self.sidecars[name] = start_sidecar(self.processes, spec, name, ready="")
        for name, model in self.models.items():
            self.sidecars[name] = start_engine(self.processes, name, "reference", "--model", str(model), ready="")
        for sidecar in self.sidecars.values():
            self.processes.await_ready(sidecar, LISTENING)
        self.start_coordinator()
        return self

    def start_coordinator(self) -> None:
        command = [sys.executable, "-m", "coordinator", "--port", "0", "--http-port", "0", "--data", str(self.data)]
        for name in (*self.specs, *self.models):
            command += ["--backend", f"{name}={address_of(self.sidecars[name])}"]
        self.coordinator = self.processes.start([*command, *self.flags], name="coordinator", ready=COORDINATING)

    def end_coordinator(self, number: signal.Signals) -> Process:
        """Signal it and wait; `start_coordinator` starts another on the same data, at another address."""
        assert self.coordinator is not None
        self.coordinator.send(number)
        self.coordinator.wait()
        return self.coordinator

    @property
    def address(self) -> str:
        assert self.coordinator is not None
        assert self.coordinator.ready is not None
        return self.coordinator.ready[1]

    def run(self, *arguments: str | Path) -> Result:
        """A command of ours in this process; the servers are real ones."""
        return run(*arguments, "--coordinator", self.address)

    def read(self, *arguments: str | Path, code: int = 0) -> Any:
        """The JSON of a command."""
        result = self.run(*arguments, "--json")
        assert result.exit_code == code, result.output
        return json.loads(result.stdout)


def start_sidecar(
    processes: Processes, spec: str = "", name: str = "sidecar", *flags: str, ready: str = LISTENING
) -> Process:
    """One of the fake engine."""
    return start_engine(processes, name, "fake", "--spec", spec, *flags, ready=ready)


def start_engine(processes: Processes, name: str, *engine: str, ready: str = LISTENING) -> Process:
    command = [sys.executable, "-m", "dualtrace.cli", "serve", "--port", "0", "--no-preflight"]
    command += ["--metrics-port", "0", "--chunk-tokens", "1", "--drain-seconds", "0", *engine]
    return processes.start(command, name=name, ready=ready)


def address_of(sidecar: Process) -> str:
    assert sidecar.ready is not None
    return sidecar.ready[1]


def count_steps(sidecar: Process) -> float:
    """Steps that its engine has made."""
    return read_metric(sidecar, "dualtrace_engine_step_seconds_count")


def is_at_rest(sidecar: Process, step_seconds: float) -> bool:
    """Whether its engine, which takes so long for a step, has made none for more than three of them."""
    before = count_steps(sidecar)
    time.sleep(3.5 * step_seconds)
    return count_steps(sidecar) == before


def read_metric(server: Process, name: str) -> float:
    """A number that a sidecar or a coordinator tells, labels and all as they stand there; 0 before its first time."""
    match = METRICS.search(server.stderr) or HTTP.search(server.stdout)
    assert match is not None, server.tell()
    with urllib.request.urlopen(f"http://{match[1]}/metrics", timeout=5) as answer:
        told = answer.read().decode()
    found = re.search(rf"^{re.escape(name)} (\S+)", told, re.MULTILINE)
    return 0.0 if found is None else float(found[1])


def run(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli.main, [str(one) for one in arguments], input=stdin)


def write_case_file(folder: Path, *cases: str) -> Path:
    file = folder / "cases.yaml"
    file.write_text("---\n".join(cases))
    return file


def case_text(name: str, left: str, right: str, *, tags: str = "smoke", text: str = TEXT) -> str:
    return (
        f"name: {name}\ntags: [{tags}]\nleft: {left!r}\nright: {right!r}\n"
        f"question: {{rolling: {{inputs: [{json.dumps(text)}]}}}}\ntolerance: {{abs: 1e-9, rel: 0}}\n"
    )
