"""Keeps the map in README.md: one line a file, taken from each module's own docstring. `--check` only compares."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- map: made by `make map` -->", "<!-- end of map -->"
PACKAGES = ("dualtrace", "backend_torch", "backend_jax", "coordinator", "benchmarks", "scripts")
GENERATED = "dualtrace/v1/"


def list_modules() -> list[Path]:
    """Python files of the packages that git knows or would take, in the order of a reader: folders after files."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *PACKAGES]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    found = {Path(name) for name in names if name.endswith(".py") and not name.startswith(GENERATED)}
    present = [path for path in found if (ROOT / path).is_file()]
    return sorted(present, key=lambda path: (path.parent.as_posix(), path.name != "__init__.py", path.name))


def first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""
    return docstring.split("\n", 1)[0].strip()


def make_map() -> str:
    lines = []
    for path in list_modules():
        name = path.parent.as_posix() + "/" if path.name == "__init__.py" else path.name
        indent = "" if path.name == "__init__.py" else "  "
        lines.append(f"{indent}{name:<{26 - len(indent)}} {first_line(path)}".rstrip())
    return "\n".join([BEGIN, "```", *lines, "```", END])


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        print("README.md has no place for the map", file=sys.stderr)
        return 1
    before, rest = text.split(BEGIN, 1)
    fresh = before + make_map() + rest.split(END, 1)[1]
    if "--check" in sys.argv[1:]:
        if fresh != text:
            print("the map in README.md is not that of the tree; run `make map`", file=sys.stderr)
        return int(fresh != text)
    readme.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
