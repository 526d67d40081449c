"""Writes the Python code of the protos: messages, services and their types, straight from the compiler.

It knows where protos and generated code live, and nothing about what they say. With `--check` it writes into a
temporary folder and says what in the tree differs, so that nobody edits generated code or forgets to renew it.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
PACKAGE = Path("dualtrace/v1")  # below protos/ and below the root alike: the proto package is the import path

INIT = (
    '"""Generated from protos/dualtrace/v1 by `make protos`; never edited. It knows nothing else of this package."""\n'
)


def find_plugin(name: str) -> str:
    """The protoc plugin of this very environment; the one that PATH would give may be of another version."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"generate_protos: {name} is not installed; run `make protos`, which installs it")
    return found


def generate(into: Path) -> list[Path]:
    """Generate everything below `into` and give the paths written, relative to it, sorted."""
    sources = sorted(path.relative_to(PROTOS) for path in (PROTOS / PACKAGE).glob("*.proto"))
    if not sources:
        raise SystemExit(f"generate_protos: no .proto file in protos/{PACKAGE}")
    arguments = [
        "protoc",
        f"--proto_path={PROTOS}",
        f"--proto_path={resources.files('grpc_tools') / '_proto'}",
        f"--plugin=protoc-gen-mypy={find_plugin('protoc-gen-mypy')}",
        f"--plugin=protoc-gen-mypy_grpc={find_plugin('protoc-gen-mypy_grpc')}",
        f"--python_out={into}",
        f"--grpc_python_out={into}",
        f"--mypy_out=quiet:{into}",
        f"--mypy_grpc_out=quiet:{into}",
        *(source.as_posix() for source in sources),
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("generate_protos: the compiler refused the protos; the lines above say why")
    (into / PACKAGE / "__init__.py").write_text(INIT)
    return sorted(path.relative_to(into) for path in (into / PACKAGE).iterdir())


def find_generated(root: Path) -> set[Path]:
    """What stands in the generated folder of a tree."""
    return {path.relative_to(root) for path in (root / PACKAGE).glob("*") if path.suffix in {".py", ".pyi"}}


def find_stale(fresh: Path, written: list[Path], root: Path) -> list[str]:
    """One line for each file of the tree that differs from the fresh one."""
    lines = []
    for path in written:
        if not (root / path).exists():
            lines.append(f"{path} is missing")
        elif not filecmp.cmp(fresh / path, root / path, shallow=False):
            lines.append(f"{path} differs from what the protos say")
    leftovers = find_generated(root) - set(written)
    return lines + [f"{path} comes from no proto" for path in sorted(leftovers)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the tree is stale")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        written = generate(fresh)
        stale = find_stale(fresh, written, ROOT)
        if check:
            print(*stale, sep="\n", end="\n" if stale else "")
            print("run `make protos` and commit the result" if stale else f"{len(written)} generated files are fresh")
            return 1 if stale else 0
        (ROOT / PACKAGE).mkdir(parents=True, exist_ok=True)
        for leftover in find_generated(ROOT) - set(written):
            os.remove(ROOT / leftover)
        for path in written:
            shutil.copyfile(fresh / path, ROOT / path)
    print(f"wrote {len(written)} files into {PACKAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
