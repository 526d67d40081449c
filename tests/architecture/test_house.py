"""The tools look at all of the house: types, sizes and documents are checked wherever there is code."""

import os
import re
import tomllib
from pathlib import Path

import click

from scripts.check_docs import find_gaps
from scripts.check_sizes import FILE_LINES, FOLDERS, FUNCTION_LINES, find_oversize, measure_functions

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def list_code_folders() -> set[str]:
    folders = (path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
    return {path.name for path in folders if path.name not in {"build", "dist", "out"} and any(path.rglob("*.py"))}


def list_functions(lines: int, head: str = "") -> str:
    return f"def long():{head}\n" + "    x = 1\n" * (lines - 1)


def find_in(source: str) -> list[str]:
    return find_oversize("planted.py", source, measure_functions(source))


def find_cli_gaps(page: str, help_text: str, option_help: str) -> list[str]:
    root = click.Group("dualtrace", help="the root")
    option = click.Option(["--seed"], help=option_help)
    root.add_command(click.Command("next", help=help_text, params=[option]))
    return find_gaps(root, "dualtrace", page)


def test_types_are_checked_wherever_there_is_code() -> None:
    assert list_code_folders() <= set(PROJECT["tool"]["mypy"]["files"])


def test_sizes_are_checked_wherever_there_is_code_but_tests() -> None:
    assert list_code_folders() - {"tests"} <= set(FOLDERS)


def test_constraints_are_exact_versions_and_nothing_else() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines
    assert not [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)]


def test_no_cuda_package_is_pinned() -> None:
    assert not re.findall(r"(?im)^(?:nvidia|cuda|triton).*$", (ROOT / "constraints.txt").read_text())


def test_torch_is_pinned_to_the_very_version() -> None:
    assert "torch==2.13.0" in PROJECT["project"]["optional-dependencies"]["torch"]


def test_neither_framework_is_a_base_dependency() -> None:
    base = {re.split(r"[<>=!\[ ]", line)[0] for line in PROJECT["project"]["dependencies"]}
    assert not base & {"torch", "jax", "jaxlib", "flax", "transformers", "accelerate"}


def test_what_ci_runs_is_check_and_test_and_can_be_run() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.findall(r"^make .*$", script.read_text(), re.MULTILINE) == ["make check", "make test"]


def test_a_function_of_the_allowed_length_passes() -> None:
    assert find_in(list_functions(FUNCTION_LINES)) == []


def test_a_function_that_is_too_long_is_found() -> None:
    assert any("long has" in line for line in find_in(list_functions(FUNCTION_LINES + 1)))


def test_a_long_function_that_says_why_passes() -> None:
    assert find_in(list_functions(FUNCTION_LINES + 1, "  # Long because it is a table")) == []


def test_a_file_that_is_too_long_is_found() -> None:
    assert any("split it" in line for line in find_in("x = 1\n" * (FILE_LINES + 1)))


def test_a_long_file_that_says_why_passes() -> None:
    assert find_in('"""Long because it is one table."""\n' + "x = 1\n" * FILE_LINES) == []


def test_a_documented_command_has_no_gaps() -> None:
    assert find_cli_gaps("use `dualtrace next`", "what comes next", "the seed") == []


def test_a_command_without_help_is_found() -> None:
    assert find_cli_gaps("use `dualtrace next`", "", "the seed") == ["`dualtrace next` has no help text"]


def test_an_option_without_help_is_found() -> None:
    assert find_cli_gaps("use `dualtrace next`", "what", "") == ["`dualtrace next --seed` has no help text"]


def test_a_command_that_the_page_does_not_name_is_found() -> None:
    gaps = find_cli_gaps("use `dualtrace next-token`", "what", "the seed")
    assert gaps == ["`dualtrace next` does not appear in docs/cli.md"]
