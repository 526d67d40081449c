"""`dualtrace case create` out of options: what it writes down, and what it refuses before anybody is asked."""

import json
from pathlib import Path

import pytest

from dualtrace.cases.files import find_cases
from dualtrace.library import Case
from dualtrace.questions.asked import NextTokenQuestion, RollingQuestion, ScoreQuestion
from tests.support.coordinated import case_text, run, write_case_file
from tests.support.tiny import tiny_model

NOWHERE = ("--coordinator", "127.0.0.1:1")


def written(file: Path, *words: str) -> Case:
    result = run("case", "create", *words, "--file", file)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{file}\n"
    (filed,) = find_cases([file])
    return filed.case


def test_a_question_and_two_sides_become_a_case_file(tmp_path: Path) -> None:
    case = written(
        tmp_path / "new" / "greeting.yaml", "greeting", "fake:", "fake:seed=1", "--text", "hello", "--tag", "smoke",
        "--description", "says hello", "--tolerance", "float32-highest", "--max-mismatches", "3",
    )  # fmt: skip
    assert (case.name, case.tags, case.description) == ("greeting", ("smoke",), "says hello")
    assert (case.left.target, case.right.target) == ("fake:", "fake:seed=1")
    assert isinstance(case.question, RollingQuestion)
    assert case.question.inputs[0].text == "hello"
    assert case.tolerance is not None
    assert (case.tolerance.name, case.policy.max_token_mismatches) == ("float32-highest", 3)


def test_the_case_that_was_written_runs(tmp_path: Path) -> None:
    written(tmp_path / "a.yaml", "a", "fake:", "fake:plant_at=2", "--text", "hello the answer")
    result = run("case", "run", tmp_path / "a.yaml", "--json")
    assert (result.exit_code, json.loads(result.stdout)["cases"][0]["first_divergence_index"]) == (1, 3)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (("--next", "once"), NextTokenQuestion),
        (("--query", "q", "--item", "i", "--labels", "5,6"), ScoreQuestion),
    ],
    ids=["next", "score"],
)
def test_every_kind_of_question_can_be_written_down(tmp_path: Path, options: tuple[str, ...], kind: type) -> None:
    assert isinstance(written(tmp_path / "a.yaml", "a", "fake:", *options).question, kind)


def test_without_right_both_sides_are_left_and_a_mask_may_be_of_one(tmp_path: Path) -> None:
    mask = tmp_path / "window.json"
    mask.write_text('{"base": {"sliding": {"keys_back": 2}}}')
    case = written(tmp_path / "a.yaml", "a", "fake:", "--text", "b", "--right-mask", str(mask), "--left-view", "base")
    assert case.left.target == case.right.target == "fake:"
    assert case.left.variant.mask is None
    assert case.right.variant.mask is not None


def test_a_relative_folder_is_meant_from_where_the_case_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").symlink_to(tiny_model())
    monkeypatch.chdir(tmp_path)
    case = written(Path("cases/a.yaml"), "a", "reference:model", "reference:${OTHER}", "--text", "b")
    assert (case.left.target, case.right.target) == ("reference:../model", "reference:${OTHER}")


def test_a_file_that_is_there_is_replaced_on_demand_alone(tmp_path: Path) -> None:
    arguments = ("case", "create", "a", "fake:", "--text", "b", "--file", tmp_path / "a.yaml")
    assert [run(*arguments).exit_code, run(*arguments).exit_code, run(*arguments, "--force").exit_code] == [0, 2, 0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a", "fake:", "--text", "b"), "give --file FILE.yaml"),
        (("a", "--text", "b"), "needs its NAME, LEFT"),
        (("nowhere.yaml",), "to make a new case give a question"),
        (("a b", "fake:", "--text", "b", "--file", "x.yaml"), "is no name"),
        (("a", "fake:", "--text", "b", "--tolerance", "loose"), "float32-highest"),
        (("a", "fake:", "--text", "b", "--tolerance", "float64", "--abs-epsilon", "1"), "has its own numbers"),
        (("a", "fake:", "--query", "q", "--item", "i", "--label", "yes", "--file", "x.yaml"), "dualtrace tokenize"),
        (("a", "backend:x", "--text", "b", "--softmax"), "--softmax"),
    ],
)
def test_what_makes_no_case_is_refused_before_anybody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("case", "create", *arguments, *NOWHERE)
    assert (result.exit_code, said in result.stderr) == (2, True), result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [("--tag", "smoke"), ("--tolerance", "float64"), ("--max-mismatches", "5"), ("--top-k", "3"), ("--force",)],
)
def test_files_take_no_options_of_a_new_case(tmp_path: Path, options: tuple[str, ...]) -> None:
    file = write_case_file(tmp_path, case_text("a", "backend:x", "backend:y"))
    result = run("case", "create", file, *options, *NOWHERE)
    assert (result.exit_code, "leave the options of a new case" in result.stderr) == (2, True)


def test_a_mask_from_standard_input_is_that_of_both_sides(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    words = ("a", "fake:", "fake:", "--text", "b", "--mask", "-", "--file", file)
    result = run("case", "create", *words, stdin='{"base": {"sliding": {"keys_back": 4}}}')
    assert result.exit_code == 0, result.output
    (filed,) = find_cases([file])
    assert filed.case.left.variant.mask == filed.case.right.variant.mask is not None


def test_standard_input_is_one_file_only(tmp_path: Path) -> None:
    words = ("a", "fake:", "fake:", "--text-file", "-", "--mask", "-", "--file", tmp_path / "a.yaml")
    result = run("case", "create", *words, stdin="text")
    assert (result.exit_code, "one standard input" in result.stderr) == (2, True)


def test_a_side_that_is_filled_in_later_stands_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    result = run("case", "create", "a", "fake:", "${RUNS}/a.json", "--text", "b", "--file", file)
    assert result.exit_code == 0, result.output
    assert "${RUNS}/a.json" in file.read_text()
