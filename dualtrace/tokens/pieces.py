"""What bytes each token id stands for, decided from the tokenizer's own JSON and refused where it cannot be.

It must not know offsets, text or how ids are made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from dualtrace.problems import Problem, Reason, Unsupported
from dualtrace.tokens.definition import Stages
from dualtrace.tokens.offsets import parts

Decode = Callable[[str], bytes]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PLAIN_DECODERS = {"Fuse", "ByteFallback"}
_WORD_MODELS = {"WordLevel", "WordPiece"}


def gpt2_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary, after GPT-2: character -> byte.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for U+0100 and up.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level_decode() -> Decode:
    alphabet = gpt2_alphabet()
    table = {ord(character): byte for character, byte in alphabet.items()}
    # Latin-1 characters outside the alphabet must fail to encode below instead of passing as bytes.
    table |= {code: 0x100 for code in range(256) if chr(code) not in alphabet}

    def decode(token: str) -> bytes:
        try:
            return token.translate(table).encode("latin-1")
        except UnicodeEncodeError:
            return token.encode()  # as the library's own decoder: a token outside the alphabet is literal

    return decode


def _plain_decode(space: str, byte_fallback: bool) -> Decode:
    """Tokens are text with `space` in the place of " " ("" = no such mark) and perhaps `<0xE2>` for single bytes."""

    def decode(token: str) -> bytes:
        if byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes((int(match[1], 16),))
        return (token.replace(space, " ") if space else token).encode()

    return decode


def refuse_affixes(document: dict[str, Any]) -> None:
    """To be called before the library sees the file: on some of these it does not raise but ends the process."""
    model = document.get("model")
    if not isinstance(model, dict) or "merges" not in model:
        return
    for affix in ("end_of_word_suffix", "continuing_subword_prefix"):
        if model.get(affix):
            raise _refuse(f"its BPE model marks words with {affix} = {model[affix]!r:.80}")


def choose_decode(model: dict[str, Any], model_kind: str, stages: Stages) -> tuple[Decode, bool]:
    """How this tokenizer's vocabulary strings become bytes, and whether it is of the SentencePiece style."""
    inside = list(parts([stages.normalizer, stages.pre_tokenizer]))
    outside = list(parts(stages.decoder))
    byte_level = _has_byte_level(inside), _has_byte_level(outside)
    spaces = _space_marks(inside, to_text=False), _space_marks(outside, to_text=True)
    if any(byte_level) and any(spaces):
        raise _refuse("it is byte-level and marks spaces as SentencePiece does, both at once")
    if any(byte_level):
        _require_agreement(byte_level[0], byte_level[1] or not outside, "ByteLevel")
        return _byte_level_decode(), False
    fallback = bool(model.get("byte_fallback")) or any(part.get("type") == "ByteFallback" for part in outside)
    if any(spaces):
        _require_agreement(bool(spaces[0]), bool(spaces[1]) or not outside, "the mark for a space")
        marks = spaces[0] | spaces[1]
        if len(marks) > 1:
            raise _refuse(f"it marks spaces in several ways: {sorted(marks)}")
        return _plain_decode(marks.pop(), fallback), True
    _require_literal_vocabulary(model, model_kind, outside)
    return _plain_decode("", fallback), False


def _require_literal_vocabulary(model: dict[str, Any], model_kind: str, outside: list[dict[str, Any]]) -> None:
    """With no mark for spaces and no byte alphabet, tokens are literal text only where nothing says otherwise."""
    if model_kind in _WORD_MODELS:
        return
    decoders = {str(part["type"]) for part in outside if "type" in part} - {"Sequence"}
    marked = any("▁" in token for token in model["vocab"]) if model_kind == "BPE" else True
    if marked or decoders - _PLAIN_DECODERS:
        raise _refuse(f"a {model_kind} model without ByteLevel, Metaspace or a Replace of spaces, decoders {decoders}")


def _has_byte_level(found: Iterable[dict[str, Any]]) -> bool:
    return any(part.get("type") == "ByteLevel" for part in found)


def _space_marks(found: Iterable[dict[str, Any]], *, to_text: bool) -> set[str]:
    marks = set()
    for part in found:
        pattern, content = part.get("pattern"), part.get("content")
        if part.get("type") == "Metaspace":
            marks.add(str(part.get("replacement", "▁")))
        elif part.get("type") == "Replace" and isinstance(pattern, dict) and content and "String" in pattern:
            mark, space = (pattern["String"], content) if to_text else (content, pattern["String"])
            if space == " ":
                marks.add(str(mark))
    return marks


def _require_agreement(encodes: bool, decodes: bool, what: str) -> None:
    if not (encodes and decodes):
        where = (
            "its decoder but not in its normalizer or pre_tokenizer" if decodes else "its encoding but not its decoder"
        )
        raise _refuse(f"{what} stands in {where}")


def _refuse(why: str) -> Problem:
    return Unsupported(
        Reason.MODEL_UNSUPPORTED,
        f"cannot tell which bytes this tokenizer's tokens stand for: {why}",
        field="tokenizer",
        allowed="byte-level, SentencePiece style (Metaspace or Replace of spaces), WordPiece, WordLevel, literal BPE",
    )
