"""The words of the mask language: what is refused, with which reason and where; what keeps a digest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dualtrace.masks.json_form import digest, parse_json, to_json
from dualtrace.masks.spec import All, AnyOf, Causal, Chunked, Edge, EmptyRow, Expression, MaskSpec, Not, TokenRange
from dualtrace.problems import Problem, Reason

CAUSAL: dict[str, Any] = {"causal": {}}


def refusal(source: Any) -> Problem:
    with pytest.raises(Problem) as caught:
        parse_json(source if isinstance(source, str | bytes) else json.dumps(source))
    return caught.value


def edge(**changes: Any) -> dict[str, Any]:
    return {"queries": {"tokens": [4, 6]}, "keys": {"tokens": [0, 2]}, **changes}


def with_edge(**changes: Any) -> dict[str, Any]:
    return {"base": CAUSAL, "edges": [edge(**changes)]}


REFUSED: list[tuple[str, Any, Reason, str]] = [
    ("not an object", [], Reason.MALFORMED, ""),
    ("no base", {}, Reason.MISSING, "base"),
    ("an unknown key", {"base": CAUSAL, "windows": 3}, Reason.UNKNOWN_FIELD, "windows"),
    ("an unknown base", {"base": {"dilated": {}}}, Reason.UNKNOWN_FIELD, "base.dilated"),
    ("two bases", {"base": {"causal": {}, "full": {}}}, Reason.CONFLICT, "base"),
    ("an empty base", {"base": {}}, Reason.MISSING, "base"),
    ("a base that is a word", {"base": "causal"}, Reason.MALFORMED, "base"),
    ("a key inside causal", {"base": {"causal": {"n": 1}}}, Reason.UNKNOWN_FIELD, "base.causal.n"),
    ("a later version", {"base": CAUSAL, "version": 2}, Reason.SCHEMA_VERSION, "version"),
    ("a version that is a word", {"base": CAUSAL, "version": "1"}, Reason.SCHEMA_VERSION, "version"),
    ("no keys back", {"base": {"sliding": {}}}, Reason.MISSING, "base.sliding.keys_back"),
    ("zero keys back", {"base": {"sliding": {"keys_back": 0}}}, Reason.OUT_OF_RANGE, "base.sliding.keys_back"),
    ("a float", {"base": {"sliding": {"keys_back": 2.0}}}, Reason.MALFORMED, "base.sliding.keys_back"),
    ("a bool for an integer", {"base": {"sliding": {"keys_back": True}}}, Reason.MALFORMED, "base.sliding.keys_back"),
    ("beyond int32", {"base": {"chunked": {"size": 2**31}}}, Reason.OUT_OF_RANGE, "base.chunked.size"),
    ("null", {"base": {"bidirectional_prefix": {"n": None}}}, Reason.MALFORMED, "base.bidirectional_prefix.n"),
    ("neither n nor span", {"base": {"bidirectional_prefix": {}}}, Reason.MISSING, "base.bidirectional_prefix"),
    (
        "boundaries and ids",
        {"base": {"doc_isolation": {"boundaries": [1], "segment_ids": [0]}}},
        Reason.CONFLICT,
        "base.doc_isolation.segment_ids",
    ),
    (
        "boundaries that turn back",
        {"base": {"doc_isolation": {"boundaries": [3, 2]}}},
        Reason.MALFORMED,
        "base.doc_isolation.boundaries[1]",
    ),
    (
        "a document that starts at zero",
        {"base": {"doc_isolation": {"boundaries": [0]}}},
        Reason.OUT_OF_RANGE,
        "base.doc_isolation.boundaries[0]",
    ),
    (
        "one for true",
        {"base": {"doc_isolation": {"boundaries": [1], "reset_positions": 1}}},
        Reason.MALFORMED,
        "base.doc_isolation.reset_positions",
    ),
    ("no terms", {"base": {"all": []}}, Reason.EMPTY, "base.all.terms"),
    ("a bad term deep down", {"base": {"any": [CAUSAL, {"not": {"chunked": {}}}]}}, Reason.MISSING,
     "base.any[1].not.chunked.size"),
    ("half a minus", {"base": {"minus": {"from": CAUSAL}}}, Reason.MISSING, "base.minus.take"),
    ("too many terms", {"base": {"all": [CAUSAL] * 300}}, Reason.TOO_MANY, "base"),
    ("no array content", {"base": {"array": {}}}, Reason.MISSING, "base.array"),
    ("a digest of another kind", {"base": {"array": {"artifact_digest": "md5:00"}}}, Reason.MALFORMED,
     "base.array.artifact_digest"),
    ("not base64", {"base": {"array": {"npy": "@@"}}}, Reason.MALFORMED, "base.array.npy"),
    ("edges that are no list", {"base": CAUSAL, "edges": {}}, Reason.MALFORMED, "edges"),
    ("an edge without keys", {"base": CAUSAL, "edges": [{"queries": {"tokens": [0, 1]}}]}, Reason.MISSING,
     "edges[0].keys"),
    ("too many edges", {"base": CAUSAL, "edges": [edge()] * 4097}, Reason.TOO_MANY, "edges"),
    ("an unknown mode", with_edge(mode="SOFTMAX"), Reason.UNKNOWN_ENUM_VALUE, "edges[0].mode"),
    ("no layers at all", with_edge(layers=[]), Reason.EMPTY, "edges[0].layers"),
    ("a layer twice", with_edge(layers=[1, 1]), Reason.DUPLICATE, "edges[0].layers[1]"),
    ("a negative head", with_edge(heads=[-1]), Reason.OUT_OF_RANGE, "edges[0].heads[0]"),
    ("a head that is a word", with_edge(heads=["0"]), Reason.MALFORMED, "edges[0].heads[0]"),
    ("an empty span", with_edge(keys={"tokens": [2, 2]}), Reason.EMPTY, "edges[0].keys.tokens.end"),
    ("a span backwards", with_edge(keys={"tokens": [2, 1]}), Reason.OUT_OF_RANGE, "edges[0].keys.tokens.end"),
    ("a span of three", with_edge(keys={"tokens": [0, 1, 2]}), Reason.MALFORMED, "edges[0].keys.tokens"),
    ("characters without alignment", with_edge(keys={"chars": [0, 1]}), Reason.MISSING, "edges[0].keys.alignment"),
    ("tokens with alignment", with_edge(keys={"tokens": [0, 1], "alignment": "STRICT"}), Reason.CONFLICT,
     "edges[0].keys.alignment"),
    ("an unknown segment", with_edge(keys={"segment": "QUERY"}), Reason.UNKNOWN_ENUM_VALUE, "edges[0].keys.segment"),
    ("an unknown empty row", {"base": CAUSAL, "empty_row": "zero"}, Reason.UNKNOWN_ENUM_VALUE, "empty_row"),
    ("a word for a bool", {"base": CAUSAL, "replace_native": "no"}, Reason.MALFORMED, "replace_native"),
    ("not JSON", "{", Reason.MALFORMED, ""),
    ("NaN", '{"base":{"chunked":{"size":NaN}}}', Reason.NOT_FINITE, ""),
    ("Infinity", '{"base":{"chunked":{"size":-Infinity}}}', Reason.NOT_FINITE, ""),
    ("a float too large", '{"base":{"chunked":{"size":1e999}}}', Reason.MALFORMED, "base.chunked.size"),
    ("a huge integer", '{"base":{"chunked":{"size":' + "9" * 5000 + "}}}", Reason.OUT_OF_RANGE, ""),
    ("a key twice", '{"base":{"causal":{}},"base":{"full":{}}}', Reason.DUPLICATE, ""),
    ("bytes that are no text", b'{"base":"\xff"}', Reason.INVALID_TEXT, ""),
    ("brackets without end", "[" * 100_000, Reason.NESTED_TOO_DEEP, ""),
]  # fmt: skip


@pytest.mark.parametrize(("source", "reason", "field"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED])
def test_what_is_not_a_mask_is_refused_by_reason_and_place(source: Any, reason: Reason, field: str) -> None:
    detail = refusal(source).detail
    assert (detail.reason, detail.field) == (reason, field)


def nested(levels: int) -> dict[str, Any]:
    expression: dict[str, Any] = CAUSAL
    for _ in range(levels - 1):
        expression = {"not": expression}
    return {"base": expression}


def test_sixteen_levels_are_allowed() -> None:
    assert parse_json(nested(16)).base != Causal()


def test_seventeen_levels_are_too_deep() -> None:
    assert refusal(nested(17)).reason is Reason.NESTED_TOO_DEEP


def test_depth_is_judged_when_an_expression_is_made_in_python_too() -> None:
    expression: Expression = Causal()
    for _ in range(15):
        expression = Not(expression)
    with pytest.raises(Problem) as caught:
        Not(expression)
    assert caught.value.reason is Reason.NESTED_TOO_DEEP


def test_an_expression_that_doubles_at_every_level_is_refused_before_it_grows() -> None:
    expression: Expression = Causal()
    for _ in range(7):
        expression = All((expression, expression))
    with pytest.raises(Problem) as caught:
        All((expression, expression))
    assert caught.value.reason is Reason.TOO_MANY


def test_a_text_larger_than_the_limit_is_refused_unread() -> None:
    assert refusal(" " * (8 * 1024 * 1024 + 1)).reason is Reason.MASK_TOO_LARGE


def test_a_message_about_a_strangers_key_holds_plain_characters_only() -> None:
    assert refusal('{"\\ud800\\n": 1}').detail.message.isascii()


def test_defaults_that_are_left_out_do_not_change_the_digest() -> None:
    spelled = parse_json(
        '{"empty_row": "ERROR", "edges": [{"mode": "PRE_SOFTMAX", "keys": {"tokens": [0, 2]}, '
        '"queries": {"tokens": [4, 6]}}], "base": {"causal": {}}, "version": 1, "replace_native": false}'
    )
    assert digest(spelled) == digest(parse_json(with_edge()))


@pytest.mark.parametrize(
    "other",
    [
        MaskSpec(),
        MaskSpec(Chunked(4)),
        MaskSpec(Chunked(3), empty_row=EmptyRow.ZERO),
        MaskSpec(Chunked(3), replace_native=True),
        MaskSpec(Chunked(3), edges=(Edge(TokenRange(0, 1), TokenRange(0, 1)),)),
        MaskSpec(All((Chunked(3),))),
    ],
)
def test_a_different_mask_has_a_different_digest(other: MaskSpec) -> None:
    assert digest(other) != digest(MaskSpec(Chunked(3)))


def test_the_digest_is_the_hash_of_the_canonical_text() -> None:
    assert to_json(MaskSpec()) == (
        '{"base":{"causal":{}},"edges":[],"empty_row":"ERROR","replace_native":false,"version":1}'
    )
    assert digest(MaskSpec()) == "sha256:7cc329b602b6baf4cd1f0b3b7cee545926b9cb9024f1108bd08b6851c3673bc2"


def test_an_array_enters_the_digest_by_content_however_it_was_sent() -> None:
    by_matrix = parse_json({"base": {"array": {"matrix": [[1, 0], [1, 1]]}}})
    by_npy = parse_json(to_json(by_matrix))
    assert digest(by_npy) == digest(parse_json({"base": {"array": {"matrix": [[True, False], [True, True]]}}}))


def test_the_name_says_what_the_base_is_and_custom_otherwise() -> None:
    assert [MaskSpec(Chunked(3)).name, MaskSpec(AnyOf((Causal(),))).name] == ["chunked", "custom"]


DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "masks.md").read_text()
BLOCKS = [block for block in re.findall(r"```json\n(.*?)```", DOCUMENT, re.DOTALL) if '"base"' in block]
BASES = [
    cell
    for cell in re.findall(r"^\| `(\{.*?\})` \|", DOCUMENT, re.MULTILINE)
    if "..." not in cell and ": a" not in cell
]


@pytest.mark.parametrize("text", BLOCKS)
def test_every_whole_mask_in_the_document_can_be_parsed(text: str) -> None:
    assert parse_json(text).version == 1


@pytest.mark.parametrize("text", BASES)
def test_every_base_and_span_in_the_document_can_be_parsed(text: str) -> None:
    value = json.loads(text)
    is_span = not {"tokens", "chars", "segment"}.isdisjoint(value)
    assert parse_json(with_edge(keys=value) if is_span else {"base": value}).version == 1
