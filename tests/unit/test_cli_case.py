"""`dualtrace case run` straight from files: what it picks, what it says, how it ends. No server is needed."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import Result

from tests.support.coordinated import case_text, run, write_case_file

GOOD = case_text("good", "fake:", "fake:seed=0", tags="smoke")
BAD = case_text("bad", "fake:", "fake:plant_at=7", tags="smoke, slow")
AWAY = case_text("away", "fake:", "grpc://127.0.0.1:1", tags="net")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_case_file(tmp_path, GOOD, BAD, AWAY)


def names(result: Result) -> list[str]:
    return [case["name"] for case in json.loads(result.stdout)["cases"]]


@pytest.mark.parametrize(
    ("selection", "code"),
    [
        (["--name", "good"], 0),
        (["--tag", "smoke"], 1),
        (["--name", "bad"], 1),
        (["--name", "away"], 3),
        ([], 3),
        (["--tag", "nothing"], 2),
        (["--name", "nobody"], 2),
    ],
)
def test_the_exit_code_says_how_the_worst_case_went(file: Path, selection: list[str], code: int) -> None:
    assert run("case", "run", file, *selection).exit_code == code


def test_tags_are_any_of_several_and_names_narrow_them(file: Path) -> None:
    assert names(run("case", "run", file, "--tag", "slow", "--tag", "net", "--json")) == ["bad", "away"]
    assert names(run("case", "run", file, "--tag", "slow", "--tag", "net", "--name", "bad", "--json")) == ["bad"]


def test_a_case_is_one_line_and_only_what_failed_says_more(file: Path) -> None:
    lines = run("case", "run", file, "--tag", "smoke").stdout.splitlines()
    assert lines[0].split()[:5] == ["PASS", "good", "max", "diff", "0"]
    assert "first divergence at token 8" in lines[1]
    assert lines[-2].strip() == f"reproduce: dualtrace case run {file} --name bad"
    assert lines[-1].startswith("2 cases: 1 PASS, 1 FAIL in ")


def test_the_command_that_repeats_a_case_names_the_values_it_needs(tmp_path: Path) -> None:
    file = write_case_file(tmp_path, case_text("bad", "fake:", "fake:plant_at=${ROW}"))
    result = run("case", "run", file, "--set", "ROW=3")
    assert f"reproduce: dualtrace case run {file} --name bad --set ROW=3" in result.stdout


def test_the_environment_gives_what_the_command_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_case_file(tmp_path, case_text("bad", "fake:", "fake:plant_at=${ROW}"))
    assert run("case", "run", file).exit_code == 2
    monkeypatch.setenv("ROW", "5")
    assert "token 6" in run("case", "run", file).stdout
    assert "token 3" in run("case", "run", file, "--set", "ROW=2").stdout


def test_fail_fast_runs_nothing_after_the_first_that_does_not_pass(tmp_path: Path) -> None:
    result = run("case", "run", write_case_file(tmp_path, BAD, GOOD), "--fail-fast")
    assert result.exit_code == 1
    assert "SKIPPED      good" in result.stdout


def test_junit_holds_what_was_run(file: Path, tmp_path: Path) -> None:
    run("case", "run", file, "--junit", tmp_path / "out.xml")
    suite = ElementTree.parse(tmp_path / "out.xml").find("testsuite")
    assert suite is not None
    assert [suite.attrib[name] for name in ("tests", "failures", "errors")] == ["3", "1", "1"]


def test_a_folder_that_is_no_checkpoint_is_wrong_usage_and_starts_nothing(tmp_path: Path) -> None:
    file = write_case_file(tmp_path, case_text("lost", "reference:nowhere", "fake:"))
    result = run("case", "run", file)
    assert result.exit_code == 2
    assert str(tmp_path / "nowhere") in result.stderr


def test_a_coordinators_side_beside_a_side_of_this_machine_is_refused(tmp_path: Path) -> None:
    file = write_case_file(tmp_path, case_text("mixed", "backend:a", "fake:"))
    result = run("case", "run", file, "--coordinator", "127.0.0.1:1")
    assert result.exit_code == 1
    assert "backend:NAME or run:ID for both" in result.stdout


def test_a_mistake_in_a_file_is_told_before_any_case_runs(tmp_path: Path) -> None:
    file = write_case_file(tmp_path, GOOD, BAD + "gate: {}\n")
    result = run("case", "run", file)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{file}:14" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["case", "list"],
        ["case", "run"],
        ["run", "list"],
        ["comparison", "list"],
        ["job", "show", "job-1"],
        ["backend", "list"],
    ],
    ids=" ".join,
)
def test_a_coordinator_that_is_not_there_is_unavailable(arguments: list[str]) -> None:
    result = run(*arguments, "--coordinator", "127.0.0.1:1", "--timeout", "5")
    assert result.exit_code == 3
    assert "is a coordinator running there?" in result.stderr


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "grpc://"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    assert run("case", "list", "--coordinator", address).exit_code == 2


def test_certificates_without_tls_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("")
    result = run("backend", "list", "--coordinator", "127.0.0.1:1", "--ca-file", tmp_path / "ca.pem")
    assert result.exit_code == 2
    assert "grpcs://" in result.stderr


def test_a_coordinator_takes_no_case_with_a_side_of_this_machine(file: Path) -> None:
    result = run("case", "import", file, "--coordinator", "127.0.0.1:1")
    assert result.exit_code == 2
    assert "backend:NAME, run:ID" in result.stderr
