"""A real coordinator over real sidecars that die, stall, are full or must stop: nothing hangs, nothing is lost."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result

from tests.support.coordinated import (
    TEXT,
    House,
    address_of,
    case_text,
    count_steps,
    is_at_rest,
    run,
    write_case_file,
)
from tests.support.processes import Process, Processes, wait_until

SLOW_SECONDS = 0.1
SLOW = f"step=1,step_ms={SLOW_SECONDS * 1e3:g}"
STALLED = "step=1,step_ms=30000"
LONG = "x" * 400  # forty seconds of a slow side
GONE_BY = 15.0  # seconds within which a faulty side must have been told


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Sides that nobody harms; a test that ends the coordinator starts it again."""
    folder = tmp_path_factory.mktemp("house")
    specs = {"plain": "", "bent": "plant_at=3,plant=3", "slow": SLOW, "stalled": STALLED}
    with Processes(folder) as processes:
        opened = House(processes, folder / "data", specs, ("--max-comparisons", "1")).start()
        yield opened
        opened.sidecars["stalled"].popen.kill()  # its step would be waited for


def compare(house: House, folder: Path, *flags: str, left: str = "plain", right: str) -> Result:
    file = write_case_file(folder, case_text("faulty", f"backend:{left}", f"backend:{right}", text=LONG))
    return house.run("case", "run", file, "--json", *flags)


