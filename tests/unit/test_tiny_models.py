"""Tiny models are the same everywhere, have logits worth comparing, and tokenizers with real corners."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from dualtrace.checkpoint import open_checkpoint, weights_digest
from dualtrace.engine import Batch, Read, Segment, int_array
from dualtrace.models.tiny import standard_normal, write_tiny_model
from dualtrace.models.tokenizers import BOS, TEXT, byte_level_tokenizer, learn_merges, sentencepiece_style_tokenizer
from dualtrace.problems import Problem, Reason
from tests.support.tiny import tiny_model, tiny_reference

KINDS: list[dict[str, Any]] = [
    {},
    {"attention": "mqa"},
    {"attention": "gqa", "tied": True, "bias": True},
    {"tokenizer": "sentencepiece", "head_dim": 12},
    {"family": "gpt2"},
    {"family": "gpt2", "tied": False, "tokenizer": "sentencepiece"},
]
HARD_TEXT = "naïve 👩‍👩‍👧 日本語 e\u0301\n\tx  y"


def tokenizer_of(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def file_digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_the_same_arguments_give_the_same_bytes(fields: dict[str, Any], tmp_path: Path) -> None:
    left, right = (write_tiny_model(tmp_path / name, **fields) for name in ("left", "right"))
    assert file_digests(left) == file_digests(right)


@pytest.mark.parametrize(
    ("fields", "digest"),
    [
        ({"attention": "gqa"}, "sha256:b7940535b42cf24a839be9016c04fcb41ab42ed6d289f8976fc18bfd17bbe18b"),
        ({"family": "gpt2", "seed": 5}, "sha256:4440915e257fc193da6a5b92179d622fe8926b6c00265f53f16b364436b4fc33"),
    ],
)
def test_the_weights_are_those_of_every_other_machine(fields: dict[str, Any], digest: str) -> None:
    assert weights_digest(open_checkpoint(tiny_model(**fields))) == digest


def test_another_seed_gives_other_weights() -> None:
    digests = {weights_digest(open_checkpoint(tiny_model(seed=seed))) for seed in range(3)}
    assert len(digests) == 3


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_the_logits_are_far_from_flat_and_do_not_just_repeat_the_input(fields: dict[str, Any]) -> None:
    engine = tiny_reference(**fields)
    ids = int_array(tokenizer_of(tiny_model(**fields)).encode(TEXT).ids[:200])
    read = Read(int_array(range(200)), ids, top_k=engine.card.vocab_size)
    batch = Batch((Segment(ids, int_array(range(200))),))
    ((readout,),) = engine.forward(batch, (read,), lambda _: True)
    assert readout.top_logprobs is not None
    assert readout.ranks is not None
    assert 1.0 < np.std(readout.top_logprobs, axis=1).mean() < 3.0
    assert np.mean(readout.ranks == 1) < 0.2


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_the_logits_are_wider_than_the_tokenizer(fields: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(tiny_model(**fields))
    assert max(tokenizer.get_vocab().values()) + 1 == tokenizer.get_vocab_size()
    assert tiny_reference(**fields).card.vocab_size > tokenizer.get_vocab_size()


@pytest.mark.parametrize(
    ("fields", "adds"), [({}, True), ({"family": "gpt2"}, False), ({"add_bos": False}, False), ({"seed": 1}, True)]
)
def test_a_prefix_token_is_added_by_habit_of_the_family_or_as_asked(fields: dict[str, Any], adds: bool) -> None:
    tokenizer = tokenizer_of(tiny_model(**fields))
    assert (tokenizer.encode("the").ids[0] == tokenizer.token_to_id(BOS)) is adds


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer(), sentencepiece_style_tokenizer()])
def test_any_text_survives_encoding_and_decoding(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(HARD_TEXT).ids) == HARD_TEXT


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer(), sentencepiece_style_tokenizer(add_bos=False)])
@pytest.mark.parametrize("character", ["👍", "日"])
def test_one_character_may_take_several_tokens_of_the_same_offsets(tokenizer: Tokenizer, character: str) -> None:
    offsets = tokenizer.encode(f"a{character}").offsets
    assert offsets.count((1, 2)) == len(character.encode())


def test_words_of_the_built_in_text_are_merged() -> None:
    assert "Ġcapital" in byte_level_tokenizer().encode("the capital").tokens
    assert "▁capital" in sentencepiece_style_tokenizer().encode("the capital").tokens


def test_merges_go_by_frequency_and_then_by_name() -> None:
    assert learn_merges(["ab", "ab", "cd", "cd", "ad"], 9) == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize(
    "fields",
    [
        {"family": "gpt2", "attention": "gqa"},
        {"family": "mamba"},
        {"attention": "none"},
        {"tokenizer": "words"},
        {"vocab_size": 20},
        {"heads": 5},
        {"attention": "gqa", "heads": 1},
        {"layers": 0},
        {"seed": -1},
        {"head_dim": 7},
        {"colour": "red"},
        {"family": "gpt2", "bias": True},
    ],
    ids=str,
)
def test_a_model_that_cannot_be_made_is_refused_and_nothing_is_left(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Problem):
        write_tiny_model(tmp_path / "model", **fields)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(Problem) as caught:
        write_tiny_model(tmp_path)
    assert caught.value.reason is Reason.ALREADY_EXISTS


def test_force_replaces_an_older_tiny_model(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", seed=1)
    write_tiny_model(tmp_path / "model", seed=2, force=True)
    assert file_digests(tmp_path / "model") == file_digests(tiny_model(seed=2))


def test_force_never_deletes_a_strangers_file(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    (tmp_path / "model" / "letter.txt").write_text("dear")
    with pytest.raises(Problem, match=r"letter\.txt"):
        write_tiny_model(tmp_path / "model", force=True)
    assert (tmp_path / "model" / "letter.txt").exists()


def test_max_positions_and_rope_settings_reach_the_config(tmp_path: Path) -> None:
    rope = (("rope_type", "linear"), ("factor", 2.0))
    directory = write_tiny_model(tmp_path / "model", max_positions=99, rope_parameters=rope)
    config = json.loads((directory / "config.json").read_text())
    assert config["max_position_embeddings"] == 99
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


def test_random_numbers_are_standard_normal_for_a_test_and_differ_by_key() -> None:
    left, right = (standard_normal(key, 100_000) for key in ("a", "b"))
    assert abs(left.mean()) < 0.02
    assert abs(left.std() - 1.0) < 0.02
    assert abs(np.corrcoef(left, right)[0, 1]) < 0.02
