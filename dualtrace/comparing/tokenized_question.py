"""A question in texts, rewritten to the token ids that another side reads: for sides that know no tokenizer.

The numbers must mean the same, so the prefix token that the other side would put in front is named, and what ids cannot
express is refused. It knows questions and whom to ask for tokens. It must not know what is compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dualtrace.arrays import IntArray
from dualtrace.card import Card
from dualtrace.engine import int_array
from dualtrace.problems import FailedPrecondition, InvalidArgument, Problem, Reason
from dualtrace.questions.asked import (
    ForwardQuestion,
    Input,
    LogprobItem,
    LogprobQuestion,
    MaskedForwardQuestion,
    NextTokenQuestion,
    RollingQuestion,
    ScoreQuestion,
    TokenizeQuestion,
)
from dualtrace.runs.run import Run, ScoredItem
from dualtrace.scorer import Scorer, ask_one
from dualtrace.tokens import Boundary, Prefix, PrefixKind, Tokens
from dualtrace.tokens.boundaries import cut
from dualtrace.tokens.prefixes import prefix_for_text


@dataclass(frozen=True)
class _Prefixes:
    """What a card says of its tokenizer's prefixes."""

    own_prefix: tuple[int, ...]
    bos_id: int | None
    eos_id: int | None


def needs_tokenizer(question: ForwardQuestion) -> bool:
    """Whether only a scorer with a tokenizer can read it as it stands."""
    prefix = getattr(question, "prefix", None)
    names_special = prefix is not None and prefix.kind in {PrefixKind.BOS, PrefixKind.EOS}
    return names_special or any(given.text is not None for given in inputs_of(question))


def inputs_of(question: ForwardQuestion) -> tuple[Input, ...]:
    match question:
        case LogprobQuestion():
            return tuple(part for item in question.items for part in (item.prompt, item.completion))
        case RollingQuestion():
            return question.inputs
        case MaskedForwardQuestion():
            return (question.input,)
        case NextTokenQuestion():
            return question.prompts
        case ScoreQuestion():
            return (question.query, *question.items)


async def tokenize_question(
    question: ForwardQuestion, scorer: Scorer, card: Card, deadline: float | None
) -> ForwardQuestion:
    """The same question in ids, as `scorer` reads it."""
    texts = list(dict.fromkeys(_texts(question)))
    special = isinstance(question, ScoreQuestion)
    found: dict[str, Tokens] = {}
    if texts:
        asked = TokenizeQuestion(tuple(Input(text=text) for text in texts), special)
        answer = await ask_one(scorer, asked, deadline=deadline)
        for text, tokens in zip(texts, answer.results, strict=True):
            if isinstance(tokens, Problem):
                raise tokens
            found[text] = tokens
    known = _Prefixes(card.tokenizer_prefix_ids, card.bos_token_id, card.eos_token_id)
    return _rewrite(question, found, known)


def _texts(question: ForwardQuestion) -> Iterator[str]:
    """The texts to encode: pairs as they are read, which is not always each alone."""
    if isinstance(question, LogprobQuestion) and question.boundary is not Boundary.SEPARATE:
        yield from (item.prompt.text + item.completion.text for item in question.items if _is_text(item))  # type: ignore[operator]
    elif isinstance(question, ScoreQuestion):
        if question.query.text is not None:
            yield from (_compose(question, item) for item in question.items)
    else:
        yield from (given.text for given in inputs_of(question) if given.text is not None)


def _is_text(item: LogprobItem) -> bool:
    return item.prompt.text is not None and item.completion.text is not None


def _compose(question: ScoreQuestion, item: Input) -> str:
    pair = (question.query.text or "", item.text or "")
    return "".join(reversed(pair) if question.item_first else pair)


def _rewrite(question: ForwardQuestion, found: dict[str, Tokens], known: _Prefixes) -> ForwardQuestion:
    def ids_of(given: Input) -> Input:
        return given if given.text is None else Input(ids=found[given.text].ids)

    if isinstance(question, ScoreQuestion):
        return _rewrite_score(question, found)
    prefix = _name_prefix(question.prefix, inputs_of(question), known)
    match question:
        case LogprobQuestion():
            boundary = question.boundary or Boundary.JOINT
            items = tuple(_cut(item, boundary, found) if _is_text(item) else item for item in question.items)
            return replace(question, items=items, prefix=prefix, boundary=None)
        case RollingQuestion():
            return replace(question, inputs=tuple(map(ids_of, question.inputs)), prefix=prefix)
        case NextTokenQuestion():
            return replace(question, prompts=tuple(map(ids_of, question.prompts)), prefix=prefix)
        case MaskedForwardQuestion():
            return replace(question, input=ids_of(question.input), prefix=prefix)


