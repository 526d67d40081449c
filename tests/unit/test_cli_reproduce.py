"""The last line of a verdict that is no PASS is a command: given to a shell it comes to the same verdict."""

import json
import shlex
from pathlib import Path

import pytest
from click.testing import Result

from tests.support.coordinated import case_text, run, write_case_file

TEXT = "it's now here; rm $HOME"
PLANTED = "fake:plant_at=5"


def command_of(result: Result) -> list[str]:
    """What the output says to run, as a shell would split it; without the program's own name."""
    assert result.exit_code in {1, 3}, result.output
    lines = result.stdout.rstrip().splitlines()
    told = [line.partition("reproduce: ")[2] for line in lines if "reproduce: " in line]
    words = shlex.split(told[-1] if told else lines[lines.index("reproduce with:") + 1])
    assert words[0] == "dualtrace"
    return words[1:]


def steady(text: str) -> list[str]:
    """The lines without times."""
    return [line.partition("  max diff")[0] for line in text.splitlines() if " s" not in line[-4:]]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--text", TEXT),
        ("--text", "a", "--text", TEXT, "--abs-epsilon", "1e-9"),
        ("--next", "hello", "--top-k", "3"),
        ("--query", "Is it ", "--item", "so", "--label", "a", "--label", "b"),
        ("--prompt", "The", "--completion", " answer is now here"),
    ],
    ids=["text", "two texts and a tolerance", "next", "labels", "pair"],
)
def test_compare_ends_with_the_command_that_repeats_it(arguments: tuple[str, ...]) -> None:
    first = run("compare", "fake:", "fake:seed=1", *arguments)
    again = run(*command_of(first))
    assert (again.exit_code, steady(again.stdout)) == (first.exit_code, steady(first.stdout))


def test_a_side_that_failed_is_repeated_too() -> None:
    first = run("compare", "fake:", "fake:fail_at=3", "--text", TEXT)
    assert run(*command_of(first)).exit_code == first.exit_code == 1


def test_diff_ends_with_the_command_that_repeats_it(tmp_path: Path) -> None:
    left, right = tmp_path / "the left.json", tmp_path / "right.json"
    run("compare", "fake:", PLANTED, "--text", TEXT, "--save-left", left, "--save-right", right)
    first = run("diff", left, right)
    assert run(*command_of(first)).stdout == first.stdout


def test_a_case_of_a_file_ends_with_the_command_that_repeats_it_alone(tmp_path: Path) -> None:
    file = write_case_file(
        tmp_path, case_text("good", "fake:", "fake:"), case_text("bad", "fake:", "fake:plant_at=${ROW}")
    )
    first = run("case", "run", file, "--set", "ROW=3", "--timeout", "60")
    again = run(*command_of(first), "--json")
    (case,) = json.loads(again.stdout)["cases"]
    assert (again.exit_code, case["name"], case["first_divergence_index"]) == (1, "bad", 4)


def test_what_engines_were_told_stands_in_the_command_of_a_case(tmp_path: Path) -> None:
    file = write_case_file(tmp_path, case_text("bad", "fake:", PLANTED))
    first = run("case", "run", file, "--adapter", "a=some folder", "--threads", "2")
    assert command_of(first)[-4:] == ["--threads", "2", "--adapter", "a=some folder"]


def test_a_pass_has_nothing_to_repeat() -> None:
    assert "reproduce" not in run("compare", "fake:", "fake:", "--text", TEXT).stdout
