"""Two small tokenizers, built the same on every machine without a download: byte-level BPE and SentencePiece style.

It knows the `tokenizers` library. It must not know models. Merges are learnt here, in plain Python, from a built-in
text: the library's own trainers run in threads, and a tokenizer that differs by machine would change every test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

BOS, EOS = "<|bos|>", "<|eos|>"
UNKNOWN, SENTENCE_START, SENTENCE_END = "<unk>", "<s>", "</s>"
SPACE_MARK = "▁"

Merge = tuple[str, str]

TEXT = """
The two traces run side by side along one axis of time. When the left one rises and the right one falls, the reader
looks for the first place where they part. A model reads a text from left to right and gives every token a number;
the number says how much the token was expected. If two models give the same numbers for the same tokens, then there
is nothing to explain. If they differ, the difference has a cause: another mask, another weight, another rounding.
The capital of France is Paris, the capital of Germany is Berlin, and the capital of Italy is Rome. In the morning the
old man walked down to the river with his dog, and in the evening they walked home again through the fields. Water is
made of hydrogen and oxygen. There are seven days in a week and twelve months in a year. She said that the answer was
not in the book, but in the way the question was asked. What is the answer to this question? The answer is that we do
not know, and that we should measure it before we say more. One should not be afraid of long words, for most of them
are made of short ones. Nothing is as good as a clear sentence that says what it means and means what it says.
def score(prompt, completion):
    total = 0.0
    for token in completion:
        total += model.logprob(prompt, token)
        prompt = prompt + [token]
    return total
"""


def byte_level_tokenizer(*, add_bos: bool = False, merges: int = 250) -> Tokenizer:
    """Byte-level BPE like GPT-2's: every text can be encoded, an emoji or a Chinese character takes several tokens."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learnt = learn_merges((word for word, _ in split.pre_tokenize_str(TEXT)), merges)
    # two merges can make the same piece, hence dict.fromkeys: ids must have no gap
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in learnt)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([BOS, EOS, *pieces]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=learnt))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (BOS, EOS)])
    if add_bos:
        tokenizer.post_processor = prepend(BOS, vocabulary[BOS])
    return tokenizer


def sentencepiece_style_tokenizer(*, add_bos: bool = True, merges: int = 220) -> Tokenizer:
    """BPE over words marked by their space, as Llama's: a leading space is added, unknown characters become bytes."""
    split = pre_tokenizers.Metaspace(replacement=SPACE_MARK, prepend_scheme="first")
    learnt = learn_merges((word for word, _ in split.pre_tokenize_str(" ".join(TEXT.split()))), merges)
    characters = sorted({character for character in TEXT if not character.isspace()} | {SPACE_MARK})
    specials = [UNKNOWN, SENTENCE_START, SENTENCE_END]
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), *characters, *(left + right for left, right in learnt)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*specials, *pieces]))}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=learnt, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    if add_bos:
        tokenizer.post_processor = prepend(SENTENCE_START, vocabulary[SENTENCE_START])
    return tokenizer


def prepend(token: str, number: int) -> processors.TemplateProcessing:
    """A post-processor that puts one special token before a text."""
    return processors.TemplateProcessing(single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, number)])


def learn_merges(words: Iterable[str], count: int) -> list[Merge]:
    """Byte-pair merges by frequency, ties by the pair itself; fewer than `count` when no pair occurs twice."""
    counted = Counter(words)
    pieces = {word: tuple(word) for word in counted}
    learnt: list[Merge] = []
    while len(learnt) < count:
        pairs: Counter[Merge] = Counter()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += counted[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        learnt.append(best)
        pieces = {word: _merge(parts, best) for word, parts in pieces.items()}
    return learnt


def _merge(parts: tuple[str, ...], pair: Merge) -> tuple[str, ...]:
    merged: list[str] = []
    at = 0
    while at < len(parts):
        if parts[at : at + 2] == pair:
            merged.append(parts[at] + parts[at + 1])
            at += 2
        else:
            merged.append(parts[at])
            at += 1
    return tuple(merged)