def _cut(item: LogprobItem, boundary: Boundary, found: dict[str, Tokens]) -> LogprobItem:
    assert item.prompt.text is not None and item.completion.text is not None, "a pair of texts"  # noqa: PT018
    made = cut(lambda text: found[text], item.prompt.text, item.completion.text, boundary)
    ids = made.tokens.ids
    return LogprobItem(Input(ids=ids[: made.prompt_count]), Input(ids=ids[made.prompt_count :]))


def _rewrite_score(question: ScoreQuestion, found: dict[str, Tokens]) -> ScoreQuestion:
    """Each composed prompt becomes an item of its own: special tokens may stand anywhere in it."""
    if question.query.text is None:
        return question
    if question.packing is not None:
        message = "a packed text query cannot be put into ids item by item; ask it in ids, or without packing"
        raise InvalidArgument(Reason.CONFLICT, message, field="packing")
    items = tuple(Input(ids=found[_compose(question, item)].ids) for item in question.items)
    return replace(question, query=Input(ids=int_array([])), items=items, item_first=False)


def _name_prefix(prefix: Prefix, inputs: Sequence[Input], known: _Prefixes) -> Prefix:
    """The very token that the other side puts in front, by its id."""
    texts = sum(given.text is not None for given in inputs)
    is_default = prefix.kind is None and prefix.token_id is None
    if is_default and not texts:
        return prefix
    token_id = prefix_for_text(prefix, known)
    if is_default and token_id is not None and texts < len(inputs):
        message = (
            f"texts get the tokenizer's own prefix token {token_id} and ids get none, which a question in ids alone"
            " cannot say: name the prefix, or ask texts and ids apart"
        )
        raise InvalidArgument(Reason.CONFLICT, message, field="prefix")
    return Prefix(kind=PrefixKind.NONE) if token_id is None else Prefix(token_id=token_id)


def take_ids_of_run(question: ForwardQuestion, run: Run, variant: int) -> ForwardQuestion:
    """The same question in the ids that a stored run really scored."""
    items = [entry for entry in run.entries if isinstance(entry, ScoredItem) and entry.variant == variant]
    if not isinstance(question, LogprobQuestion | RollingQuestion | MaskedForwardQuestion):
        raise _not_held(f"a run of {question.kind.value} does not hold the ids of its prompts")
    ids = [_all_ids(entry) for entry in items]
    prefixes = {entry.prefix_token_id for entry, one in zip(items, ids, strict=True) if one.size}
    if not prefixes:
        raise _not_held("no item of the run holds any")
    if len(prefixes) != 1:
        raise _not_held(f"the run's items have different prefix tokens, {sorted(map(str, prefixes))}")
    token_id = prefixes.pop()
    prefix = Prefix(kind=PrefixKind.NONE) if token_id is None else Prefix(token_id=token_id)
    match question:
        case RollingQuestion():
            return replace(question, inputs=tuple(Input(ids=one) for one in ids), prefix=prefix)
        case MaskedForwardQuestion():
            return replace(question, input=Input(ids=ids[0]), prefix=prefix)
        case LogprobQuestion():
            cuts = [
                (one[: entry.prompt_tokens], one[entry.prompt_tokens :]) for one, entry in zip(ids, items, strict=True)
            ]
            pairs = tuple(LogprobItem(Input(ids=prompt), Input(ids=completion)) for prompt, completion in cuts)
            return replace(question, items=pairs, prefix=prefix, boundary=None)


def _all_ids(entry: ScoredItem) -> IntArray:
    """None of an item that failed before its tokens were told: it has failed the comparison by itself already."""
    known = [token_id for token_id in entry.token_ids if token_id is not None]
    if len(known) == len(entry.token_ids):
        return np.asarray(known, np.int32)
    if entry.problem is not None:
        return int_array([])
    raise _not_held(f"item {entry.item} of the run does not hold the ids of all its tokens")


def _not_held(what: str) -> FailedPrecondition:
    message = f"this side knows no tokenizer and needs ids, but {what}; give it --tokenizer, or ask in ids"
    return FailedPrecondition(Reason.NO_TOKENIZER, message)
