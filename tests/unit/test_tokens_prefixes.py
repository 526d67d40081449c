"""Which token stands in front."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from dualtrace.problems import Problem, Reason
from dualtrace.tokens import Prefix, PrefixKind, Tokenizer, prefix_for_ids
from dualtrace.tokens.prefixes import prefix_for_text
from tests.support import tokenizer_zoo as zoo


@dataclass(frozen=True)
class Known:
    own_prefix: tuple[int, ...] = ()
    bos_id: int | None = None
    eos_id: int | None = None


BOTH = Known(own_prefix=(1,), bos_id=1, eos_id=2)


@pytest.mark.parametrize(
    ("prefix", "for_text", "for_ids"),
    [
        (Prefix(), 1, None),
        (Prefix(PrefixKind.NONE), None, None),
        (Prefix(PrefixKind.BOS), 1, 1),
        (Prefix(PrefixKind.EOS), 2, 2),
        (Prefix(token_id=0), 0, 0),
    ],
)
def test_each_policy_gives_its_token(prefix: Prefix, for_text: int | None, for_ids: int | None) -> None:
    assert (prefix_for_text(prefix, BOTH), prefix_for_ids(prefix, BOTH)) == (for_text, for_ids)


def test_the_default_for_text_is_none_where_the_tokenizer_adds_nothing() -> None:
    assert prefix_for_text(Prefix(), Known(bos_id=1)) is None


def test_a_tokenizer_answers_with_its_own_facts() -> None:
    tokenizer = Tokenizer.from_json(zoo.tokenizer_json("llama"), bos="<s>", eos="</s>")
    asked = (Prefix(), Prefix(PrefixKind.BOS), Prefix(PrefixKind.EOS))
    assert [tokenizer.prefix_for_text(prefix) for prefix in asked] == [1, 1, 2]


def test_several_own_tokens_in_front_must_be_settled_by_name() -> None:
    with pytest.raises(Problem, match="name it") as caught:
        prefix_for_text(Prefix(), Known(own_prefix=(5, 6)))
    assert caught.value.reason is Reason.MISSING


@pytest.mark.parametrize("kind", [PrefixKind.BOS, PrefixKind.EOS])
def test_a_token_that_the_tokenizer_does_not_have_is_refused(kind: PrefixKind) -> None:
    with pytest.raises(Problem, match=kind.value) as caught:
        prefix_for_text(Prefix(kind), Known())
    assert caught.value.reason is Reason.NO_PREFIX_TOKEN


def test_without_a_tokenizer_a_named_token_is_refused() -> None:
    with pytest.raises(Problem) as caught:
        prefix_for_ids(Prefix(PrefixKind.BOS), None)
    assert caught.value.reason is Reason.NO_PREFIX_TOKEN


def test_without_a_tokenizer_an_id_is_honoured() -> None:
    assert prefix_for_ids(Prefix(token_id=7), None) == 7


def test_a_prefix_given_twice_is_refused() -> None:
    with pytest.raises(Problem) as caught:
        Prefix(PrefixKind.BOS, 1)
    assert caught.value.reason is Reason.CONFLICT


@pytest.mark.parametrize("token_id", [-1, 2**31])
def test_a_prefix_id_out_of_range_is_refused(token_id: int) -> None:
    with pytest.raises(Problem) as caught:
        Prefix(token_id=token_id)
    assert caught.value.reason is Reason.TOKEN_OUT_OF_RANGE
