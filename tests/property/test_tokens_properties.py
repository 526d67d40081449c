"""What holds for every text."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from dualtrace.problems import Problem, Reason
from dualtrace.tokens import Alignment, Boundary, Cut, Tokenizer, Tokens, select_span
from tests.support import tokenizer_zoo as zoo

FEW = settings(max_examples=60)
TRICKY = st.sampled_from(
    [*"aTe  \n\t.'`", "\u0301", "\u0323", "é", "ﬁ", "\u1112", "\u1161", "\u11ab", "ｶ", "\uff9e", "👍", "👩", "\u200d",
     "🏽", "東", "ש", "\0", "▁", "Ġ", "``", "  ", " the", " capital", "<s>", "</s>", "<0x41>", "\ufeff", "\u0344", "Å"]
)  # fmt: skip
TEXTS = st.lists(TRICKY | st.characters(exclude_categories=["Cs"]), max_size=30).map("".join)
EVERY = pytest.mark.parametrize("name", zoo.BUILDERS)


def offsets(tokens: Tokens) -> list[tuple[int, int]]:
    assert tokens.starts is not None
    assert tokens.ends is not None
    return list(zip(tokens.starts.tolist(), tokens.ends.tolist(), strict=True))


def cut(name: str, text: str, at: int, boundary: Boundary) -> Cut | Reason:
    try:
        return zoo.load(name).cut(text[:at], text[at:], boundary)
    except Problem as problem:
        return problem.reason


def expected_offsets(text: str, pieces: tuple[bytes, ...]) -> list[tuple[int, int]]:
    """The characters that each piece touches, when the pieces are the text's bytes one after another."""
    owner = [index for index, character in enumerate(text) for _ in character.encode()]
    stops = list(itertools.accumulate(map(len, pieces)))
    return [(owner[stop - len(piece)], owner[stop - 1] + 1) for piece, stop in zip(pieces, stops, strict=True)]


@pytest.mark.parametrize("name", zoo.EXACT)
@FEW
@given(TEXTS)
def test_pieces_of_a_byte_level_tokenizer_are_the_bytes_of_the_text(name: str, text: str) -> None:
    assert b"".join(zoo.load(name).encode(text, special_tokens=False).pieces) == text.encode()


@pytest.mark.parametrize("name", zoo.EXACT)
@FEW
@given(TEXTS)
def test_offsets_of_a_byte_level_tokenizer_are_the_characters_of_its_bytes(name: str, text: str) -> None:
    tokens = zoo.load(name).encode(text, special_tokens=False)
    assert offsets(tokens) == expected_offsets(text, tokens.pieces)


@pytest.mark.parametrize("name", zoo.SPACE_IN_FRONT)
@FEW
@given(TEXTS.filter(lambda text: not any(mark in text for mark in ("<", "▁"))))
def test_other_lossless_tokenizers_add_at_most_a_space_in_front(name: str, text: str) -> None:
    joined = b"".join(zoo.load(name).encode(text, special_tokens=False).pieces)
    assert joined in (text.encode(), b" " + text.encode())


@EVERY
@FEW
@given(TEXTS)
def test_offsets_ascend_and_stay_inside_the_text(name: str, text: str) -> None:
    made = [(0, 0), *offsets(zoo.load(name).encode(text, special_tokens=True)), (len(text), len(text))]
    assert all(a[0] <= b[0] and a[1] <= b[1] and b[0] <= b[1] for a, b in itertools.pairwise(made))


@pytest.mark.parametrize("name", [name for name in zoo.BUILDERS if name != "wordpiece"])
@FEW
@given(TEXTS)
@example("e\u0301\u0323")
@example("a``b")
def test_offsets_leave_no_character_out(name: str, text: str) -> None:
    covered = {index for start, end in offsets(zoo.load(name).encode(text, special_tokens=False))
               for index in range(start, end)}  # fmt: skip
    assert covered == set(range(len(text)))


