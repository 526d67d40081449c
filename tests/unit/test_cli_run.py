"""What `dualtrace run start` makes of its options, and how stored things look as tables."""

from pathlib import Path
from typing import Any

import pytest

from dualtrace.cli.job import tell_event
from dualtrace.cli.output import output_console
from dualtrace.cli.run_tables import benchmark_table, comparisons_table, job_table, runs_table
from dualtrace.compare.report import Verdict
from dualtrace.library import BenchmarkFigures, ComparisonSummary, Job, JobEvent, JobState, RunMode, RunSummary
from dualtrace.runs.run import StoredProblem
from tests.support.coordinated import run

HOSTILE = "evil\x1b[31m\u202e"
JOB = Job("job-1", "r", JobState.RUNNING, 3)


def shown(table: Any) -> str:
    console = output_console()
    console.width = 200
    with console.capture() as captured:
        console.print(table)
    return captured.get()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fake:", "--text", "x"], "backend:NAME"),
        (["backend:a"], "nothing to ask"),
        (["backend:a", "--text", "x", "--repeats", "5"], "--mode benchmark"),
        (["backend:a", "--text", "x", "--fallback", "auto"], "--fallback is for --mode benchmark"),
        (["backend:a", "--query", "q", "--item", "i"], "--labels IDS"),
        (["backend:a", "--text", "x", "--next", "y"], "different questions"),
        (["backend:a", "--text", "x", "--view", "tuned"], "finetuned:NAME"),
    ],
)
def test_a_start_that_makes_no_sense_is_refused_before_anybody_is_asked(arguments: list[str], said: str) -> None:
    result = run("run", "start", *arguments, "--coordinator", "127.0.0.1:1")
    assert result.exit_code == 2, result.output
    assert said in result.stderr


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "saved.json").write_text("mine")
    result = run("run", "export", "run-1", tmp_path / "saved.json", "--coordinator", "127.0.0.1:1")
    assert result.exit_code == 2
    assert (tmp_path / "saved.json").read_text() == "mine"


def test_a_replay_takes_backends_alone_and_says_what_else_to_do() -> None:
    result = run("run", "replay", "run-1", "torch:model", "--coordinator", "127.0.0.1:1")
    assert result.exit_code == 2
    assert "dualtrace run export" in result.stderr


def test_words_of_others_cannot_steer_the_terminal() -> None:
    run_row = RunSummary("run-1", HOSTILE, RunMode.SCORE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, "sha256:0", False, True)
    pair_row = ComparisonSummary("cmp-1", HOSTILE, HOSTILE, HOSTILE, HOSTILE, Verdict.FAIL, HOSTILE, 3, 0.5)
    failed = Job("job-1", HOSTILE, JobState.FAILED, 1, problem=StoredProblem("INTERNAL", "BUG", "", HOSTILE, ""))
    told = shown(runs_table([run_row])) + shown(comparisons_table([pair_row])) + shown(job_table(failed))
    assert "evil" in told
    assert not {"\x1b[31m", "\u202e"} & {piece for piece in ("\x1b[31m", "\u202e") if piece in told}


def test_a_run_that_is_not_whole_or_not_real_says_so() -> None:
    row = RunSummary("run-1", "2026-01-02T03:04:05Z", RunMode.SCORE, "backend:a", "m", "f", "SCORE", "", False, True)
    told = shown(runs_table([row]))
    assert "synthetic, incomplete" in told
    assert "2026-01-02 03:04:05" in told


def test_a_benchmark_without_one_answer_has_no_percentile() -> None:
    problem = StoredProblem("UNAVAILABLE", "UNREACHABLE", "", "nobody is there", "")
    figures = BenchmarkFigures("real", 2, (), (), 5, problem, None, None, None, 1.0, 0.0, 0.0)
    told = shown(benchmark_table(figures))
    assert "5 (100.0%)" in told
    assert "nobody is there" in told
    assert "–" in told.split("p50 ms")[1].splitlines()[0]


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (JobEvent(1, JOB, "started", 0, 0, ""), "running  started"),
        (JobEvent(2, JOB, "", 5, 20, "calls"), "running  5 of 20 calls"),
        (JobEvent(3, JOB, "more", 7, 0, "tokens"), "running  7 tokens  more"),
    ],
)
def test_an_event_says_how_far_the_job_is(event: JobEvent, told: str) -> None:
    assert tell_event(event) == told
