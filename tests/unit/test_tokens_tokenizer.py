"""The tokenizer: ids, pieces, offsets, special tokens, and the files it is read from."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from dualtrace.problems import Problem, Reason
from dualtrace.tokens import Tokenizer, Tokens, check_text
from tests.support import tokenizer_zoo as zoo


def offsets(tokens: Tokens) -> list[tuple[int, int]]:
    assert tokens.starts is not None
    assert tokens.ends is not None
    return list(zip(tokens.starts.tolist(), tokens.ends.tolist(), strict=True))


def plain(name: str, text: str) -> Tokens:
    return zoo.load(name).encode(text, special_tokens=False)


def refusal(reason: Reason, *words: str) -> Any:
    return pytest.raises(Problem, match=".*".join([reason.value, *words]))


# Ids


@pytest.mark.parametrize("name", zoo.BUILDERS)
def test_ids_are_those_of_the_library_on_the_file_as_it_stands(name: str) -> None:
    library = tokenizers.Tokenizer.from_str(zoo.tokenizer_json(name))
    for text in zoo.HARD_TEXTS:
        for special_tokens in (False, True):
            ours = zoo.load(name).encode(text, special_tokens=special_tokens)
            assert ours.ids.tolist() == library.encode(text, add_special_tokens=special_tokens).ids, text


def test_truncation_and_padding_stored_in_the_file_are_switched_off() -> None:
    library = tokenizers.Tokenizer.from_str(zoo.tokenizer_json("byte_level"))
    library.enable_truncation(3)
    library.enable_padding(length=50)
    text = "The capital of France is Paris"
    assert len(library.encode(text).ids) == 50, "the plant is real"
    ids = Tokenizer.from_json(library.to_str()).encode(text, special_tokens=True).ids
    assert ids.tolist() == plain("byte_level", text).ids.tolist()


def test_the_same_text_from_many_threads_gives_the_same_tokens() -> None:
    tokenizer = zoo.load("llama3")
    texts = zoo.HARD_TEXTS * 20
    alone = [tokenizer.encode(text, special_tokens=False).ids.tolist() for text in texts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda text: tokenizer.encode(text, special_tokens=False).ids.tolist(), texts))
    assert together == alone


def test_two_hundred_thousand_times_one_letter_does_not_hang() -> None:
    begin = time.monotonic()
    for name in ("byte_level_nfc", "llama", "wordpiece"):
        plain(name, "a" * 200_000)
    assert time.monotonic() - begin < 20  # seen 0.3 s; quadratic would be minutes


def test_two_hundred_thousand_marks_on_one_letter_do_not_hang() -> None:
    begin = time.monotonic()
    plain("byte_level_nfc", "e" + "\u0301" * 100_000 + "e\u0301" * 50_000)
    assert time.monotonic() - begin < 20


def test_text_that_the_model_cannot_encode_is_refused() -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]"))
    tokenizer = Tokenizer.from_json(words.to_str())
    with refusal(Reason.INVALID_TEXT, "cannot encode"):
        tokenizer.encode("b", special_tokens=False)


# Pieces


def test_parts_of_an_emoji_are_its_bytes() -> None:
    tokens = plain("byte_level", "a𐍈")
    assert tokens.pieces == (b"a", b"\xf0", b"\x90", b"\x8d", b"\x88")


def test_every_byte_of_the_byte_level_alphabet_is_read_back() -> None:
    text = "".join(map(chr, [*range(0x800), 0x800, 0xFFFD, 0x10000, 0x10FFFF]))
    assert b"".join(plain("byte_level", text).pieces) == text.encode()


def test_byte_fallback_tokens_are_single_bytes() -> None:
    tokens = plain("metaspace", "🧿")
    assert tokens.pieces == (b" ", b"\xf0", b"\x9f", b"\xa7", b"\xbf")


def test_the_sentencepiece_mark_is_a_space() -> None:
    assert b"".join(plain("metaspace", "The capital of").pieces) == b" The capital of"


def test_a_wordpiece_stands_as_it_is() -> None:
    pieces = plain("wordpiece", "Parisx").pieces
    assert pieces[0][:2] != b"##"
    assert all(piece.startswith(b"##") for piece in pieces[1:])


def test_an_added_token_in_a_byte_level_tokenizer_is_literal_and_not_byte_mapped() -> None:
    library = tokenizers.Tokenizer.from_str(zoo.tokenizer_json("byte_level"))
    library.add_tokens(["Ġé"])
    tokenizer = Tokenizer.from_json(library.to_str())
    assert tokenizer.encode("xĠéx", special_tokens=False).pieces == (b"x", "Ġé".encode(), b"x")


def test_a_sentencepiece_piece_that_is_also_listed_as_added_keeps_its_meaning() -> None:
    document = json.loads(zoo.tokenizer_json("llama"))
    mark = document["model"]["vocab"]["▁"]
    flags = dict.fromkeys(("special", "lstrip", "rstrip", "normalized", "single_word"), False)
    document["added_tokens"].append({"id": mark, "content": "▁", **flags})
    assert Tokenizer.from_json(json.dumps(document)).describe_ids([mark]).pieces == (b" ",)


def test_described_ids_have_the_pieces_of_encoded_ones_and_no_offsets() -> None:
    encoded = plain("llama", "The capital 🧿")
    described = zoo.load("llama").describe_ids(encoded.ids)
    assert described.pieces == encoded.pieces
    assert described.starts is None
    assert described.ends is None


def test_an_id_beyond_the_vocabulary_has_an_empty_piece() -> None:
    tokenizer = zoo.load("byte_level")
    assert tokenizer.describe_ids([tokenizer.size]).pieces == (b"",)


def test_no_ids_have_no_pieces() -> None:
    assert zoo.load("byte_level").describe_ids([]).pieces == ()


@pytest.mark.parametrize("wrong", [-1, 2**31])
def test_an_id_that_is_no_id_is_refused_with_its_place(wrong: int) -> None:
    with refusal(Reason.TOKEN_OUT_OF_RANGE, str(wrong), "index 1"):
        zoo.load("byte_level").describe_ids([0, wrong])


def test_size_counts_added_tokens() -> None:
    library = tokenizers.Tokenizer.from_str(zoo.tokenizer_json("byte_level"))
    library.add_special_tokens(["<new>"])
    assert Tokenizer.from_json(library.to_str()).size == zoo.load("byte_level").size + 1


# Offsets


def test_trimmed_offsets_are_untrimmed() -> None:
    text = "The capital"
    library = tokenizers.Tokenizer.from_str(zoo.tokenizer_json("byte_level_trimming"))
    assert (4, 11) in library.encode(text).offsets, "the plant is real"
    assert (3, 11) in offsets(plain("byte_level_trimming", text))


def test_trimming_inside_a_sequence_of_processors_is_untrimmed() -> None:
    assert (3, 11) in offsets(plain("byte_level_both_specials", "The capital"))


def test_trimming_by_a_roberta_processor_is_untrimmed() -> None:
    assert (3, 11) in offsets(plain("roberta", "The capital"))


def test_every_part_of_a_character_has_the_offsets_of_the_whole() -> None:
    assert offsets(plain("byte_level", "a𐍈b")) == [(0, 1), *[(1, 2)] * 4, (2, 3)]


def test_a_character_that_the_normaliser_composes_has_the_offsets_of_all_its_parts() -> None:
    tokens = plain("byte_level_nfc", "xe\u0301!")
    assert tokens.pieces[0] == b"x"
    assert set(offsets(tokens)[1:-1]) == {(1, 3)}


def test_marks_that_the_normaliser_reorders_share_their_offsets() -> None:
    tokens = plain("byte_level_nfc", "xe\u0301\u0323!")
    assert set(offsets(tokens)[1:-1]) == {(1, 4)}


def test_a_hangul_syllable_composed_of_three_letters_covers_all_three() -> None:
    tokens = plain("byte_level_nfc", "x\u1112\u1161\u11ab!")
    assert set(offsets(tokens)[1:-1]) == {(1, 4)}


def test_a_half_width_letter_and_its_voice_mark_are_one_under_nfkc() -> None:
    tokens = plain("byte_level_nfkc", "x\uff76\uff9e!")
    assert set(offsets(tokens)[1:-1]) == {(1, 3)}


def test_a_ligature_that_becomes_two_letters_gives_both_its_offsets() -> None:
    tokens = plain("byte_level_nfkc", "ﬁ?")
    assert b"".join(tokens.pieces) == b"fi?"
    assert set(offsets(tokens)[:-1]) == {(0, 1)}


def test_marks_that_the_normaliser_leaves_alone_keep_their_own_offsets() -> None:
    tokens = plain("byte_level_nfc", "x\u0301")  # no composed form exists
    assert offsets(tokens)[0] == (0, 1)
    assert set(offsets(tokens)[1:]) == {(1, 2)}


def test_a_token_made_from_several_replaced_characters_covers_them_all() -> None:
    assert offsets(plain("byte_level_replacing", "a``b")) == [(0, 1), (1, 3), (3, 4)]


def test_spaces_that_collapse_into_one_are_all_covered() -> None:
    assert offsets(plain("byte_level_replacing", "a    b")) == [(0, 1), (1, 5), (5, 6)]


def test_a_special_token_in_front_stands_at_the_start_and_one_behind_at_the_end() -> None:
    tokens = zoo.load("byte_level_both_specials").encode("The", special_tokens=True)
    assert tokens.pieces[0] == b"<s>"
    assert tokens.pieces[-1] == b"</s>"
    assert offsets(tokens)[0] == (0, 0)
    assert offsets(tokens)[-1] == (3, 3)


def test_an_empty_text_has_only_the_tokenizers_own_tokens() -> None:
    tokenizer = zoo.load("byte_level_both_specials")
    assert tokenizer.encode("", special_tokens=True).ids.tolist() == [1, 2]
    assert len(tokenizer.encode("", special_tokens=False)) == 0


def test_arrays_are_int32() -> None:
    tokens = plain("byte_level", "The capital")
    assert tokens.starts is not None
    assert tokens.ends is not None
    assert {tokens.ids.dtype, tokens.starts.dtype, tokens.ends.dtype} == {np.dtype(np.int32)}


# Special tokens and the post-processor


@pytest.mark.parametrize(
    ("name", "prefix"), [("byte_level", ()), ("llama", (1,)), ("roberta", (1,)), ("byte_level_both_specials", (1,))]
)
def test_the_own_prefix_is_what_the_post_processor_puts_in_front(name: str, prefix: tuple[int, ...]) -> None:
    assert zoo.load(name).own_prefix == prefix


def test_two_templates_in_a_row_of_which_the_library_obeys_one_are_refused() -> None:
    def template(front: str, token_id: int) -> Any:
        return tokenizers.processors.TemplateProcessing(f"{front} $A", None, [(front, token_id)])

    library = tokenizers.Tokenizer.from_str(zoo.tokenizer_json("byte_level"))
    library.post_processor = tokenizers.processors.Sequence([template("<s>", 1), template("</s>", 2)])
    with refusal(Reason.MODEL_UNSUPPORTED, "post_processor"):
        Tokenizer.from_json(library.to_str())


def test_a_post_processor_that_does_more_than_wrap_is_refused() -> None:
    library = tokenizers.Tokenizer.from_str(zoo.tokenizer_json("byte_level"))
    library.post_processor = tokenizers.processors.TemplateProcessing("$A <s> $A", None, [("<s>", 1)])
    with refusal(Reason.MODEL_UNSUPPORTED, "post_processor"):
        Tokenizer.from_json(library.to_str())


# Digest


def test_the_digest_does_not_depend_on_how_the_json_is_written() -> None:
    spread = json.dumps(json.loads(zoo.tokenizer_json("llama")), indent=3, sort_keys=True)
    assert Tokenizer.from_json(spread).digest == zoo.load("llama").digest


def test_the_digest_changes_with_the_bos_token() -> None:
    assert Tokenizer.from_json(zoo.tokenizer_json("llama"), bos="<s>").digest != zoo.load("llama").digest


def test_the_digest_changes_with_the_vocabulary() -> None:
    document = json.loads(zoo.tokenizer_json("byte_level"))
    document["model"]["merges"].pop()
    assert Tokenizer.from_json(json.dumps(document)).digest != zoo.load("byte_level").digest


# Files


def write(directory: Path, **files: Any) -> Path:
    (directory / "tokenizer.json").write_text(zoo.tokenizer_json("llama"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


@pytest.mark.parametrize(
    ("files", "bos", "eos"),
    [
        ({}, None, None),
        ({"tokenizer_config": {"bos_token": "<s>", "eos_token": {"content": "</s>"}}}, 1, 2),
        ({"special_tokens_map": {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}}, 1, 2),
        ({"config": {"bos_token_id": 1, "eos_token_id": [2, 1]}}, 1, 2),
        ({"config": {"bos_token_id": None, "eos_token_id": []}}, None, None),
        ({"tokenizer_config": {"bos_token": "</s>"}, "config": {"bos_token_id": 1, "eos_token_id": 2}}, 2, 2),
        ({"tokenizer_config": {"bos_token": None}, "config": {"bos_token_id": 1}}, None, None),
        ({"tokenizer_config": {"bos_token": "<s>"}, "special_tokens_map": {"bos_token": "</s>"}}, 1, None),
    ],
)
def test_bos_and_eos_come_from_the_first_file_that_names_them(
    tmp_path: Path, files: dict[str, Any], bos: int | None, eos: int | None
) -> None:
    tokenizer = Tokenizer.from_directory(write(tmp_path, **files))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, eos)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer": "{"},
        {"tokenizer": "[]"},
        {"tokenizer": "{}"},
        {"tokenizer": "[" * 100_000},
        {"tokenizer": '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'},
        {"tokenizer": '{"model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}}'},
        {"tokenizer": '{"model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 0}, "unk_token": "[UNK]"}}'},
        {"tokenizer_config": "nonsense"},
        {"tokenizer_config": {"bos_token": 7}},
        {"tokenizer_config": {"bos_token": {"content": None}}},
        {"tokenizer_config": {"bos_token": "<absent>"}},
        {"config": {"eos_token_id": "2"}},
        {"config": {"eos_token_id": True}},
        {"config": {"eos_token_id": 99999}},
        {"config": {"eos_token_id": -1}},
    ],
)
def test_files_that_are_wrong_are_refused(tmp_path: Path, files: dict[str, Any]) -> None:
    with refusal(Reason.MODEL_INVALID):
        Tokenizer.from_directory(write(tmp_path, **files))


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with refusal(Reason.MODEL_INVALID, "cannot be read"):
        Tokenizer.from_directory(tmp_path)


def test_a_huge_file_is_refused_before_it_is_read_whole(tmp_path: Path) -> None:
    write(tmp_path)
    with (tmp_path / "tokenizer_config.json").open("wb") as file:
        file.truncate(17 << 20)
    with refusal(Reason.MODEL_INVALID, "larger than"):
        Tokenizer.from_directory(tmp_path)


def test_a_directory_without_a_tokenizer_is_not_found(tmp_path: Path) -> None:
    with refusal(Reason.NOT_FOUND, "tokenizer.json"):
        Tokenizer.from_directory(tmp_path)


def test_added_tokens_that_the_library_would_renumber_are_refused() -> None:
    document = json.loads(zoo.tokenizer_json("byte_level"))
    document["added_tokens"].append({**document["added_tokens"][0], "id": 9_000, "content": "<far>"})
    with refusal(Reason.MODEL_INVALID, "<far>", "9000"):
        Tokenizer.from_json(json.dumps(document))


def _with_model(**changes: Any) -> str:
    return zoo.edited("byte_level", model=json.loads(zoo.tokenizer_json("byte_level"))["model"] | changes)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (lambda: zoo.edited("byte_level", pre_tokenizer=None), "ByteLevel"),
        (lambda: zoo.edited("byte_level", decoder={"type": "Fuse"}), "ByteLevel"),
        (lambda: zoo.edited("llama", normalizer=None), "mark for a space"),
        (lambda: zoo.edited("llama", decoder={"type": "Fuse"}), "mark for a space"),
        (lambda: zoo.edited("llama", decoder=None, normalizer=None), "without ByteLevel"),
        (lambda: zoo.edited("metaspace", decoder=json.loads(zoo.tokenizer_json("byte_level"))["decoder"]), "both"),
        (lambda: _with_model(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (lambda: _with_model(continuing_subword_prefix="##"), "continuing_subword_prefix"),
        (lambda: _with_model(dropout=0.1), "dropout"),
    ],
)
def test_a_tokenizer_whose_tokens_cannot_be_told_is_refused(text: Any, word: str) -> None:
    with refusal(Reason.MODEL_UNSUPPORTED, word):
        Tokenizer.from_json(text())


@pytest.mark.parametrize("changes", [{"special_tokens": {}}, {"single": [{"Sequence": {"id": "B", "type_id": 0}}]}])
def test_a_template_that_contradicts_itself_is_refused(changes: dict[str, Any]) -> None:
    template = json.loads(zoo.tokenizer_json("llama"))["post_processor"] | changes
    with pytest.raises(Problem) as caught:
        Tokenizer.from_json(zoo.edited("llama", post_processor=template))
    assert caught.value.reason in {Reason.MODEL_INVALID, Reason.MODEL_UNSUPPORTED}


def test_a_post_processor_that_adds_an_unknown_id_is_refused() -> None:
    post_processor = {"type": "BertProcessing", "cls": ["x", 2**31], "sep": ["</s>", 2]}
    with refusal(Reason.MODEL_INVALID, "post_processor adds"):
        Tokenizer.from_json(zoo.edited("byte_level", post_processor=post_processor))


def test_a_normaliser_written_without_its_type_is_read_as_the_library_reads_it() -> None:
    normalizer = {"normalizers": [{"type": "Replace", "pattern": {"String": "``"}, "content": '"'}]}
    tokenizer = Tokenizer.from_json(zoo.edited("byte_level", normalizer=normalizer))
    assert offsets(tokenizer.encode("a``b", special_tokens=False)) == [(0, 1), (1, 3), (3, 4)]


def test_a_panic_inside_the_library_is_a_problem_like_any_other() -> None:
    normalizer = {"type": "Replace", "pattern": {"Regex": "a*"}, "content": "x"}
    tokenizer = Tokenizer.from_json(zoo.edited("byte_level", normalizer=normalizer))
    with refusal(Reason.INVALID_TEXT):
        tokenizer.encode("é東 ", special_tokens=False)


def test_a_decoder_that_is_absent_is_no_contradiction() -> None:
    tokenizer = Tokenizer.from_json(zoo.edited("byte_level", decoder=None))
    assert b"".join(tokenizer.encode("é 🧿", special_tokens=False).pieces) == "é 🧿".encode()


# Text


@pytest.mark.parametrize("text", ["ab\ud83dc", "ab\udc00"])
def test_a_lone_surrogate_is_refused_with_its_index(text: str) -> None:
    with pytest.raises(Problem, match="character 2") as caught:
        check_text(text, "items[3].text")
    assert (caught.value.reason, caught.value.detail.field) == (Reason.INVALID_TEXT, "items[3].text")


def test_encoding_refuses_a_lone_surrogate() -> None:
    with refusal(Reason.INVALID_TEXT):
        plain("byte_level", "\ud800")