@EVERY
@FEW
@given(TEXTS, st.data())
def test_prompt_tokens_end_inside_the_prompt_and_all_others_reach_beyond(
    name: str, text: str, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(text)))
    made = cut(name, text, at, Boundary.JOINT)
    if not isinstance(made, Cut):
        assert made is Reason.EMPTY_COMPLETION
        return
    spans = offsets(made.tokens)
    assert all(end <= at for _start, end in spans[: made.prompt_count])
    assert all(end > at for _start, end in spans[made.prompt_count :])
    assert made.boundary_token_merged == any(start < at < end for start, end in spans)


@EVERY
@FEW
@given(TEXTS, st.data())
def test_strict_gives_what_joint_gives_or_refuses_what_joint_calls_merged(
    name: str, text: str, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(text)))
    joint, strict = cut(name, text, at, Boundary.JOINT), cut(name, text, at, Boundary.STRICT)
    if not isinstance(joint, Cut):
        assert strict is joint
    elif joint.boundary_token_merged:
        assert strict is Reason.BOUNDARY_STRADDLED
    else:
        assert isinstance(strict, Cut)
        assert strict.prompt_count == joint.prompt_count


@pytest.mark.parametrize(
    ("name", "normalizer"), [("byte_level_nfc", normalizers.NFC()), ("byte_level_nfkc", normalizers.NFKC())]
)
@FEW
@given(TEXTS.filter(lambda text: "<" not in text), st.data())
def test_a_boundary_that_is_called_clean_is_one_that_normalising_keeps(
    name: str, normalizer: Any, text: str, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(text)))
    made = cut(name, text, at, Boundary.JOINT)
    assume(isinstance(made, Cut))
    assert isinstance(made, Cut)
    assume(not made.boundary_token_merged)
    prompt = b"".join(made.tokens.pieces[: made.prompt_count])
    assert prompt == normalizer.normalize_str(text[:at]).encode()


@EVERY
@FEW
@given(TEXTS, st.data())
def test_a_selected_span_holds_every_token_that_touches_it(name: str, text: str, data: st.DataObject) -> None:
    tokens = zoo.load(name).encode(text, special_tokens=True)
    spans = offsets(tokens)
    start, end = sorted(data.draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
    touching = [index for index, (first, stop) in enumerate(spans) if first < end and stop > start and first < stop]
    assume(start < end <= max(stop for _first, stop in spans or [(0, 0)]) and touching)
    selected = select_span(tokens, start, end, Alignment.OVERLAP)
    assert list(range(selected.first, selected.last_exclusive)) == touching
    assert selected.straddled == any(spans[i][0] < start or spans[i][1] > end for i in touching)


ODD_VALUES: list[Any] = [
    None, 0, -1, 2**31, 2**63, 1.5, "", "x", "▁", [], {}, [[]], True, "ByteLevel", {"type": "ByteLevel"},
    {"String": ""}, {"Regex": "("}, {"Regex": "a*"},
]  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, value in list(items)[:12] for place in [(*path, key), *places(value, (*path, key))]]


def spoil(document: Any, place: tuple[Any, ...], value: Any) -> str:
    spoiled = json.loads(json.dumps(document))
    holder = functools.reduce(lambda node, key: node[key], place[:-1], spoiled)
    holder[place[-1]] = value
    return json.dumps(spoiled)


@pytest.mark.fuzz
@settings(max_examples=400)
@given(st.sampled_from(sorted(zoo.BUILDERS)), st.data())
def test_a_spoiled_tokenizer_file_is_refused_or_works(name: str, data: st.DataObject) -> None:
    document = json.loads(zoo.tokenizer_json(name))
    place = data.draw(st.sampled_from(places(document)))
    with contextlib.suppress(Problem):
        tokenizer = Tokenizer.from_json(spoil(document, place, data.draw(st.sampled_from(ODD_VALUES))))
        for text in zoo.HARD_TEXTS:
            tokenizer.encode(text, special_tokens=True)
