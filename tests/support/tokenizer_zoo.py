"""Small tokenizers of every style, trained on a few lines, as tokenizer.json text. Built once per process."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from dualtrace.tokens import Tokenizer as DualtraceTokenizer

CORPUS = [
    "The capital of France is Paris, and the capital of Germany is Berlin.",
    "def main(argv):\n    return [x for x in argv if x != 'no']\n\n",
    "héllo wörld, ça va? naïve café cafe\u0301 cafe\u0301 fiancé",
    "東京は日本の首都です。東京は日本の首都です。中文字符也在这里",
    "👍 👍 👍🏽 👩‍👩‍👧 👩‍👩‍👧 🎉🎉🎉 thanks 👍",
    "שלום עולם مرحبا بالعالم שלום עולם",
    "    four spaces        eight spaces\t\ttabs",
] * 4

HARD_TEXTS = [
    "",
    " ",
    "a",
    "The capital of France is Paris",
    "  two spaces, and a trail  ",
    "tabs\t\tand\r\nlines\n\n\nmore",
    "👍🏽 👩‍👩‍👧‍👦 🎉",
    "東京は日本の首都です。",
    "cafe\u0301 e\u0301\u0323 \u1112\u1161\u11ab Å ﬁn ｶﾞ ½",
    "שלום עולם! مرحبا",
    "a\0b\x01c\x7f\u200b\u200d\ufeff\u2028x",
    "\U0010ffff\ufffd\ue000",
    "\u0301starts with a mark",
    " " * 300 + "x",
    "</s> is special, <s>so is this</s>",
    "<0x41> ▁ ▁▁ Ġ ## \u00a0",
]

SPECIALS = ["<unk>", "<s>", "</s>"]


def _byte_level(add_prefix_space: bool = False, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIALS,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _sentencepiece(normalizer: Any, pre_tokenizer: Any, decoder: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=470, special_tokens=SPECIALS + byte_tokens, limit_alphabet=60, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Byte tokens are vocabulary, not added tokens: text that spells one is not to be matched as a whole.
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] in SPECIALS]
    return Tokenizer.from_str(json.dumps(document))


def _llama() -> Tokenizer:
    tokenizer = _sentencepiece(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    )
    tokenizer.post_processor = _template("<s> $A")
    return tokenizer


def _metaspace() -> Tokenizer:
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return _sentencepiece(None, pre_tokenizers.Metaspace(), decoder)


def _template(single: str) -> Any:
    return processors.TemplateProcessing(single=single, pair=None, special_tokens=[("<s>", 1), ("</s>", 2)])


def _both_specials() -> Tokenizer:
    tokenizer = _byte_level()
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), _template("<s> $A </s>")])
    return tokenizer


def _trimming() -> Tokenizer:
    tokenizer = _byte_level()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def _roberta() -> Tokenizer:
    tokenizer = _byte_level(add_prefix_space=True)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1), trim_offsets=True)
    return tokenizer


def _llama3() -> Tokenizer:
    tokenizer = _byte_level()
    split = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _replacing() -> Tokenizer:
    collapse = normalizers.Sequence([normalizers.Replace("``", '"'), normalizers.Replace(Regex(" {2,}"), " ")])
    return _byte_level(normalizer=collapse)


BUILDERS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": _byte_level,
    "byte_level_prefix_space": lambda: _byte_level(add_prefix_space=True),
    "byte_level_trimming": _trimming,
    "byte_level_nfc": lambda: _byte_level(normalizer=normalizers.NFC()),
    "byte_level_nfkc": lambda: _byte_level(normalizer=normalizers.NFKC()),
    "byte_level_nfd": lambda: _byte_level(normalizer=normalizers.NFD()),
    "byte_level_replacing": _replacing,
    "byte_level_both_specials": _both_specials,
    "roberta": _roberta,
    "llama3": _llama3,
    "llama": _llama,
    "metaspace": _metaspace,
    "wordpiece": _wordpiece,
}

EXACT = ("byte_level", "byte_level_trimming", "byte_level_both_specials", "llama3")
"""Byte-level without normaliser and prefix space: pieces are the text's own bytes, one after another."""

SPACE_IN_FRONT = ("byte_level_prefix_space", "roberta", "llama", "metaspace")
"""The same, but a text may get a space of its own in front."""


@cache
def tokenizer_json(name: str) -> str:
    return BUILDERS[name]().to_str()


@cache
def load(name: str) -> DualtraceTokenizer:
    return DualtraceTokenizer.from_json(tokenizer_json(name))


def edited(name: str, **changes: Any) -> str:
    """The tokenizer.json of `name` with top-level entries replaced."""
    return json.dumps(json.loads(tokenizer_json(name)) | changes)
