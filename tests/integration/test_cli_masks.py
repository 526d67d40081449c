"""Masks, views and packed scoring through real sidecar processes: the answers of the engine in process, by the wire."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualtrace.client import BlockingClient, Connection
from dualtrace.engine import int_array
from dualtrace.problems import FailedPrecondition
from dualtrace.questions.answers import NextTokens
from dualtrace.questions.asked import Input, NextTokenQuestion, RollingQuestion
from tests.support.adapters import broken_adapter, tiny_adapter
from tests.support.processes import Process, Processes, run_command
from tests.support.tiny import tiny_model

DUALTRACE = [sys.executable, "-m", "dualtrace.cli"]
TEXT = "the answer to this question"
ADAPTER = ("--adapter", f"a={tiny_adapter(tiny_model())}")


def serve(processes: Processes, *arguments: str | Path, ready: str = r"listening on (\S+)") -> Process:
    command = [*DUALTRACE, "serve", "reference", "--model", tiny_model(), "--port", "0", *arguments]
    return processes.start(command, name="sidecar", ready=ready)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A sidecar with an adapter."""
    with Processes(tmp_path_factory.mktemp("sidecar")) as started:
        process = serve(started, *ADAPTER)
        assert process.ready is not None
        yield process.ready[1]


def call_json(*arguments: str | Path) -> Any:
    done = run_command([*DUALTRACE, *arguments, "--json"])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_masks_and_views_are_answered_by_a_sidecar_as_in_process(address: str, tmp_path: Path) -> None:
    np.save(tmp_path / "tri.npy", np.tri(8, dtype=bool))
    (tmp_path / "array.json").write_text('{"base": {"array": {"file": "tri.npy"}}}')
    (tmp_path / "cut.json").write_text(
        '{"base": {"causal": {}}, "edges": [{"queries": {"segment": "completion"}, "keys": {"tokens": [1, 3]}}]}'
    )
    asked: list[str | Path] = ["--text", TEXT, "--mask", tmp_path / "array.json", "--mask", tmp_path / "cut.json"]
    asked += ["--kl", "--view", "base", "--view", "scaled:a:0.5", "--segment-regex", "completion=question"]
    remote = call_json("masked", f"grpc://{address}", *asked)
    local = call_json("masked", f"reference:{tiny_model()}", *ADAPTER, *asked)
    assert remote["items"] == local["items"]
    assert remote["identity"] == local["identity"]


def test_a_large_array_goes_ahead_to_a_sidecar(address: str, tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", np.broadcast_to(np.tri(300, dtype=bool), (3, 4, 300, 300)))
    (tmp_path / "mask.json").write_text('{"base": {"array": {"file": "m.npy"}}}')
    asked: list[str | Path] = ["--ids", ",".join(["5"] * 300), "--mask", tmp_path / "mask.json"]
    assert call_json("rolling", f"grpc://{address}", *asked)["items"][0]["problem"] is None


def test_a_mask_is_explained_by_a_sidecar(address: str, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text('{"base": {"sliding": {"keys_back": 2}}}')
    asked: list[str | Path] = ["--text", TEXT, "--mask", tmp_path / "m.json", "--why", "5,0"]
    asked += ["--png", tmp_path / "m.png"]
    found = call_json("mask", "explain", f"grpc://{address}", *asked)
    assert (found["rows"][5], found["answers"][0]["may_see"]) == ([[4, 6]], False)
    assert (tmp_path / "m.png").stat().st_size > 100


def test_a_blocking_client_wears_views_in_blocks(address: str) -> None:
    question = NextTokenQuestion((Input(ids=int_array([5, 6, 7])),), top_k=1)
    found = []
    with BlockingClient(Connection(address)) as client:
        model = client.model()
        for view in (model.as_base(), model.as_scaled("a", 0), model.as_finetuned("a")):
            with view as worn:
                assert all(result.ok for result in worn.preflight().results)
                outcome = worn.next_token(question).results[0].outcome
                assert isinstance(outcome, NextTokens)
                found.append(float(outcome.top_logprobs[0]))
                with pytest.raises(FailedPrecondition), client.model().as_base():
                    pass
                events = worn.rolling(RollingQuestion(question.prompts))
                next(events)
            with pytest.raises(FailedPrecondition):
                next(events)
    assert found[0] == found[1] != found[2]


def test_a_broken_adapter_ends_a_sidecar_before_it_listens(processes: Processes, tmp_path: Path) -> None:
    broken = broken_adapter(tiny_adapter(tiny_model()), tmp_path / "broken")
    process = serve(processes, "--adapter", f"bad={broken}", ready=r"finetuned\(bad\)")
    assert process.wait() == 1
    assert "listening" not in process.stdout
