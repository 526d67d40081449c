"""Coverage-guided fuzzing of one parser of foreign bytes: `python coverage_guided.py PARSER -max_total_time=SECONDS`.

Run as a process of its own, because libFuzzer ends its process. The only way a parser may refuse is a Problem.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["dualtrace"], enable_loader_override=False):
    from google.protobuf.message import DecodeError

    from dualtrace.checkpoint import read_safetensors_header
    from dualtrace.fake import parse_spec
    from dualtrace.masks.arrays import read_npy
    from dualtrace.masks.json_form import parse_json
    from dualtrace.problems import Problem
    from dualtrace.runs.run import read_run
    from dualtrace.v1 import scoring_pb2 as pb
    from dualtrace.wire import questions


REQUESTS: tuple[tuple[Any, Callable[[Any], object]], ...] = (
    (pb.MaskedForwardRequest, questions.masked_forward_from_pb),
    (pb.ScoreRequest, questions.score_from_pb),
)


def _request(data: bytes) -> None:
    for kind, translate in REQUESTS:
        with contextlib.suppress(DecodeError):
            translate(kind.FromString(data))


_SCRATCH = Path(tempfile.mkdtemp(prefix="dualtrace-fuzz-")) / "file"


def _safetensors(data: bytes) -> None:
    _SCRATCH.write_bytes(data)
    read_safetensors_header(_SCRATCH)


PARSERS: dict[str, Callable[[bytes], object]] = {
    "mask-json": lambda data: parse_json(data),
    "npy": lambda data: read_npy(data),
    "request": _request,
    "run": lambda data: read_run(data.decode(errors="replace")),
    "safetensors": _safetensors,
    "fake-spec": lambda data: parse_spec(data.decode(errors="replace")),
}


def main() -> None:
    parser = PARSERS[sys.argv[1]]

    def one_input(data: bytes) -> None:
        with contextlib.suppress(Problem):
            parser(data)

    atheris.Setup([sys.argv[0], *sys.argv[2:]], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
