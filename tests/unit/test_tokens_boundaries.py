"""Prompt and completion: to which of them does a token belong?"""

from __future__ import annotations

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from dualtrace.problems import Problem, Reason
from dualtrace.tokens import Boundary, Cut, Tokenizer
from tests.support import tokenizer_zoo as zoo


def cut(name: str, prompt: str, completion: str, boundary: Boundary = Boundary.JOINT) -> Cut:
    return zoo.load(name).cut(prompt, completion, boundary)


def sides(made: Cut) -> tuple[bytes, bytes]:
    pieces = made.tokens.pieces
    return b"".join(pieces[: made.prompt_count]), b"".join(pieces[made.prompt_count :])


def test_a_boundary_between_tokens_cuts_there() -> None:
    made = cut("byte_level", "The capital", " of")
    assert sides(made) == (b"The capital", b" of")
    assert not made.boundary_token_merged


def test_a_token_that_straddles_belongs_to_the_completion() -> None:
    made = cut("byte_level", "The cap", "ital of")
    assert sides(made) == (b"The", b" capital of")
    assert made.boundary_token_merged


def test_a_space_hidden_by_trimmed_offsets_still_straddles() -> None:
    made = cut("byte_level_trimming", "The ", "capital")
    assert sides(made) == (b"The", b" capital")
    assert made.boundary_token_merged


def test_a_token_that_the_normaliser_merged_across_the_boundary_straddles() -> None:
    made = cut("byte_level_nfc", "xe", "\u0301!")
    assert sides(made) == (b"x", "é!".encode())
    assert made.boundary_token_merged


def test_a_replacement_across_the_boundary_straddles() -> None:
    made = cut("byte_level_replacing", "a`", "`b")
    assert sides(made) == (b"a", b'"b')
    assert made.boundary_token_merged


def test_an_added_token_that_swallows_the_space_behind_it_straddles() -> None:
    library = Library.from_str(zoo.tokenizer_json("byte_level"))
    library.add_special_tokens([AddedToken("<sep>", rstrip=True)])
    made = Tokenizer.from_json(library.to_str()).cut("a<sep>", " b", Boundary.JOINT)
    assert sides(made) == (b"a", b"<sep>b")
    assert made.boundary_token_merged


def test_the_parts_of_an_emoji_stay_on_their_side() -> None:
    assert sides(cut("byte_level", "a🧿", "🧿b")) == ("a🧿".encode(), "🧿b".encode())


def test_a_zero_width_joiner_sequence_is_one_text_cut_between_its_characters() -> None:
    assert sides(cut("byte_level", "🎉\u200d", "🎉")) == ("🎉\u200d".encode(), "🎉".encode())


def test_right_to_left_text_is_cut_in_logical_order() -> None:
    assert sides(cut("byte_level", "שלום", " עולם")) == ("שלום".encode(), " עולם".encode())


def test_strict_refuses_a_token_that_straddles_and_names_it() -> None:
    with pytest.raises(Problem, match=r"token 1 .*characters 3-11, text ' capital'.*character 7") as caught:
        cut("byte_level", "The cap", "ital of", Boundary.STRICT)
    assert caught.value.reason is Reason.BOUNDARY_STRADDLED


def test_strict_equals_joint_where_nothing_straddles() -> None:
    strict, joint = (cut("byte_level", "The capital", " of", how) for how in (Boundary.STRICT, Boundary.JOINT))
    assert strict.prompt_count == joint.prompt_count
    assert strict.tokens.ids.tolist() == joint.tokens.ids.tolist()


def test_separate_encodes_each_side_alone() -> None:
    made = cut("byte_level", "The cap", "ital of", Boundary.SEPARATE)
    assert sides(made) == (b"The cap", b"ital of")
    assert not made.boundary_token_merged


def test_separate_counts_the_completions_offsets_from_the_prompts_start() -> None:
    made = cut("byte_level", "The cap", "ital of", Boundary.SEPARATE)
    assert made.tokens.starts is not None
    assert made.tokens.ends is not None
    assert made.tokens.starts[made.prompt_count] == 7
    assert made.tokens.ends[-1] == 14


def test_separate_puts_a_space_mark_in_front_of_a_sentencepiece_completion_too() -> None:
    assert sides(cut("metaspace", "The", "capital", Boundary.SEPARATE)) == (b" The", b" capital")


@pytest.mark.parametrize("boundary", Boundary)
def test_an_empty_prompt_leaves_every_token_to_the_completion(boundary: Boundary) -> None:
    made = cut("llama", "", "The capital", boundary)
    assert made.prompt_count == 0
    assert not made.boundary_token_merged


def test_the_tokenizers_own_special_tokens_are_not_added() -> None:
    made = cut("byte_level_both_specials", "The", " capital")
    assert b"".join(made.tokens.pieces) == b"The capital"


@pytest.mark.parametrize("boundary", Boundary)
def test_an_empty_completion_is_refused_as_empty_text(boundary: Boundary) -> None:
    with pytest.raises(Problem, match="empty text") as caught:
        cut("byte_level", "The", "", boundary)
    assert caught.value.reason is Reason.EMPTY_COMPLETION


@pytest.mark.parametrize("boundary", Boundary)
def test_a_completion_that_the_tokenizer_drops_is_refused_as_such(boundary: Boundary) -> None:
    with pytest.raises(Problem, match="become no token") as caught:
        cut("wordpiece", "Paris", "   ", boundary)
    assert caught.value.reason is Reason.EMPTY_COMPLETION


@pytest.mark.parametrize(("prompt", "completion", "field"), [("\ud83d", "a", "prompt"), ("a", "\udc00", "completion")])
def test_half_a_surrogate_pair_is_refused_on_its_own_side(prompt: str, completion: str, field: str) -> None:
    with pytest.raises(Problem) as caught:
        cut("byte_level", prompt, completion)
    assert (caught.value.reason, caught.value.detail.field) == (Reason.INVALID_TEXT, field)
