"""A tokenizer as dualtrace uses it: text to ids, pieces and honest offsets, and ids to pieces.

It knows the `tokenizers` library. It must not know models, engines or transformers.

An object is never changed after it was built, so it may be used from several threads at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np
import tokenizers

from dualtrace.arrays import IntArray
from dualtrace.problems import InvalidArgument, Problem, Reason, Unsupported
from dualtrace.tokens import boundaries, definition, pieces, prefixes
from dualtrace.tokens.definition import SpecialName, Stages, invalid
from dualtrace.tokens.offsets import read_rewriting, repair
from dualtrace.tokens.sequence import Tokens, check_text

_HIGHEST_ID = 2**31 - 1


class Tokenizer:
    """Build it with `from_directory` or `from_json`."""

    digest: Final[str]  # "sha256:..." over the canonical JSON of tokenizer.json and the bos and eos ids
    size: Final[int]  # the highest known id + 1, added tokens included
    bos_id: Final[int | None]
    eos_id: Final[int | None]
    own_prefix: Final[tuple[int, ...]]  # the ids that the tokenizer itself puts in front of a text; () when none

    def __init__(self, tokenizer_json: str, bos: SpecialName, eos: SpecialName) -> None:
        document = definition.parse_object(tokenizer_json, "tokenizer.json")
        self._library = _build(document)
        stages = _read_stages(self._library)
        self._pieces = _piece_table(document, stages, self._library)
        self._rewriting = read_rewriting(stages.normalizer)
        self.size = max(self._pieces, default=-1) + 1
        self.bos_id = self._find_id("bos", bos)
        self.eos_id = self._find_id("eos", eos)
        self.digest = definition.digest(document, self.bos_id, self.eos_id)
        self.own_prefix, self._own_suffix = definition.own_specials(stages.post_processor)
        self._check_own_specials()

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Read tokenizer.json, and bos and eos from the first of tokenizer_config.json, special_tokens_map.json and
        config.json that names them. A null there says that there is none."""
        files = definition.read_files(directory)
        return cls(files.tokenizer_json, files.bos, files.eos)

    @classmethod
    def from_json(cls, text: str, *, bos: str | None = None, eos: str | None = None) -> Tokenizer:
        return cls(text, bos, eos)

    def encode(self, text: str, *, special_tokens: bool) -> Tokens:
        """`special_tokens`: with the tokenizer's own, leading at offsets 0-0 and trailing at the end of the text."""
        check_text(text, "text")
        ids, starts, ends = self._encode_plain(text)
        if special_tokens and (self.own_prefix or self._own_suffix):
            front, back = self.own_prefix, self._own_suffix
            ids = np.concatenate([_ints(front), ids, _ints(back)])
            edges = np.zeros(len(front), np.int32), np.full(len(back), len(text), np.int32)
            starts = np.concatenate([edges[0], starts, edges[1]])
            ends = np.concatenate([edges[0], ends, edges[1]])
        return Tokens(ids, self._look_up(ids), starts, ends)

    def describe_ids(self, ids: Sequence[int] | IntArray) -> Tokens:
        """The pieces of given ids; one that the tokenizer does not know (a padding row of a logit matrix) is empty."""
        wide = np.asarray(ids, dtype=np.int64)
        wrong = np.flatnonzero((wide < 0) | (wide > _HIGHEST_ID))
        if len(wrong):
            index = int(wrong[0])
            raise InvalidArgument(
                Reason.TOKEN_OUT_OF_RANGE,
                f"token id {wide[index]} at index {index}; token ids start at 0",
                field="ids",
                allowed=f"0-{_HIGHEST_ID}",
            )
        return Tokens(wide.astype(np.int32), self._look_up(wide), None, None)

    def cut(self, prompt: str, completion: str, boundary: boundaries.Boundary) -> boundaries.Cut:
        return boundaries.cut(lambda text: self.encode(text, special_tokens=False), prompt, completion, boundary)

    def prefix_for_text(self, prefix: prefixes.Prefix) -> int | None:
        return prefixes.prefix_for_text(prefix, self)

    def _encode_plain(self, text: str) -> tuple[IntArray, IntArray, IntArray]:
        with _library_failures(_cannot_encode):
            encoding = self._library.encode(text, add_special_tokens=False)
        ids = _ints(encoding.ids)
        edges = np.fromiter(chain.from_iterable(encoding.offsets), np.int32, 2 * len(ids))
        starts, ends = repair(text, edges[0::2].copy(), edges[1::2].copy(), self._rewriting)
        return ids, starts, ends

    def _look_up(self, ids: IntArray | np.ndarray[Any, np.dtype[np.int64]]) -> tuple[bytes, ...]:
        table = self._pieces
        return tuple([table.get(token_id, b"") for token_id in ids.tolist()])

    def _find_id(self, name: str, special: SpecialName) -> int | None:
        token_id = self._library.token_to_id(special) if isinstance(special, str) else special
        if special is not None and token_id not in self._pieces:
            raise invalid(
                f"the model's files name {special!r} as {name}_token, which tokenizer.json does not hold; "
                f"correct {name}_token in tokenizer_config.json (null for none)"
            )
        return token_id

    def _check_own_specials(self) -> None:
        """What was read from the post-processor must be what the library does with it."""
        unknown = [token_id for token_id in self.own_prefix + self._own_suffix if token_id not in self._pieces]
        if unknown:
            raise invalid(f"tokenizer.json's post_processor adds ids {unknown}, which its vocabulary does not hold")
        with _library_failures(lambda error: invalid(f"the tokenizer cannot encode the letter a: {error}")):
            plain = self._library.encode("a", add_special_tokens=False).ids
            whole = self._library.encode("a", add_special_tokens=True).ids
        if whole != [*self.own_prefix, *plain, *self._own_suffix]:
            raise Unsupported(
                Reason.MODEL_UNSUPPORTED,
                f"the post_processor turns {plain} into {whole}, and not, as it reads, into "
                f"{[*self.own_prefix, *plain, *self._own_suffix]}; use one TemplateProcessing with one sequence",
                field="tokenizer",
            )


