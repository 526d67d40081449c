"""Every module of the house says at its top what it is."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("dualtrace", "coordinator", "backend_torch", "backend_jax", "scripts", "tests")
GENERATED = ROOT / "dualtrace" / "v1"
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}

MODULES = sorted(
    path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if not path.is_relative_to(GENERATED)
)


def has_docstring(source: str) -> bool:
    return bool((ast.get_docstring(ast.parse(source)) or "").strip())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_what_it_is(path: Path) -> None:
    assert has_docstring(path.read_text(encoding="utf-8")), "write what it knows and what it must not know"


def test_a_module_without_a_docstring_is_found() -> None:
    assert not has_docstring("import os  # no docstring\n")


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert not [path for path in MODULES if path.stem in VAGUE or path.parent.name in VAGUE]
