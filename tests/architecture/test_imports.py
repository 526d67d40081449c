"""What import-linter cannot say: the pure rooms stay pure, and no framework arrives through somebody else's package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAMEWORKS = {"torch", "jax", "jaxlib", "flax", "transformers"}
IMPURE = {"asyncio", "grpc", "grpc_status", "google", "socket", "subprocess", "threading"}
PURE = ("compare", "masks", "batching", "questions", "runs", "cases")

LOAD_ALL = """
import importlib, pkgutil, sys
for package in sys.argv[1:]:
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def list_imports(source: str) -> set[str]:
    """The top-level packages a source imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
    return found


def list_pure_modules() -> list[Path]:
    folder = ROOT / "dualtrace"
    return sorted(path for name in PURE for path in [*folder.glob(f"{name}.py"), *(folder / name).rglob("*.py")])


@pytest.mark.parametrize("path", list_pure_modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_pure_module_imports_nothing_that_waits_or_talks(path: Path) -> None:
    assert not list_imports(path.read_text(encoding="utf-8")) & IMPURE


@pytest.mark.parametrize("planted", ["import grpc.aio", "from asyncio import Queue", "def f():\n    import asyncio"])
def test_a_planted_import_is_found(planted: str) -> None:
    assert list_imports(planted) & IMPURE


def test_loading_every_module_loads_no_framework() -> None:
    command = [sys.executable, "-c", LOAD_ALL, "dualtrace", "coordinator"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & FRAMEWORKS