class Meanwhile:
    """A comparison that goes on while the test does something to its sides."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._results: list[Result] = []
        self._thread = threading.Thread(target=lambda: self._results.append(work()), daemon=True)
        self._thread.start()

    def wait(self, seconds: float = GONE_BY) -> Result:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"nothing was told within {seconds} s"
        return self._results[0]


def await_steps(sidecar: Process) -> None:
    before = count_steps(sidecar)
    assert wait_until(lambda: count_steps(sidecar) > before + 2, 20), sidecar.tell()


def test_a_side_that_is_killed_is_named_and_the_other_one_is_kept(processes: Processes, tmp_path: Path) -> None:
    house = House(processes, tmp_path / "data", {"left": "", "right": SLOW}).start()
    comparing = Meanwhile(lambda: compare(house, tmp_path, left="left", right="right"))
    await_steps(house.sidecars["right"])
    house.sidecars["right"].popen.kill()
    result = comparing.wait()
    assert result.exit_code == 3, result.output
    (summary,) = house.read("comparison", "list")["comparisons"]
    assert summary["verdict"] == "ERROR"
    report = house.read("comparison", "show", summary["comparison_id"])
    assert (report["left"]["problem"], report["right"]["problem"]["code"]) == (None, "UNAVAILABLE")
    assert report["tokens"]["aligned_count"] > 0  # what both had told before
    kept = {one["target"]: one["complete"] for one in house.read("run", "list")["runs"]}
    assert kept["backend:left"] is True
    assert kept.get("backend:right", False) is False


@pytest.mark.parametrize("coordinated", [True, False], ids=["coordinator", "in process"])
def test_a_side_that_stalls_is_bounded_by_the_deadline(house: House, tmp_path: Path, coordinated: bool) -> None:
    begun = time.monotonic()
    if coordinated:
        result = compare(house, tmp_path, "--timeout", "1", right="stalled")
    else:
        sides = [f"grpc://{address_of(house.sidecars[name])}" for name in ("plain", "stalled")]
        file = write_case_file(tmp_path, case_text("faulty", *sides, text=LONG))
        result = run("case", "run", file, "--json", "--timeout", "1")
    assert result.exit_code == 3, result.output
    assert "DEADLINE" in result.output
    assert time.monotonic() - begun < GONE_BY


def test_a_coordinator_that_is_killed_is_told_to_its_caller(house: House, tmp_path: Path) -> None:
    comparing = Meanwhile(lambda: compare(house, tmp_path, right="slow"))
    await_steps(house.sidecars["slow"])
    house.end_coordinator(signal.SIGKILL)
    result = comparing.wait()
    house.start_coordinator()
    assert result.exit_code == 3


def test_a_job_that_is_cancelled_leaves_the_engine_in_peace(house: House) -> None:
    job = house.read("run", "start", "backend:slow", "--text", LONG, "--no-wait")
    await_steps(house.sidecars["slow"])
    house.read("job", "cancel", job["job_id"])
    assert house.read("job", "watch", job["job_id"], code=1)["state"] == "CANCELLED"
    assert wait_until(lambda: is_at_rest(house.sidecars["slow"], SLOW_SECONDS), GONE_BY)


def test_watching_a_job_from_a_number_on_skips_what_came_before(house: House) -> None:
    job = house.read("run", "start", "backend:plain", "--text", "short")
    result = house.run("job", "watch", job["job_id"], "--after", "1")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stderr.splitlines()] == ["2"]


def test_one_comparison_too_many_is_refused_and_the_first_goes_on(house: House, tmp_path: Path) -> None:
    first = Meanwhile(lambda: house.run("run", "start", "backend:plain", "--text", "before"))
    first.wait()
    file = write_case_file(tmp_path, case_text("long", "backend:plain", "backend:slow", text="x" * 30))
    long = Meanwhile(lambda: house.run("case", "run", file, "--json"))
    await_steps(house.sidecars["slow"])
    refused = compare(house, tmp_path, right="plain")
    assert refused.exit_code == 3, refused.output
    assert "RESOURCE_EXHAUSTED" in refused.output or "comparisons" in refused.output
    assert long.wait(30).exit_code == 0


def test_the_same_request_is_the_same_job_and_another_question_is_refused(house: House) -> None:
    first, again = (
        house.read("run", "start", "backend:plain", "--text", "one", "--request-id", "twice") for _ in range(2)
    )
    assert (first["job_id"], first["run_id"]) == (again["job_id"], again["run_id"])
    other = house.run("run", "start", "backend:plain", "--text", "two", "--request-id", "twice")
    assert other.exit_code == 2
    assert "ALREADY_EXISTS" in other.stderr


def test_a_stored_run_is_replayed_against_another_side_and_parts_where_it_must(house: House) -> None:
    run_id = house.read("run", "start", "backend:plain", "--text", TEXT)["run_id"]
    report = house.read("run", "replay", run_id, "backend:bent", code=1)
    assert report["tokens"]["first_divergence_index"] == 4
    assert house.run("run", "replay", run_id, "backend:plain").exit_code == 0


def test_a_run_that_was_saved_is_a_target_without_any_coordinator(house: House, tmp_path: Path) -> None:
    run_id = house.read("run", "start", "backend:plain", "--text", TEXT)["run_id"]
    house.read("run", "export", run_id, tmp_path / "saved.json")
    sidecar = f"grpc://{address_of(house.sidecars['bent'])}"
    case = case_text("stored", "saved.json", sidecar)
    # The command asked two candidates a token, as the stored question says.
    file = write_case_file(tmp_path, case.replace("]}}", "], top_k: 2}}"))
    result = run("case", "run", file)
    assert result.exit_code == 1, result.output
    assert "first divergence at token 4" in result.stdout


def test_a_stored_run_is_a_side_beside_a_side_that_no_coordinator_knows(house: House, tmp_path: Path) -> None:
    run_id = house.read("run", "start", "backend:plain", "--text", TEXT)["run_id"]
    case = case_text("stored", f"run:{run_id}", f"grpc://{address_of(house.sidecars['bent'])}")
    result = house.run("case", "run", write_case_file(tmp_path, case.replace("]}}", "], top_k: 2}}")))
    assert result.exit_code == 1, result.output
    assert "first divergence at token 4" in result.stdout


def test_a_kept_case_that_takes_too_long_is_stopped(house: House, tmp_path: Path) -> None:
    text = case_text("slow", "backend:plain", "backend:slow", tags="slow", text=LONG)
    house.read("case", "create", write_case_file(tmp_path, text))
    result = house.run("case", "run", "--name", "slow", "--timeout", "1")
    assert result.exit_code == 3, result.output
    assert "took more than 1 s" in result.stdout
    assert wait_until(lambda: is_at_rest(house.sidecars["slow"], SLOW_SECONDS), GONE_BY)


def test_raw_bytes_of_a_run_can_be_had(house: House, tmp_path: Path) -> None:
    run_id = house.read("run", "start", "backend:plain", "--text", "The capital of raw")["run_id"]
    house.read("run", "export", run_id, tmp_path / "request.bin", "--raw", "request")
    assert b"The capital of raw" in (tmp_path / "request.bin").read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "show", "run-none"],
        ["run", "replay", "run-none", "backend:plain"],
        ["run", "start", "backend:nobody", "--text", "x"],
        ["comparison", "show", "cmp-none"],
        ["job", "watch", "job-none"],
        ["backend", "show", "nobody"],
        ["case", "get", "nobody"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_what_does_not_exist_is_not_found(house: House, arguments: list[str]) -> None:
    result = house.run(*arguments)
    assert result.exit_code == 2, result.output
    assert "NOT_FOUND" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_coordinator_that_is_told_to_stop_ends_well(house: House) -> None:
    ended = house.end_coordinator(signal.SIGTERM)
    house.start_coordinator()
    assert ended.popen.returncode == 0
    assert "Traceback" not in ended.stderr
