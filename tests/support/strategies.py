"""Hypothesis strategies for every question and answer, and equality that looks into arrays.

It knows the plain values. It must not know the wire.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from dualtrace.card import Capabilities, Card, Limits, QuestionKind
from dualtrace.engine import int_array
from dualtrace.model_card import ModelProvenance
from dualtrace.problems import BY_CODE, Problem, Reason
from dualtrace.questions.answers import (
    AnswerHeader,
    AnswerSummary,
    Execution,
    ItemDone,
    ItemHeader,
    ItemProblem,
    NextTokenAnswer,
    NextTokenResult,
    NextTokens,
    PreflightAnswer,
    PreflightResult,
    RollingWindows,
    ScoreAnswer,
    ScoreResult,
    Tail,
    TokenChunk,
    TokenizeAnswer,
    Usage,
)
from dualtrace.questions.asked import (
    Input,
    LogprobItem,
    LogprobQuestion,
    NextTokenQuestion,
    RollingQuestion,
    ScoreQuestion,
    TokenizeQuestion,
    Variant,
)
from dualtrace.tokens import Boundary, Prefix, PrefixKind, Tokens

INT32 = st.integers(-(2**31), 2**31 - 1)
COUNTS = st.integers(0, 2**31 - 1)
IDS = st.lists(INT32, max_size=5)
TEXTS = st.text(max_size=12)
LOGPROBS = st.floats(max_value=0.0, allow_nan=False)
SECONDS = st.floats(0, 1e6)


def same(left: Any, right: Any) -> bool:
    """Equal to the last bit, arrays and problems included."""
    if isinstance(left, Problem):
        return type(left) is type(right) and left.detail == right.detail
    if isinstance(left, np.ndarray):
        return (
            isinstance(right, np.ndarray)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and left.tobytes() == right.tobytes()
        )
    if is_dataclass(left):
        names = [entry.name for entry in fields(left)]
        return type(left) is type(right) and all(same(getattr(left, n), getattr(right, n)) for n in names)
    if isinstance(left, tuple):
        return isinstance(right, tuple) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and bool(left == right)


INPUTS = st.builds(lambda text: Input(text=text), TEXTS) | st.builds(lambda v: Input(ids=int_array(v)), IDS)
PREFIXES = (
    st.just(Prefix())
    | st.builds(lambda kind: Prefix(kind=kind), st.sampled_from(PrefixKind))
    | st.builds(lambda token_id: Prefix(token_id=token_id), COUNTS)
)
VARIANTS = st.integers(1, 3).map(lambda count: (Variant(),) * count)
MANY_INPUTS = st.lists(INPUTS, max_size=4).map(tuple)

LOGPROB_QUESTIONS = st.builds(
    LogprobQuestion,
    items=st.lists(st.builds(LogprobItem, INPUTS, INPUTS), max_size=4).map(tuple),
    boundary=st.none() | st.sampled_from(Boundary),
    prefix=PREFIXES,
    top_k=INT32,
    variants=VARIANTS,
    deterministic=st.booleans(),
)
ROLLING_QUESTIONS = st.builds(
    RollingQuestion,
    inputs=MANY_INPUTS,
    prefix=PREFIXES,
    max_tokens=st.none() | INT32,
    stride=st.none() | INT32,
    top_k=INT32,
    variants=VARIANTS,
    deterministic=st.booleans(),
)
NEXT_TOKEN_QUESTIONS = st.builds(
    NextTokenQuestion,
    prompts=MANY_INPUTS,
    top_k=INT32,
    extra_token_ids=IDS.map(tuple),
    prefix=PREFIXES,
    variants=VARIANTS,
    deterministic=st.booleans(),
)


@st.composite
def score_questions(draw: st.DrawFn) -> ScoreQuestion:
    shared = draw(st.booleans())
    return ScoreQuestion(
        query=draw(INPUTS),
        items=draw(MANY_INPUTS),
        labels=draw(IDS.map(tuple)) if shared else None,
        item_labels=None if shared else draw(st.none() | st.lists(IDS.map(tuple), max_size=3).map(tuple)),
        apply_softmax=draw(st.booleans()),
        temperature=draw(st.none() | st.floats(allow_nan=False)),
        item_first=draw(st.booleans()),
        variants=draw(VARIANTS),
        deterministic=draw(st.booleans()),
    )


TOKENIZE_QUESTIONS = st.builds(TokenizeQuestion, MANY_INPUTS, st.booleans())


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    kind = draw(st.sampled_from(sorted(BY_CODE.values(), key=lambda kind: kind.code)))
    item = draw(st.none() | COUNTS)
    return kind(draw(st.sampled_from(Reason)), draw(TEXTS), field=draw(TEXTS), allowed=draw(TEXTS), item=item)


PROBLEMS = problems()


@st.composite
def tokens(draw: st.DrawFn, count: int | None = None, offsets: bool | None = None) -> Tokens:
    size = draw(st.integers(0, 5)) if count is None else count
    has_offsets = size > 0 and (draw(st.booleans()) if offsets is None else offsets)

    def column() -> Any:
        return int_array(draw(st.lists(COUNTS, min_size=size, max_size=size)))

    pieces = draw(st.just(()) | st.lists(st.binary(max_size=4), min_size=size, max_size=size).map(tuple))
    return Tokens(column(), pieces, column() if has_offsets else None, column() if has_offsets else None)


PROVENANCES = st.builds(
    ModelProvenance,
    **dict.fromkeys((entry.name for entry in fields(ModelProvenance) if entry.type == "str"), TEXTS),
    adapter_digests=st.lists(st.tuples(TEXTS, TEXTS), max_size=2).map(tuple),
    synthetic=st.booleans(),
)
EXECUTIONS = st.builds(
    Execution,
    queue_seconds=SECONDS,
    tokenize_seconds=SECONDS,
    compute_seconds=SECONDS,
    total_seconds=SECONDS,
    batches=COUNTS,
    computed_tokens=st.integers(0, 2**63 - 1),
    shared_tokens=st.integers(0, 2**63 - 1),
    step_tokens=COUNTS,
    deterministic=st.booleans(),
    buckets=st.lists(TEXTS, max_size=2).map(tuple),
    server_version=TEXTS,
)
USAGES = st.builds(Usage, st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))
CARDS = st.builds(
    Card,
    provenance=PROVENANCES,
    capabilities=st.builds(
        Capabilities,
        questions=st.lists(st.sampled_from(QuestionKind), unique=True).map(tuple),
        **{
            name: st.booleans()
            for name in (
                "text", "streams", "shares_prefixes", "deterministic", "masks", "views", "ranks", "distributions",
            )
        },
    ),
    limits=st.builds(Limits, *[COUNTS] * 7),
    vocab_size=COUNTS,
    layers=COUNTS,
    query_heads=COUNTS,
    kv_heads=COUNTS,
    hidden_size=COUNTS,
    windows=st.lists(st.none() | st.integers(1, 2**31 - 1), max_size=3).map(tuple),
    buckets=st.lists(TEXTS, max_size=3).map(tuple),
    bos_token_id=st.none() | COUNTS,
    eos_token_id=st.none() | COUNTS,
    tokenizer_prefix_ids=st.lists(COUNTS, max_size=2).map(tuple),
    adapters=st.lists(TEXTS, max_size=2).map(tuple),
    server_version=TEXTS,
)  # fmt: skip

ITEM_HEADERS = st.builds(
    ItemHeader,
    token_count=COUNTS,
    prompt_tokens=COUNTS,
    scored_start=st.none() | COUNTS,
    prefix_token_id=st.none() | COUNTS,
    boundary_token_merged=st.booleans(),
    unscored=st.none() | tokens(),
    windows=st.none() | st.builds(RollingWindows, COUNTS, COUNTS, COUNTS),
)
HEADERS = st.builds(
    AnswerHeader,
    provenance=PROVENANCES,
    items=st.lists(ITEM_HEADERS, max_size=3).map(tuple),
    variants=COUNTS,
    top_k=COUNTS,
    streams=st.booleans(),
    has_pieces=st.booleans(),
    has_offsets=st.booleans(),
)


@st.composite
def chunks(draw: st.DrawFn) -> TokenChunk:
    count, top_k = draw(st.integers(1, 5)), draw(st.integers(0, 3))

    def ints(size: int) -> Any:
        return int_array(draw(st.lists(COUNTS, min_size=size, max_size=size)))

    def floats(size: int) -> Any:
        return np.array(draw(st.lists(LOGPROBS, min_size=size, max_size=size)), np.float64)

    return TokenChunk(
        draw(COUNTS), draw(COUNTS), draw(COUNTS), draw(tokens(count=count)), floats(count), ints(count), ints(count),
        ints(count * top_k).reshape(count, top_k) if top_k else None,
        floats(count * top_k).reshape(count, top_k) if top_k else None,
    )  # fmt: skip


DONES = st.builds(
    ItemDone,
    item=COUNTS,
    variant=COUNTS,
    scored_tokens=COUNTS,
    total_logprob=st.none() | LOGPROBS,
    mean_logprob=st.none() | LOGPROBS,
    perplexity=st.none() | st.floats(1, 1e300),
    is_greedy=st.none() | st.booleans(),
)
EVENTS = (
    HEADERS
    | chunks()
    | DONES
    | st.builds(ItemProblem, COUNTS, COUNTS, PROBLEMS)
    | st.builds(AnswerSummary, USAGES, EXECUTIONS, COUNTS, COUNTS)
)
TAILS = st.just(Tail("FULL_COVERAGE")) | st.just(Tail("UNDERFLOW")) | st.builds(lambda v: Tail("MEASURED", v), LOGPROBS)


@st.composite
def next_tokens(draw: st.DrawFn) -> NextTokens:
    k, extra = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    return NextTokens(
        top_ids=int_array(draw(st.lists(COUNTS, min_size=k, max_size=k))),
        top_logprobs=np.array(draw(st.lists(LOGPROBS, min_size=k, max_size=k)), np.float64),
        top_pieces=draw(st.just(()) | st.lists(st.binary(max_size=3), min_size=k, max_size=k).map(tuple)),
        tail=draw(TAILS),
        extra_logprobs=np.array(draw(st.lists(LOGPROBS, min_size=extra, max_size=extra)), np.float64),
        tail_beyond_extra=draw(st.none() | TAILS),
        vocab_size=draw(COUNTS),
        prompt_tokens=draw(COUNTS),
        prefix_token_id=draw(st.none() | COUNTS),
    )


NEXT_TOKEN_ANSWERS = st.builds(
    NextTokenAnswer,
    st.lists(st.builds(NextTokenResult, COUNTS, COUNTS, next_tokens() | PROBLEMS), max_size=3).map(tuple),
    PROVENANCES,
    USAGES,
    EXECUTIONS,
)
FLOATS = st.lists(st.floats(allow_nan=False), max_size=3).map(tuple)
SCORE_ANSWERS = st.builds(
    ScoreAnswer,
    st.lists(st.builds(ScoreResult, COUNTS, COUNTS, COUNTS, FLOATS, FLOATS, st.none() | PROBLEMS), max_size=3).map(
        tuple
    ),
    PROVENANCES,
    USAGES,
    EXECUTIONS,
)
TOKENIZE_ANSWERS = st.builds(TokenizeAnswer, st.lists(tokens() | PROBLEMS, max_size=3).map(tuple))
PREFLIGHT_ANSWERS = st.builds(
    PreflightAnswer,
    st.lists(st.builds(PreflightResult, st.booleans(), st.none() | PROBLEMS), max_size=3).map(tuple),
)
