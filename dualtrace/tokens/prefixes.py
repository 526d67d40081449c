"""Which token, if any, is put in front of a sequence so that its first token can be scored.

It knows the policy and the few facts of a tokenizer that decide it. It must not know text or vocabularies.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from dualtrace.problems import InvalidArgument, Reason

_HIGHEST_ID = 2**31 - 1


class PrefixKind(Enum):
    NONE = "NONE"
    BOS = "BOS"
    EOS = "EOS"


@dataclass(frozen=True)
class Prefix:
    """The policy as asked; kind None and token_id None = the default, which differs for text and for ids."""

    kind: PrefixKind | None = None
    token_id: int | None = None  # any id that the model accepts; whoever knows the logit width checks the upper end

    def __post_init__(self) -> None:
        if self.kind is not None and self.token_id is not None:
            raise InvalidArgument(
                Reason.CONFLICT,
                f"the prefix is given twice, as {self.kind.value} and as token id {self.token_id}; give one of them",
                field="prefix",
            )
        if self.token_id is not None and not 0 <= self.token_id <= _HIGHEST_ID:
            raise InvalidArgument(
                Reason.TOKEN_OUT_OF_RANGE,
                f"prefix token id {self.token_id} asked; token ids start at 0",
                field="prefix.token_id",
                allowed=f"0-{_HIGHEST_ID}",
            )


class KnowsPrefixes(Protocol):
    @property
    def own_prefix(self) -> tuple[int, ...]: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...


def prefix_for_text(prefix: Prefix, tokenizer: KnowsPrefixes) -> int | None:
    """The token in front of an encoded text; the default is what the tokenizer itself adds."""
    if prefix.kind is not None or prefix.token_id is not None:
        return prefix_for_ids(prefix, tokenizer)
    if len(tokenizer.own_prefix) > 1:
        raise InvalidArgument(
            Reason.MISSING,
            f"this tokenizer puts {len(tokenizer.own_prefix)} tokens in front, ids {list(tokenizer.own_prefix)}, "
            "but a prefix is one token: name it",
            field="prefix",
            allowed="NONE, BOS, EOS or a token id",
        )
    return tokenizer.own_prefix[0] if tokenizer.own_prefix else None


def prefix_for_ids(prefix: Prefix, tokenizer: KnowsPrefixes | None) -> int | None:
    """The token in front of given ids; the default is none, because ids are taken as they are."""
    if prefix.token_id is not None:
        return prefix.token_id
    if prefix.kind is None or prefix.kind is PrefixKind.NONE:
        return None
    if tokenizer is None:
        raise InvalidArgument(
            Reason.NO_PREFIX_TOKEN,
            f"prefix {prefix.kind.value} asked, but no tokenizer is known here; give its token id or ask for NONE",
            field="prefix",
            allowed="NONE or a token id",
        )
    token_id = tokenizer.bos_id if prefix.kind is PrefixKind.BOS else tokenizer.eos_id
    if token_id is None:
        raise InvalidArgument(
            Reason.NO_PREFIX_TOKEN,
            f"prefix {prefix.kind.value} asked, but this tokenizer has no such token; ask for another or give an id",
            field="prefix",
            allowed="NONE, a token id, " + _names_of_known(tokenizer),
        )
    return token_id


def _names_of_known(tokenizer: KnowsPrefixes) -> str:
    known = [("BOS", tokenizer.bos_id), ("EOS", tokenizer.eos_id)]
    return ", ".join(name for name, token_id in known if token_id is not None) or "no BOS or EOS here"
