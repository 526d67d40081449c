"""Cases over real sidecars and a real coordinator: planted differences, kept cases, and what CI gets to see."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.coordinated import House, address_of, case_text, run, write_case_file
from tests.support.processes import Processes
from tests.support.tiny import tiny_model

PLANTED = {"plant0": 0, "plant7": 7}  # backend -> the row whose logits are bent


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    specs = {"plain": "", "twin": "", **{name: f"plant_at={row},plant=3" for name, row in PLANTED.items()}}
    with Processes(folder) as processes:
        yield House(processes, folder / "data", specs).start()


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_difference_is_found_at_its_token_through_the_coordinator(
    house: House, tmp_path: Path, name: str
) -> None:
    file = write_case_file(tmp_path, case_text("planted", "backend:plain", f"backend:{name}"))
    (found,) = house.read("case", "run", file, code=1)["cases"]
    # A row predicts the token after it.
    assert (found["verdict"], found["first_divergence_index"]) == ("FAIL", PLANTED[name] + 1)


def test_the_same_case_is_found_without_any_coordinator(house: House, tmp_path: Path) -> None:
    left, right = (f"grpc://{address_of(house.sidecars[name])}" for name in ("plain", "plant7"))
    result = run("case", "run", write_case_file(tmp_path, case_text("planted", left, right)), "--json")
    assert result.exit_code == 1, result.output
    assert json.loads(result.stdout)["cases"][0]["first_divergence_index"] == PLANTED["plant7"] + 1


def test_a_run_is_told_a_line_a_case_and_ends_with_the_command_that_repeats_it(house: House, tmp_path: Path) -> None:
    file = write_case_file(
        tmp_path,
        case_text("good", "backend:plain", "backend:twin"),
        case_text("bad", "backend:plain", "backend:plant7"),
        case_text("left-out", "backend:plain", "backend:plant7", tags="nightly"),
    )
    result = house.run("case", "run", file, "--tag", "smoke")
    lines = result.stdout.splitlines()
    assert result.exit_code == 1
    assert [line.split()[:2] for line in lines if line[:1] in "PFIE"] == [["PASS", "good"], ["FAIL", "bad"]]
    command = next(line for line in lines if "reproduce: " in line).partition("reproduce: ")[2].split()
    again = run(*command[1:])
    assert again.exit_code == 1
    assert "FAIL         bad" in again.stdout


def test_junit_tells_each_case_apart(house: House, tmp_path: Path) -> None:
    file = write_case_file(
        tmp_path,
        case_text("good", "backend:plain", "backend:twin"),
        case_text("bad", "backend:plain", "backend:plant7"),
        case_text("nobody", "backend:plain", "backend:nobody"),
    )
    house.run("case", "run", file, "--junit", tmp_path / "out.xml")
    cases = ElementTree.parse(tmp_path / "out.xml").findall("testsuite/testcase")
    told = {case.attrib["name"]: [below.tag for below in case if below.tag != "properties"] for case in cases}
    assert told == {"good": [], "bad": ["failure"], "nobody": ["error"]}


def test_fail_fast_tells_what_it_left_out(house: House, tmp_path: Path) -> None:
    bad, good = (
        case_text(name, "backend:plain", f"backend:{right}") for name, right in (("a", "plant0"), ("b", "twin"))
    )
    found = house.read("case", "run", write_case_file(tmp_path, bad, good), "--fail-fast", code=1)["cases"]
    assert [one["verdict"] for one in found] == ["FAIL", "SKIPPED"]


def test_cases_go_into_the_store_and_out_again_unchanged(house: House, tmp_path: Path) -> None:
    mask = "{base: {all: [{causal: {}}, {chunked: {size: 4}}]}}"
    masked = case_text("kept-masked", "backend:plain", "backend:twin", tags="kept").replace(
        "left: 'backend:plain'", f"left: {{target: 'backend:plain', mask: {mask}, view: 'scaled:x:0.5'}}"
    )
    file = write_case_file(tmp_path, masked, case_text("kept-plain", "backend:plain", "backend:twin", tags="kept"))
    assert [one["did"] for one in house.read("case", "import", file)["cases"]] == ["created", "created"]
    house.read("case", "export", tmp_path / "out", "--tag", "kept")
    again = house.read("case", "import", tmp_path / "out")["cases"]
    assert [(one["name"], one["did"]) for one in again] == [("kept-masked", "unchanged"), ("kept-plain", "unchanged")]


def test_a_revision_that_somebody_else_has_replaced_is_refused(house: House, tmp_path: Path) -> None:
    file = write_case_file(tmp_path, case_text("revised", "backend:plain", "backend:twin", tags="revised"))
    house.read("case", "create", file)
    write_case_file(tmp_path, case_text("revised", "backend:plain", "backend:plant0", tags="revised"))
    assert house.read("case", "update", file, "--revision", "1")["cases"][0]["revision"] == 2
    late = house.run("case", "update", file, "--revision", "1")
    assert late.exit_code == 2
    assert "REVISION_CONFLICT" in late.stderr
    assert house.run("case", "create", file).exit_code == 2  # the name is taken
    assert house.run("case", "delete", "revised", "--revision", "2").exit_code == 0
    assert "NOT_FOUND" in house.run("case", "get", "revised").stderr


@pytest.mark.parametrize("selection", [["--tag", "nowhere"], ["--name", "nowhere"]])
def test_a_selection_without_a_case_is_wrong_usage(house: House, selection: list[str]) -> None:
    result = house.run("case", "run", *selection)
    assert result.exit_code == 2
    assert "nowhere" in result.stderr


def test_a_kept_case_runs_again_after_the_coordinator_was_killed(house: House, tmp_path: Path) -> None:
    text = case_text("kept", "backend:plain", "backend:plant7", tags="again")
    house.read("case", "create", write_case_file(tmp_path, text))
    before = house.read("case", "run", "--name", "kept", code=1)["cases"][0]
    house.end_coordinator(signal.SIGKILL)
    house.start_coordinator()
    after = house.read("case", "run", "--name", "kept", code=1)["cases"][0]
    assert after["first_divergence_index"] == before["first_divergence_index"] == 8
    kept = house.read("comparison", "list", "--case", "kept")["comparisons"]
    assert [one["comparison_id"] for one in kept] == [after["comparison_id"], before["comparison_id"]]


def test_engines_are_started_once_for_all_cases_and_none_is_left(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tiny_model())
    cases = [case_text(name, "reference:${MODEL}", "reference:model") for name in ("one", "two")]
    file = write_case_file(tmp_path, *cases)
    # Both sides name one folder, one of them from the case file's own.
    result = run("case", "run", file, "--set", f"MODEL={tmp_path / 'model'}", "--json")
    assert result.exit_code == 0, result.output
    assert [one["verdict"] for one in json.loads(result.stdout)["cases"]] == ["PASS", "PASS"]
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and str(tmp_path / "model") in command_of(pid)]


def command_of(pid: str) -> str:
    try:
        return Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""  # it ended while we looked
