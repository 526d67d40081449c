"""Comparing over real processes: planted differences are found, every fault is named, and nobody is left behind."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dualtrace.compare.report import CompareReport, Verdict, read_report
from tests.support.coordinated import count_steps, is_at_rest, read_metric
from tests.support.processes import Process, Processes, list_group, run_command, wait_until
from tests.support.tiny import tiny_model

DUALTRACE = [sys.executable, "-m", "dualtrace.cli"]
IDS = ("--ids", ",".join(str(index % 250) for index in range(300)))
SLOW = "step=1,step_ms=100"  # thirty seconds of it


def serve(processes: Processes, spec: str = "", *arguments: str) -> tuple[Process, str]:
    command = [*DUALTRACE, "serve", "fake", "--port", "0", "--no-preflight", "--spec", spec, *arguments]
    process = processes.start(command, name="sidecar", ready=r"listening on (\S+)")
    assert process.ready is not None
    return process, f"grpc://{process.ready[1]}"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A sidecar that nobody harms."""
    with Processes(tmp_path_factory.mktemp("plain")) as started:
        yield serve(started)[1]


def compare(*arguments: str | Path, code: int) -> CompareReport:
    done = run_command([*DUALTRACE, "compare", *arguments, "--json"])
    assert done.returncode == code, (done.returncode, done.stdout[-2000:], done.stderr)
    return read_report(done.stdout.decode())


def list_sidecars(parent: int) -> list[int]:
    """Our command's children that serve, by what the kernel says of their parent."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat, command = (entry / "stat").read_text(), (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[1]) == parent and b"serve" in command:
                found.append(int(entry.name))
    return found


def is_alive(pid: int) -> bool:
    return bool(list_group(pid))  # each sidecar leads a group of its own


def start_comparison(processes: Processes) -> tuple[Process, list[int]]:
    """A comparison that starts two engines in sidecars of their own; and the sidecars' ids."""
    folder = tiny_model()
    targets = [f"reference:{folder}", f"torch:{folder}"]
    client = processes.start([*DUALTRACE, "compare", *targets, *IDS], name="compare")
    assert wait_until(lambda: len(list_sidecars(client.pid)) == 2, 30), client.tell()
    return client, list_sidecars(client.pid)


def test_a_planted_difference_between_two_sidecars_is_found_at_its_token(processes: Processes, plain: str) -> None:
    _right, right = serve(processes, "plant_at=137")
    report = compare(plain, right, *IDS, code=1)
    assert report.tokens is not None
    assert (report.verdict, report.tokens.first_divergence_index) == (Verdict.FAIL, 138)
    assert (report.tokens.token_mismatch_count, report.tokens.aligned_count) == (1, 299)


def test_two_engines_over_one_checkpoint_agree_in_sidecars_that_end_with_the_comparison(processes: Processes) -> None:
    folder = tiny_model()
    command = [*DUALTRACE, "compare", f"reference:{folder}", f"reference:{folder}", "--right-dtype", "float64"]
    client = processes.start([*command, "--text", "the answer is", "--json"], name="compare")
    assert wait_until(lambda: len(list_sidecars(client.pid)) == 2, 30), client.tell()
    sidecars = list_sidecars(client.pid)
    assert client.wait(60) == 0, client.tell()
    assert read_report(client.stdout).verdict is Verdict.PASS
    assert not [pid for pid in sidecars if is_alive(pid)]


