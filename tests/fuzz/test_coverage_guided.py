"""Every parser of foreign bytes survives a bounded coverage-guided run; `make test-all` runs it longer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dualtrace.masks.arrays import npy_bytes
from dualtrace.masks.spec import MaskSpec
from dualtrace.questions.asked import Input, MaskedForwardQuestion, Variant
from dualtrace.views import finetuned
from dualtrace.wire.questions import masked_forward_to_pb

SCRIPT = Path(__file__).with_name("coverage_guided.py")
PARSERS = ("mask-json", "npy", "request", "run", "safetensors", "fake-spec")
MEGABYTES = 2048


def seeds(parser: str) -> list[bytes]:
    """Well-formed inputs to start from: what is beyond the first check is found sooner."""
    match parser:
        case "mask-json":
            edge = {"queries": {"tokens": [2, 4]}, "keys": {"tokens": [0, 1]}, "layers": [0], "heads": [1]}
            masks = [{"version": 1, "base": {"sliding": {"keys_back": 2, "keys_ahead": 0}}, "edges": [edge]}]
            return [json.dumps(mask).encode() for mask in masks]
        case "npy":
            return [npy_bytes(np.tril(np.ones((3, 3), np.bool_)))]
        case "request":
            question = MaskedForwardQuestion(
                Input(text="a b"), (Variant(mask=MaskSpec()), Variant(view=finetuned("x")))
            )
            return [masked_forward_to_pb(question).SerializeToString()]
        case "fake-spec":
            return [b"vocab=64,seed=1,step_ms=5"]
        case _:
            return []


def fuzz(parser: str, seconds: int, corpus: Path) -> None:
    corpus.mkdir()
    for number, seed in enumerate(seeds(parser)):
        (corpus / f"seed-{number}").write_bytes(seed)
    command = [sys.executable, str(SCRIPT), parser, f"-max_total_time={seconds}", f"-rss_limit_mb={MEGABYTES}",
               "-timeout=10", "-max_len=4096", "-print_final_stats=1", str(corpus)]  # fmt: skip
    root = SCRIPT.parent.parent.parent
    environ = os.environ | {"PYTHONPATH": str(root)}
    ended = subprocess.run(
        command, cwd=corpus, env=environ, capture_output=True, text=True, timeout=seconds + 60, check=False
    )
    assert ended.returncode == 0, f"{parser}:\n{ended.stderr[-4000:]}"
    assert "stat::number_of_executed_units" in ended.stderr, "it never ran"


@pytest.mark.fuzz
@pytest.mark.parametrize("parser", PARSERS)
def test_a_parser_of_foreign_bytes_only_ever_refuses_with_a_problem(parser: str, tmp_path: Path) -> None:
    fuzz(parser, 6, tmp_path / "corpus")


@pytest.mark.fuzz
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("parser", PARSERS)
def test_a_parser_of_foreign_bytes_survives_a_long_run(parser: str, tmp_path: Path) -> None:
    fuzz(parser, 120, tmp_path / "corpus")