@contextmanager
def _library_failures(describe: Callable[[BaseException], Problem]) -> Iterator[None]:
    """The library raises bare Exception, and a panic inside it arrives as a BaseException of no importable class."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise describe(error) from error


def _cannot_encode(error: BaseException) -> Problem:
    return InvalidArgument(Reason.INVALID_TEXT, f"this tokenizer cannot encode the text: {error}", field="text")


def _build(document: dict[str, Any]) -> tokenizers.Tokenizer:
    pieces.refuse_affixes(document)
    with _library_failures(lambda error: invalid(f"tokenizer.json is refused by the tokenizers library: {error}")):
        library = tokenizers.Tokenizer.from_str(json.dumps(definition.neutralise(document), allow_nan=False))
    definition.refuse_randomness(document)
    return library


def _read_stages(library: tokenizers.Tokenizer) -> Stages:
    """From the library and not from the file: old files leave types out, and what it made of them is what counts."""
    parts = (library.normalizer, library.pre_tokenizer, library.post_processor, library.decoder)
    return Stages(*(None if part is None else json.loads(part.__getstate__()) for part in parts))


def _piece_table(document: dict[str, Any], stages: Stages, library: tokenizers.Tokenizer) -> dict[int, bytes]:
    """id -> bytes. A dict, because a hostile file may name an id of four thousand millions."""
    decode, sentencepiece_style = pieces.choose_decode(document["model"], type(library.model).__name__, stages)
    vocabulary = _vocabulary(document["model"]["vocab"])
    table = {token_id: decode(token) for token, token_id in vocabulary.items()}
    if len(table) != len(vocabulary):
        raise invalid("tokenizer.json gives one id to several tokens of its vocabulary")
    added = library.get_added_tokens_decoder()
    _check_added_ids(document, {token.content: token_id for token_id, token in added.items()})
    for token_id, token in added.items():
        # SentencePiece vocabularies list ordinary pieces ("▁▁") among the added tokens too: those keep their meaning.
        if not (sentencepiece_style and not token.special and vocabulary.get(token.content) == token_id):
            table[token_id] = token.content.encode()
    if table and max(table) > _HIGHEST_ID:
        raise invalid(f"tokenizer.json holds token id {max(table)}; ids end at {_HIGHEST_ID}")
    return table


def _vocabulary(vocab: dict[str, int] | list[list[Any]]) -> dict[str, int]:
    if isinstance(vocab, dict):
        return vocab
    return {token: token_id for token_id, (token, _score) in enumerate(vocab)}


def _check_added_ids(document: dict[str, Any], real: dict[str, int]) -> None:
    """The library renumbers added tokens whose ids leave a gap: every id of the text would then be another."""
    for entry in document.get("added_tokens") or ():
        content, written = entry["content"], entry["id"]
        if real.get(content) != written:
            raise invalid(
                f"tokenizer.json gives the added token {content!r} the id {written}, but it comes out as "
                f"{real.get(content)}: ids of added tokens must follow the vocabulary without a gap"
            )


def _ints(values: Sequence[int]) -> IntArray:
    return np.array(values, dtype=np.int32)
