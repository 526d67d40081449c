"""Runs in every mode over real processes: who answers is named, and in mode score nobody stands in for anybody."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.coordinated import TEXT, House
from tests.support.processes import Processes

NOBODY = "127.0.0.1:1"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """One backend that answers and one that nobody serves."""
    folder = tmp_path_factory.mktemp("house")
    with Processes(folder) as processes:
        yield House(processes, folder / "data", {"there": ""}, ("--backend", f"gone={NOBODY}")).start()


def run_once(house: House, backend: str, *flags: str, code: int = 0) -> dict[str, Any]:
    """The job of one run."""
    job: dict[str, Any] = house.read("run", "start", f"backend:{backend}", "--text", TEXT, *flags, code=code)
    return job


def benchmark(house: House, backend: str, fallback: str) -> dict[str, Any]:
    """The record of a benchmark run of two repeats."""
    flags = ("--mode", "benchmark", "--repeats", "2", "--warm-up", "1", "--fallback", fallback)
    record: dict[str, Any] = house.read("run", "show", run_once(house, backend, *flags)["run_id"])
    return record


@pytest.mark.parametrize(
    ("backend", "fallback", "source"),
    [
        ("there", "none", "real"),
        ("there", "auto", "real"),
        ("gone", "auto", "mock"),
        ("there", "mock", "mock"),
        ("gone", "mock", "mock"),
        ("there", "bench", "bench"),
        ("gone", "bench", "bench"),
    ],
)
def test_a_benchmark_says_who_answered(house: House, backend: str, fallback: str, source: str) -> None:
    record = benchmark(house, backend, fallback)
    assert record["benchmark"]["source"] == source
    assert (len(record["benchmark"]["latencies_ms"]), record["run"]["complete"]) == (2, True)


@pytest.mark.parametrize(("fallback", "model"), [("auto", "fake"), ("mock", "fake"), ("bench", "bench")])
def test_whoever_stands_in_is_marked_synthetic_wherever_the_run_is_shown(
    house: House, fallback: str, model: str
) -> None:
    record = benchmark(house, "gone", fallback)
    listed = house.read("run", "list")["runs"]
    assert record["synthetic"] is True
    assert model in record["run"]["provenance"]["model_id"]
    assert [one["synthetic"] for one in listed if one["run_id"] == record["run_id"]] == [True]


def test_the_calls_of_a_stand_in_never_reach_the_backend(house: House) -> None:
    record = benchmark(house, "there", "mock")
    assert (record["raw_request_ref"], record["raw_response_ref"]) == ("", "")


def test_a_missing_backend_fails_a_score_run_loudly_and_keeps_nothing(house: House) -> None:
    before = house.read("run", "list")["runs"]
    job = run_once(house, "gone", code=3)
    assert (job["state"], job["run_id"], job["problem"]["reason"]) == ("FAILED", None, "UNREACHABLE")
    assert house.read("run", "list")["runs"] == before


def test_a_missing_backend_fails_a_benchmark_without_a_fallback(house: House) -> None:
    job = run_once(house, "gone", "--mode", "benchmark", "--repeats", "2", code=3)
    assert (job["state"], job["problem"]["reason"]) == ("FAILED", "UNREACHABLE")


@pytest.mark.parametrize("fallback", ["none", "auto"])
def test_a_name_that_no_backend_has_is_an_error_where_a_backend_is_asked(house: House, fallback: str) -> None:
    flags = ("--mode", "benchmark", "--repeats", "2", "--fallback", fallback)
    result = house.run("run", "start", "backend:unknown", "--text", TEXT, *flags)
    assert (result.exit_code, "there is no backend" in result.output) == (2, True)


@pytest.mark.parametrize(("fallback", "source"), [("mock", "mock"), ("bench", "bench")])
def test_what_asks_no_backend_needs_none(house: House, fallback: str, source: str) -> None:
    assert benchmark(house, "unknown", fallback)["benchmark"]["source"] == source


def test_a_fallback_belongs_to_benchmarks_alone(house: House) -> None:
    result = house.run("run", "start", "backend:there", "--text", TEXT, "--fallback", "auto")
    assert (result.exit_code, "benchmark" in result.output) == (2, True)
