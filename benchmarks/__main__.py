"""`python -m benchmarks [NAME ...]`: run all benchmarks or those named, print one table."""

from __future__ import annotations

import sys

from benchmarks import streaming
from benchmarks.table import print_rows

BENCHMARKS = {"streaming": streaming.measure}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"unknown benchmark {unknown[0]}; known are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    rows = []
    for name in names or BENCHMARKS:
        print(f"measuring {name} ...", file=sys.stderr)
        rows += BENCHMARKS[name]()
    print_rows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
