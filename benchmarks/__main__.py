"""`python -m benchmarks [NAME ...]`: run all benchmarks or those named, print one table."""

from __future__ import annotations

import os
import sys

from benchmarks import (
    adapters,
    bodies,
    clients,
    coordinator,
    edgepatch,
    memory,
    rolling,
    shared_prompt,
    start,
    streaming,
)
from benchmarks.table import Missing, Row, print_rows

BENCHMARKS = {
    "shared_prompt": shared_prompt.measure,
    "edgepatch": edgepatch.measure,
    "rolling": rolling.measure,
    "adapters": adapters.measure,
    "bodies": bodies.measure,
    "clients": clients.measure,
    "memory": memory.measure,
    "start": start.measure,
    "streaming": streaming.measure,
    "coordinator": coordinator.measure,
}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"unknown benchmark {unknown[0]}; known are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    os.environ["HF_HUB_OFFLINE"] = "1"  # peers must read the model from here, or fail
    load_before = os.getloadavg()[0]
    rows: list[Row] = []
    for name in names or BENCHMARKS:
        print(f"measuring {name}, load {os.getloadavg()[0]:.1f} ...", file=sys.stderr)
        try:
            found = BENCHMARKS[name]()
        except Missing as reason:
            found = [Row(name, "", "not measured", note=str(reason))]
        for row in found:
            print(f"  {row.what.strip()}: {row.seen}", file=sys.stderr)
        rows += found
    print_rows(rows, load_before)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
