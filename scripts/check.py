"""Runs every check of `make check`, all of them even when one fails, and exits 1 when any did.

It knows which tools there are and what each is for. It must not know how any tool decides.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(sys.executable).parent
BASELINE = "protos/baseline.binpb"


@dataclass(frozen=True)
class Step:
    """One check: what it looks at, the command, and what to do when it fails."""

    says: str
    command: tuple[str, ...]
    remedy: str


def tool(name: str, *arguments: str) -> tuple[str, ...]:
    """A command of this very environment."""
    return (str(TOOLS / name), *arguments)


def script(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, f"scripts/{name}.py", *arguments)


STEPS = (
    Step("format (ruff)", tool("ruff", "format", "--check", "--output-format", "concise", "."), "make format"),
    Step(
        "lint (ruff)",
        tool("ruff", "check", "--output-format", "concise", "."),
        "make format mends some of them; mend the rest by hand",
    ),
    Step("types (mypy --strict)", tool("mypy"), "mend them by hand"),
    Step(
        "who may import whom (import-linter)",
        tool("lint-imports", "--no-logo"),
        "see [tool.importlinter] in pyproject.toml",
    ),
    Step("protos: style (buf lint)", tool("buf", "lint", "protos"), "mend the .proto files"),
    Step(
        "protos: nothing served breaks (buf breaking)",
        tool("buf", "breaking", "protos", "--against", BASELINE),
        "undo the break; `make protos-baseline` makes the protos as they are the new baseline",
    ),
    Step("protos: generated code is fresh", script("generate_protos", "--check"), "make protos"),
    Step("every command has help and is documented", script("check_docs"), "help texts in dualtrace/cli, docs/cli.md"),
    Step("the map in README.md is that of the tree", script("readme_map", "--check"), "make map"),
    Step("files and functions are small", script("check_sizes"), "split what is named"),
)


def run_step(step: Step) -> bool:
    """Run one step, print its name and verdict, and its output when it failed."""
    print(f"check: {step.says} ... ", end="", flush=True)
    start_seconds = time.monotonic()
    done = subprocess.run(
        step.command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    passed = done.returncode == 0
    print(f"{'PASS' if passed else 'FAIL'} ({time.monotonic() - start_seconds:.1f} s)", flush=True)
    if not passed:
        print("    " + done.stdout.strip().replace("\n", "\n    "))
        print(f"    what to do: {step.remedy}", flush=True)
    return passed


def main() -> int:
    failed = [step.says for step in STEPS if not run_step(step)]
    if failed:
        print(f"check: FAIL, {len(failed)} of {len(STEPS)} steps: {'; '.join(failed)}")
        return 1
    print(f"check: PASS, all {len(STEPS)} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
