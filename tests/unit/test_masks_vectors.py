"""The vectors any implementation can replay: replayed here, and the small ones checked against hand-written answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualtrace.masks import packing
from dualtrace.masks.json_form import digest, parse_json, to_json
from dualtrace.masks.plan import MaskPlan, compile_mask
from dualtrace.masks.receipt import effective_mask_digest, expected_counts, mix
from dualtrace.masks.resolve import Geometry, MaskContext, resolve
from dualtrace.masks.spec import SegmentName

ROOT = Path(__file__).resolve().parents[2]
MASKS: dict[str, Any] = json.loads((ROOT / "protos" / "vectors" / "masks.json").read_text())
PACKED: dict[str, Any] = json.loads((ROOT / "protos" / "vectors" / "masks_packed.json").read_text())
CASES = {case["name"]: case for case in MASKS["cases"]}

# Written by hand from semantics.md, not by any program: layer 0, head 0.
BY_HAND: dict[str, list[list[list[int]]]] = {
    "causal": [[[0, 1]], [[0, 2]], [[0, 3]], [[0, 4]]],
    "full_leaks_everywhere_but_at_the_end": [[[0, 4]]] * 4,
    "bidirectional_prefix": [[[0, 3]], [[0, 3]], [[0, 3]], [[0, 4]], [[0, 5]]],
    "bidirectional_prefix_of_a_named_segment": [[[0, 2]], [[0, 2]], [[0, 3]], [[0, 4]], [[0, 5]]],
    "sliding_counts_the_query_itself": [[[0, 1]], [[0, 2]], [[1, 3]], [[2, 4]], [[3, 5]]],
    "sliding_ahead": [[[0, 2]], [[0, 3]], [[1, 4]], [[2, 5]], [[3, 5]]],
    "chunked": [[[0, 1]], [[0, 2]], [[2, 3]], [[2, 4]], [[4, 5]]],
    "chunked_behind_a_prefix_token": [[[0, 1]], [[0, 2]], [[0, 3]], [[3, 4]], [[3, 5]]],
    "documents": [[[0, 1]], [[0, 2]], [[2, 3]], [[3, 4]], [[3, 5]]],
    "documents_that_come_back": [[[0, 1]], [[0, 2]], [[2, 3]], [[0, 2], [3, 4]], [[2, 3], [4, 5]]],
    "array": [[[0, 1], [2, 3]], [[1, 2], [3, 4]], [[0, 1], [2, 3]], [[1, 2], [3, 4]]],
    "edges_at_some_layers_and_heads": [[[0, 1]], [[0, 2]], [[1, 3]], [[1, 4]], [[1, 5]], [[1, 6]]],
    "edges_of_characters": [[[0, 1]], [[0, 2]], [[0, 3]], [[3, 4]], [[3, 5]]],
    "an_empty_row_is_zero": [[], [], [[0, 3]]],
    "native_windows_are_anded": [[[0, 2]], [[0, 3]], [[1, 4]], [[2, 5]], [[3, 5]]],
    "windows_measure_positions_not_indices": [[[0, 1]], [[0, 2]], [[1, 3]], [[2, 4]], [[1, 5]], [[2, 6]]],
}


def plan_of(case: dict[str, Any]) -> MaskPlan:
    given = case["context"]
    starts, ends, positions = (
        np.array(given[name], np.int32) if name in given else None for name in ("starts", "ends", "positions")
    )
    context = MaskContext(
        given["length"],
        Geometry(given.get("layers", 1), given.get("heads", 1), tuple(given.get("windows", ()))),
        prefix=given.get("prefix", 0),
        starts=starts,
        ends=ends,
        positions=positions,
        segments={SegmentName(name): (start, end) for name, (start, end) in given.get("segments", {}).items()},
    )
    return compile_mask(resolve(parse_json(case["mask"]), context), allow_empty_rows=True)


def tables_of(plan: MaskPlan) -> list[dict[str, Any]]:
    counts = expected_counts(plan)
    tables = []
    for layer, head in np.ndindex(plan.layers, plan.heads):
        zeroed = plan.rule(layer, head).zeroed
        tables.append(
            {
                "layer": layer,
                "head": head,
                "rows": [[list(run) for run in plan.row_runs(layer, head, q)] for q in range(plan.length)],
                "zeroed_rows": [
                    [list(run) for run in zeroed.row(q)] if zeroed is not None else [] for q in range(plan.length)
                ],
                "empty_rows": plan.empty_rows(layer, head).tolist(),
                "allowed": [int(c[layer, head]) for c in (counts.allowed, counts.sum_a, counts.sum_b)],
                "zeroed": [int(c[layer, head]) for c in (counts.zeroed, counts.zeroed_sum_a, counts.zeroed_sum_b)],
            }
        )
    return tables


@pytest.mark.parametrize("name", CASES)
def test_a_mask_vector_is_replayed_by_the_compiler(name: str) -> None:
    case, plan = CASES[name], plan_of(CASES[name])
    assert {
        "digest": digest(plan.resolved.spec),
        "positions": plan.resolved.positions.tolist(),
        "unscored": [entry.token for entry in plan.unscored()],
        "step_ends": plan.step_ends().tolist(),
        "leaks": list(plan.leaks()),
        "effective_mask_digest": effective_mask_digest(plan),
        "tables": tables_of(plan),
    } == case["expected"]


@pytest.mark.parametrize("name", CASES)
def test_a_mask_vectors_canonical_form_is_ours(name: str) -> None:
    assert to_json(parse_json(CASES[name]["mask"])) == CASES[name]["canonical"]


@pytest.mark.parametrize("name", BY_HAND)
def test_a_mask_vector_says_what_was_worked_out_by_hand(name: str) -> None:
    assert CASES[name]["expected"]["tables"][0]["rows"] == BY_HAND[name]


@pytest.mark.parametrize("place", MASKS["mix"], ids=lambda place: f"{place['q']},{place['k']}")
def test_a_mix_vector_is_replayed(place: dict[str, int]) -> None:
    tables, q, k = mix(131_072), place["q"], place["k"]
    assert int(tables.f_a[q]) * int(tables.g_a[k]) % 2**32 == place["a"]
    assert int(tables.f_b[q]) * int(tables.g_b[k]) % 2**32 == place["b"]


@pytest.mark.parametrize("case", PACKED["cases"], ids=lambda case: f"{case['delimiters']} {case['convention']}")
def test_a_packed_vector_is_replayed(case: dict[str, Any]) -> None:
    delimiters, length, convention = case["delimiters"], case["length"], packing.Convention(case["convention"])
    positions = packing.positions(delimiters, length, convention)
    context = MaskContext(length, Geometry(1, 1), positions=positions)
    plan = compile_mask(resolve(packing.mask(delimiters, length, convention), context))
    assert positions.tolist() == case["positions"]
    assert [[list(run) for run in plan.row_runs(0, 0, q)] for q in range(length)] == case["rows"]
    assert list(packing.read_rows(delimiters, length, convention)) == case["read_rows"]
    assert digest(plan.resolved.spec) == case["digest"]


def test_the_vectors_are_what_the_script_writes() -> None:
    script = ROOT / "scripts" / "make_mask_vectors.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
