"""Writes protos/vectors/masks.json and masks_packed.json from the naive oracle and from brute force.

It must not use the compiler (`rules`, `runs`, `plan`) or the receipt's own arithmetic: the vectors are what those are
tested against. The small cases are checked by hand in tests/unit/test_masks_vectors.py.

    python scripts/make_mask_vectors.py [--check]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dualtrace.masks import packing
from dualtrace.masks.json_form import digest, parse_json, to_json
from dualtrace.masks.naive import may_see, sees_nothing
from dualtrace.masks.resolve import Geometry, MaskContext, ResolvedMask, document_starts, resolve
from dualtrace.masks.spec import SegmentName

FOLDER = Path(__file__).resolve().parent.parent / "protos" / "vectors"
Case = dict[str, Any]
CAUSAL: Case = {"causal": {}}


def edge(queries: list[int], keys: list[int], **rest: Any) -> Case:
    return {"queries": {"tokens": queries}, "keys": {"tokens": keys}, **rest}


CHECKERBOARD = [[(q + k) % 2 == 0 for k in range(4)] for q in range(4)]
MASKS: list[tuple[str, Case, Case]] = [
    ("causal", {"base": CAUSAL}, {"length": 4}),
    ("full_leaks_everywhere_but_at_the_end", {"base": {"full": {}}}, {"length": 4}),
    ("bidirectional_prefix", {"base": {"bidirectional_prefix": {"n": 3}}}, {"length": 5}),
    (
        "bidirectional_prefix_of_a_named_segment",
        {"base": {"bidirectional_prefix": {"span": {"segment": "query"}}}},
        {"length": 5, "segments": {"query": [1, 2]}},
    ),
    ("sliding_counts_the_query_itself", {"base": {"sliding": {"keys_back": 2}}}, {"length": 5}),
    ("sliding_ahead", {"base": {"sliding": {"keys_back": 2, "keys_ahead": 1}}}, {"length": 5, "layers": 2}),
    ("chunked", {"base": {"chunked": {"size": 2}}}, {"length": 5}),
    ("chunked_behind_a_prefix_token", {"base": {"chunked": {"size": 2}}}, {"length": 5, "prefix": 1}),
    ("documents", {"base": {"doc_isolation": {"boundaries": [2, 3]}}}, {"length": 5}),
    (
        "documents_with_reset_positions_and_a_native_window",
        {"base": {"doc_isolation": {"boundaries": [4], "reset_positions": True}}},
        {"length": 8, "layers": 2, "windows": [3, None]},
    ),
    ("documents_that_come_back", {"base": {"doc_isolation": {"segment_ids": [7, 7, 9, 7, 9]}}}, {"length": 5}),
    ("array", {"base": {"array": {"matrix": CHECKERBOARD}}}, {"length": 4}),
    (
        "array_per_head",
        {"base": {"array": {"matrix": [CHECKERBOARD, [[k <= q for k in range(4)] for q in range(4)]]}}},
        {"length": 4, "heads": 2},
    ),
    (
        "array_per_layer_and_head",
        {"base": {"array": {"matrix": [[[[1, 0], [1, 1]]], [[[1, 1], [0, 1]]]]}}},
        {"length": 2, "layers": 2},
    ),
    (
        "all_any_not_minus",
        {
            "base": {
                "minus": {
                    "from": {
                        "any": [{"sliding": {"keys_back": 3}}, {"all": [CAUSAL, {"not": {"chunked": {"size": 4}}}]}]
                    },
                    "take": {"sliding": {"keys_back": 1}},
                }
            },
            "empty_row": "ZERO",
        },
        {"length": 7},
    ),
    (
        "edges_at_some_layers_and_heads",
        {
            "base": CAUSAL,
            "edges": [
                edge([4, 6], [1, 3], layers=[1]),
                edge([2, 6], [0, 1], heads=[0]),
                edge([5, 6], [4, 5], layers=[0], heads=[1], mode="POST_SOFTMAX_ZERO"),
            ],
        },
        {"length": 6, "layers": 2, "heads": 2},
    ),
    (
        "a_post_softmax_edge_still_counts_as_seen",
        {"base": {"full": {}}, "edges": [edge([0, 2], [2, 4], mode="POST_SOFTMAX_ZERO")]},
        {"length": 4},
    ),
    (
        "edges_of_characters",
        {
            "base": CAUSAL,
            "edges": [
                {"queries": {"segment": "completion"}, "keys": {"chars": [2, 5], "alignment": "OVERLAP"}},
                {"queries": {"tokens": [4, 5]}, "keys": {"chars": [0, 3], "alignment": "STRICT"}},
            ],
        },
        {"length": 5, "starts": [0, 3, 4, 6, 8], "ends": [3, 4, 6, 8, 9], "segments": {"completion": [3, 5]}},
    ),
    (
        "an_empty_row_is_an_error",
        {"base": CAUSAL, "edges": [edge([0, 1], [0, 1], layers=[1])]},
        {"length": 3, "layers": 2},
    ),
    (
        "an_empty_row_is_zero",
        {"base": CAUSAL, "edges": [edge([0, 2], [0, 2])], "empty_row": "ZERO"},
        {"length": 3, "heads": 2},
    ),
    (
        "an_empty_row_sees_itself",
        {"base": CAUSAL, "edges": [edge([0, 2], [0, 2], heads=[1])], "empty_row": "SELF"},
        {"length": 3, "heads": 2},
    ),
    ("native_windows_are_anded", {"base": {"full": {}}}, {"length": 5, "layers": 2, "windows": [2, None]}),
    (
        "native_windows_are_replaced",
        {"base": CAUSAL, "replace_native": True},
        {"length": 5, "layers": 2, "windows": [2, None]},
    ),
    (
        "windows_measure_positions_not_indices",
        {"base": CAUSAL},
        {"length": 6, "windows": [2], "positions": [0, 1, 2, 3, 2, 3]},
    ),
    (
        "a_leak_through_two_layers",
        {"base": {"any": [CAUSAL, {"bidirectional_prefix": {"n": 2}}, {"sliding": {"keys_back": 1, "keys_ahead": 1}}]}},
        {"length": 5, "layers": 2},
    ),
]


def context_of(case: Case) -> MaskContext:
    layers = case.get("layers", 1)
    starts, ends, positions = (
        np.array(case[k], np.int32) if k in case else None for k in ("starts", "ends", "positions")
    )
    return MaskContext(
        case["length"],
        Geometry(layers, case.get("heads", 1), tuple(case.get("windows", ()))),
        prefix=case.get("prefix", 0),
        segments={SegmentName(name): (start, end) for name, (start, end) in case.get("segments", {}).items()},
        starts=starts,
        ends=ends,
        positions=positions,
    )


def runs_of(row: list[bool]) -> list[list[int]]:
    found: list[list[int]] = []
    for k, seen in enumerate(row):
        if seen and found and found[-1][1] == k:
            found[-1][1] = k + 1
        elif seen:
            found.append([k, k + 1])
    return found


def scramble(n: int, seed: int) -> int:
    n = (n * 0x9E3779B1 + seed) % 2**32
    n ^= n >> 16
    n = n * 0x85EBCA6B % 2**32
    n ^= n >> 13
    n = n * 0xC2B2AE35 % 2**32
    return n ^ (n >> 16)


def mix(q: int, k: int) -> tuple[int, int]:
    a = (scramble(q, 0x243F6A88) | 1) * scramble(k, 0x85A308D3)
    b = (scramble(q, 0x13198A2E) | 1) * scramble(k, 0x03707344)
    return a % 2**32, b % 2**32


def counted(entries: list[tuple[int, int]]) -> tuple[int, int, int]:
    mixed = [mix(q, k) for q, k in entries]
    return len(entries), sum(a for a, _ in mixed) % 2**32, sum(b for _, b in mixed) % 2**32


def leaks(seen: list[list[set[int]]], length: int) -> list[int]:
    """`seen[layer][q]`: keys that any head sees. What each row knows of, layer by layer."""
    knows = [{q} for q in range(length)]
    for layer in seen:
        knows = [knows[q].union(*(knows[k] for k in layer[q])) for q in range(length)]
    return [q for q in range(length) if max(knows[q]) > q]


def describe(resolved: ResolvedMask) -> Case:
    context = resolved.context
    geometry, length = context.geometry, context.length
    seen = [[set[int]() for _ in range(length)] for _ in range(geometry.layers)]
    tables, packed = [], struct.pack("<III", geometry.layers, geometry.heads, length)
    for layer in range(geometry.layers):
        for head in range(geometry.heads):
            rows = [[may_see(resolved, layer, head, q, k) for k in range(length)] for q in range(length)]
            allowed = [(q, k) for q in range(length) for k in range(length) if rows[q][k].allowed]
            zeroed = [(q, k) for q in range(length) for k in range(length) if rows[q][k].zeroed]
            for q, k in allowed:
                seen[layer][q].add(k)
            packed += struct.pack("<QII", *counted(allowed)) + struct.pack("<QII", *counted(zeroed))
            tables.append(
                {
                    "layer": layer,
                    "head": head,
                    "rows": [runs_of([entry.allowed for entry in row]) for row in rows],
                    "zeroed_rows": [runs_of([entry.zeroed for entry in row]) for row in rows],
                    "empty_rows": [q for q in range(length) if sees_nothing(resolved, layer, head, q)],
                    "allowed": list(counted(allowed)),
                    "zeroed": list(counted(zeroed)),
                }
            )
    ahead = [max((k for layer in seen for k in layer[q]), default=-1) for q in range(length)]
    return {
        "digest": digest(resolved.spec),
        "positions": resolved.positions.tolist(),
        "unscored": list(document_starts(resolved.base, context)),
        "step_ends": [c for c in range(1, length + 1) if max(ahead[:c]) < c],
        "leaks": leaks(seen, length),
        "effective_mask_digest": "sha256:" + hashlib.sha256(b"dualtrace.mask.v1\n" + packed).hexdigest(),
        "tables": tables,
    }


def mask_vectors() -> Case:
    cases = []
    for name, mask, context in MASKS:
        spec = parse_json(mask)
        cases.append(
            {
                "name": name,
                "mask": mask,
                "canonical": to_json(spec),
                "context": context,
                "expected": describe(resolve(spec, context_of(context))),
            }
        )
    places = [(0, 0), (0, 1), (1, 0), (1, 1), (7, 3), (3, 7), (32767, 1), (131071, 131070)]
    return {
        "about": "Masks as data: see docs/masks.md. A table's rows are runs [start, end) of allowed keys; allowed and "
        "zeroed are [entries, sum_a, sum_b]. Regenerate with scripts/make_mask_vectors.py.",
        "mix": [{"q": q, "k": k, "a": mix(q, k)[0], "b": mix(q, k)[1]} for q, k in places],
        "cases": cases,
    }


def packed_vectors() -> Case:
    cases = []
    for delimiters, length in (([7, 9, 11, 13], 14), ([4, 7, 10], 13), ([2, 3, 5], 6), ([3], 5)):
        for convention in packing.Convention:
            positions = packing.positions(delimiters, length, convention)
            resolved = resolve(
                packing.mask(delimiters, length, convention),
                MaskContext(length, Geometry(1, 1), positions=positions),
            )
            rows = [[may_see(resolved, 0, 0, q, k).allowed for k in range(length)] for q in range(length)]
            cases.append(
                {
                    "delimiters": delimiters,
                    "length": length,
                    "convention": convention.value,
                    "positions": positions.tolist(),
                    "read_rows": list(packing.read_rows(delimiters, length, convention)),
                    "rows": [runs_of(row) for row in rows],
                    "digest": digest(resolved.spec),
                }
            )
    return {"about": "Packed scoring: positions and masks for both delimiter conventions.", "cases": cases}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="say whether the files are fresh, write nothing")
    check = parser.parse_args().check
    stale = False
    for name, content in (("masks.json", mask_vectors()), ("masks_packed.json", packed_vectors())):
        text = json.dumps(content, ensure_ascii=False)
        text = (
            text.replace("}, {", "},{")
            .replace('{"name"', '\n{"name"')
            .replace('{"layer"', '\n  {"layer"')
            .replace('{"delim', '\n{"delim')
        )
        path = FOLDER / name
        if not path.exists() or path.read_text() != text + "\n":
            stale = True
            if not check:
                path.write_text(text + "\n")
            sys.stderr.write(f"{path.name}: {'stale' if check else 'written'}\n")
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