def test_the_same_engine_on_both_sides_is_one_sidecar_and_one_batch(processes: Processes, tmp_path: Path) -> None:
    mask = tmp_path / "mask.json"
    mask.write_text(json.dumps({"base": {"sliding": {"keys_back": 2, "keys_ahead": 0}}}))
    command = [
        *DUALTRACE,
        "compare",
        f"reference:{tiny_model()}",
        "--right-mask",
        str(mask),
        "--text",
        "the answer is here",
    ]
    client = processes.start([*command, "--json"], name="compare")
    assert wait_until(lambda: list_sidecars(client.pid) != [], 30), client.tell()
    assert len(list_sidecars(client.pid)) == 1
    assert client.wait(60) == 1, client.tell()
    report = read_report(client.stdout)
    assert report.verdict is Verdict.FAIL
    assert report.left.execution == report.right.execution  # one call
    assert report.items[0].right_applied is not None
    assert report.items[0].left_applied is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_sidecars_end_with_a_comparison_that_is_ended_by_a_signal(processes: Processes, number: signal.Signals) -> None:
    client, sidecars = start_comparison(processes)
    client.send(number)
    client.wait(20)
    assert wait_until(lambda: not [pid for pid in sidecars if is_alive(pid)], 15)


def test_ctrl_c_while_two_sides_answer_ends_with_130_and_frees_their_queues(processes: Processes) -> None:
    left, left_target = serve(processes, SLOW, "--metrics-port", "0", "--chunk-tokens", "1")
    right, right_target = serve(processes, SLOW, "--metrics-port", "0", "--chunk-tokens", "1")
    client = processes.start([*DUALTRACE, "compare", left_target, right_target, *IDS], name="compare")
    assert wait_until(lambda: min(count_steps(left), count_steps(right)) > 2, 20), client.tell()
    client.send(signal.SIGINT)
    assert client.wait(10) == 130, client.tell()
    assert wait_until(lambda: is_at_rest(left, 0.1) and is_at_rest(right, 0.1), 5)


def test_a_side_that_is_killed_is_named_and_the_other_answer_is_kept(
    processes: Processes, plain: str, tmp_path: Path
) -> None:
    right, right_target = serve(processes, SLOW, "--metrics-port", "0", "--chunk-tokens", "1")
    kept = tmp_path / "left.json"
    command = [*DUALTRACE, "compare", plain, right_target, *IDS, "--json", "--save-left", str(kept)]
    client = processes.start(command, name="compare")
    assert wait_until(lambda: count_steps(right) > 3, 20), client.tell()
    os.kill(right.pid, signal.SIGKILL)
    assert client.wait(20) == 3, client.tell()
    report = read_report(client.stdout)
    assert report.verdict is Verdict.ERROR
    assert report.left.problem is None
    assert report.right.problem is not None
    assert report.tokens is not None
    assert report.tokens.aligned_count > 0  # what both had told before
    assert json.loads(kept.read_text())["complete"] is True


def test_a_slow_side_ends_with_its_deadline_and_3(processes: Processes, plain: str) -> None:
    _right, right = serve(processes, SLOW)
    begun = time.monotonic()
    report = compare(plain, right, *IDS, "--timeout", "1.5", code=3)
    assert time.monotonic() - begun < 10
    assert report.right.problem is not None
    assert report.right.problem.reason == "DEADLINE"
    assert "right" in report.right.problem.message
    assert report.left.problem is None


def test_an_engine_that_cannot_start_is_a_failed_side_with_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    report = compare(f"reference:{tmp_path}", "fake:", "--text", "a b", code=3)
    assert report.left.problem is not None
    assert "it said" in report.left.problem.message
    assert report.right.problem is None


def test_a_full_queue_is_the_failure_of_that_side_alone(processes: Processes, plain: str) -> None:
    more = ("--queue-limit", "1", "--metrics-port", "0", "--chunk-tokens", "1", "--batch-tokens", "600")
    right, right_target = serve(processes, SLOW, *more)
    ask = [*DUALTRACE, "rolling", right_target, "--ids", ",".join(["5"] * 600)]  # too long to pass another one
    processes.start(ask, name="running")
    assert wait_until(lambda: count_steps(right) > 0, 20)
    processes.start(ask, name="waiting")
    assert wait_until(lambda: read_metric(right, "dualtrace_waiting_calls") == 1, 20)
    report = compare(plain, right_target, *IDS, code=3)
    assert report.right.problem is not None
    assert report.right.problem.reason == "QUEUE_FULL"
    assert report.left.problem is None
