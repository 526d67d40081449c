"""Keeps the rooms small: files to 400 lines, functions to 50, nine functions in ten under 35.

A file or function that must be longer says so at its head: a first docstring or comment line with "Long because".
It knows Python's syntax. It must not know what any file is for.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("dualtrace", "coordinator", "backend_torch", "backend_jax", "scripts", "benchmarks")
GENERATED = Path("dualtrace/v1")

FILE_LINES = 400
FUNCTION_LINES = 50
USUAL_LINES = 35  # nine functions in ten are shorter
EXCUSE = "long because"


@dataclass(frozen=True)
class Function:
    """A function and how long it is."""

    name: str
    line: int
    lines: int
    excused: bool


def is_excused(source: list[str], first: int, docstring: str | None) -> bool:
    """Whether line `first` (0-based) or the docstring's first line says why so long."""
    head = source[first] if first < len(source) else ""
    said = [head.partition("#")[2], (docstring or "").strip().partition("\n")[0]]
    return any(EXCUSE in text.lower() for text in said)


def measure_functions(text: str) -> list[Function]:
    """Every function of a file, nested ones too."""
    source = text.splitlines()
    functions = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            excused = is_excused(source, node.lineno - 1, ast.get_docstring(node))
            functions.append(Function(node.name, node.lineno, lines, excused))
    return functions


def find_oversize(path: str, text: str, functions: Iterable[Function]) -> list[str]:
    """One line for each thing of a file that is too long and does not say why."""
    lines = text.splitlines()
    found = []
    if len(lines) > FILE_LINES and not is_excused(lines, 0, ast.get_docstring(ast.parse(text))):
        found.append(f"{path}: {len(lines)} lines, {FILE_LINES} are allowed; split it")
    for function in functions:
        if function.lines > FUNCTION_LINES and not function.excused:
            where = f"{path}:{function.line}"
            found.append(f"{where}: {function.name} has {function.lines} lines, {FUNCTION_LINES} are allowed; split it")
    return found


def find_sources(root: Path) -> list[Path]:
    """The hand-written files, relative to the root."""
    paths = (path.relative_to(root) for folder in FOLDERS for path in (root / folder).rglob("*.py"))
    return sorted(path for path in paths if not path.is_relative_to(GENERATED))


def main() -> int:
    found: list[str] = []
    functions: list[Function] = []
    sources = find_sources(ROOT)
    for path in sources:
        text = (ROOT / path).read_text(encoding="utf-8")
        here = measure_functions(text)
        functions += here
        found += find_oversize(str(path), text, here)
    usual = sum(function.lines < USUAL_LINES for function in functions)
    if usual < 0.9 * len(functions):
        found.append(f"only {usual} of {len(functions)} functions are under {USUAL_LINES} lines; nine in ten should be")
    print(*found, sep="\n", end="\n" if found else "")
    print(f"{len(sources)} files, {len(functions)} functions, {usual} of them under {USUAL_LINES} lines")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
