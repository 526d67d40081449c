"""A run: one side's complete answer to one question, as it is stored, sent to another person and compared later.

`write_run` and `read_run` are the JSON form, versioned; reading what was written and writing it again changes nothing.
The dataclasses here *are* the format. It knows questions and answers. It must not know targets, files or the wire.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

from dualtrace.card import QuestionKind
from dualtrace.model_card import ModelProvenance
from dualtrace.problems import BY_CODE, Detail, Internal, InvalidArgument, Problem, Reason
from dualtrace.questions.answers import Applied, Execution, RollingWindows, Tail, Usage
from dualtrace.questions.asked import (
    Input,
    LogprobQuestion,
    MaskedForwardQuestion,
    NextTokenQuestion,
    RollingQuestion,
    ScoreQuestion,
    TokenizeQuestion,
)
from dualtrace.records import from_json, malformed, parse_json, to_json

KIND = "dualtrace.run"
SCHEMA_VERSION = "1.0"
_VERSION = re.compile(r"([0-9]{1,6})\.([0-9]{1,6})")

AskedQuestion = (
    LogprobQuestion | RollingQuestion | MaskedForwardQuestion | NextTokenQuestion | ScoreQuestion | TokenizeQuestion
)
STREAMED = {QuestionKind.LOGPROB, QuestionKind.ROLLING_LOGPROB, QuestionKind.MASKED_FORWARD}


@dataclass(frozen=True)
class StoredProblem:
    """Why an item has no answer."""

    code: str  # the gRPC status' name
    reason: str
    field: str
    message: str
    allowed: str


@dataclass(frozen=True)
class ScoredItem:
    """One item of Logprob, RollingLogprob or MaskedForward. The lists count the same tokens, no prefix token."""

    item: int
    variant: int
    prefix_token_id: int | None
    prompt_tokens: int
    scored_start: int | None  # index of the first scored token; None when none is
    boundary_token_merged: bool
    windows: RollingWindows | None
    tokens: tuple[bytes | None, ...] | None  # None where the scorer knows no tokenizer
    token_ids: tuple[int | None, ...]  # None for a token that the answer never told
    char_starts: tuple[int | None, ...] | None
    char_ends: tuple[int | None, ...] | None
    token_logprobs: tuple[float | None, ...]  # None where unscored
    token_nll: tuple[float | None, ...]
    token_ranks: tuple[int | None, ...]
    token_ties: tuple[int | None, ...]
    token_kl_base_masked: tuple[float | None, ...] | None  # KL(base || masked) in nats; None when not asked
    token_kl_masked_base: tuple[float | None, ...] | None
    token_candidates: dict[int, dict[int, float]] | None  # token index -> id -> logprob, best first
    total_logprob: float | None
    mean_logprob: float | None
    perplexity: float | None
    is_greedy: bool | None
    mrr: float | None  # mean of 1 / rank
    rank1_share: float | None
    applied: Applied | None  # the mask and its receipt; None without a mask
    document_starts: tuple[int, ...]  # tokens that the mask leaves unscored
    delta_modules: tuple[str, ...]  # modules that got an adapter's delta
    problem: StoredProblem | None


@dataclass(frozen=True)
class NextEntry:
    """One prompt's next tokens; lists are by probability, descending."""

    item: int
    variant: int
    prompt_tokens: int
    prefix_token_id: int | None
    vocab_size: int
    top_ids: tuple[int, ...]
    top_tokens: tuple[bytes, ...] | None  # None where the scorer knows no tokenizer
    top_logprobs: tuple[float, ...]
    tail: Tail | None  # the mass outside top_ids
    extra_logprobs: dict[int, float]  # of the question's extra_token_ids
    tail_beyond_extra: Tail | None
    applied: Applied | None
    problem: StoredProblem | None


@dataclass(frozen=True)
class ScoreEntry:
    """One item's label scores, in the order of its labels."""

    item: int
    variant: int
    prompt_tokens: int
    label_token_ids: tuple[int, ...]
    scores: tuple[float, ...]
    label_logprobs: tuple[float, ...]
    applied: Applied | None
    problem: StoredProblem | None


@dataclass(frozen=True)
class TokenizedEntry:
    """One input's tokens."""

    item: int
    tokens: tuple[bytes, ...]
    token_ids: tuple[int, ...]
    char_starts: tuple[int, ...] | None  # None when the input was ids
    char_ends: tuple[int, ...] | None
    problem: StoredProblem | None


Entry = ScoredItem | NextEntry | ScoreEntry | TokenizedEntry

QUESTIONS: dict[QuestionKind, type[AskedQuestion]] = {
    QuestionKind.LOGPROB: LogprobQuestion,
    QuestionKind.ROLLING_LOGPROB: RollingQuestion,
    QuestionKind.MASKED_FORWARD: MaskedForwardQuestion,
    QuestionKind.NEXT_TOKEN_DIST: NextTokenQuestion,
    QuestionKind.SCORE: ScoreQuestion,
    QuestionKind.TOKENIZE: TokenizeQuestion,
}
ENTRIES: dict[QuestionKind, type[Entry]] = {
    QuestionKind.LOGPROB: ScoredItem,
    QuestionKind.ROLLING_LOGPROB: ScoredItem,
    QuestionKind.MASKED_FORWARD: ScoredItem,
    QuestionKind.NEXT_TOKEN_DIST: NextEntry,
    QuestionKind.SCORE: ScoreEntry,
    QuestionKind.TOKENIZE: TokenizedEntry,
}


@dataclass(frozen=True)
class LaterIdentity:
    """Of a run that a later minor version wrote: fields count in it that this version left when it read the run."""

    identity: str
    version: str  # of the document that held those fields


@dataclass(frozen=True)
class Run:
    """A stored answer."""

    created: str  # RFC 3339, UTC
    target: str  # what was asked, as written by whoever asked
    question: AskedQuestion
    provenance: ModelProvenance
    entries: tuple[Entry, ...]
    usage: Usage | None  # None for questions that run nothing
    execution: Execution | None
    complete: bool  # False: the answer broke off, and what is here is what had come
    later_identity: LaterIdentity | None = None  # None: what is here says all of the identity

    @property
    def identity(self) -> str:
        """What was asked of what: two runs of one identity should hold the same numbers. Never how it was executed."""
        if self.later_identity is not None:
            return self.later_identity.identity
        return _identity(self.provenance.digest(), question_to_json(self.question))

    @property
    def problems(self) -> tuple[StoredProblem, ...]:
        return tuple(entry.problem for entry in self.entries if entry.problem is not None)


def store_problem(problem: Problem) -> StoredProblem:
    detail = problem.detail
    return StoredProblem(problem.code_name, detail.reason.value, detail.field, detail.message, detail.allowed)


def restore_problem(stored: StoredProblem, item: int | None = None) -> Problem:
    """The exception again; a reason or code of a later version becomes the nearest this one has."""
    kind = next((kind for kind in BY_CODE.values() if kind.code_name == stored.code), Internal)
    reason = Reason(stored.reason) if stored.reason in Reason.__members__ else Reason.BUG
    detail = Detail(reason, stored.message, stored.field, stored.allowed, item)
    return kind(detail.reason, detail.message, field=detail.field, allowed=detail.allowed, item=item)


def write_run(run: Run) -> dict[str, Any]:
    """The run as a JSON object of plain values."""
    question = question_to_json(run.question)
    later = run.later_identity
    return {
        "kind": KIND,
        "score_debug_schema_version": SCHEMA_VERSION,  # whatever version it was read from: only our fields are written
        "created": run.created,
        "target": run.target,
        "question": question,
        "provenance": {**to_json(run.provenance, "provenance"), "digest": run.provenance.digest()},
        "identity": run.identity,
        **({} if later is None else {"identity_version": later.version}),
        _list_name(run.question.kind): to_json(run.entries, _list_name(run.question.kind)),
        "usage": to_json(run.usage, "usage"),
        "execution": to_json(run.execution, "execution"),
        "complete": run.complete,
    }


def run_to_text(run: Run) -> str:
    """One line of ASCII: safe for every terminal, file and pipe."""
    return json.dumps(write_run(run), allow_nan=False, ensure_ascii=True)


def read_run(text: str) -> Run:
    """Read a run document, checked whole. An unknown major version is refused; a later minor may hold more fields."""
    return read_run_object(parse_json(text, "the run"))


def read_run_object(document: object) -> Run:
    """What `read_run` does, for a document that stands inside another one and is parsed already."""
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise malformed("kind", "not that of a run document", f'an object with "kind": "{KIND}"')
    newer = check_version(document.get("score_debug_schema_version"), SCHEMA_VERSION, "the run")
    question = read_question(document.get("question"), newer=newer)
    provenance = _read_provenance(document.get("provenance"), newer)
    name = _list_name(question.kind)
    shell = {key: value for key, value in document.items() if key not in {"kind", "question", "provenance", name}}
    head = from_json(_Head, shell, newer=newer)
    raw_entries = document.get(name)
    if not isinstance(raw_entries, list):
        raise malformed(name, "missing or no list", "a list")
    entries = tuple(
        _check_entry(from_json(ENTRIES[question.kind], raw, f"{name}[{index}]", newer=newer), f"{name}[{index}]")
        for index, raw in enumerate(raw_entries)
    )
    later = _read_identity(head, document)
    run = Run(head.created, head.target, question, provenance, entries, head.usage, head.execution, head.complete)
    return run if later is None or run.identity == head.identity else replace(run, later_identity=later)


def _read_identity(head: _Head, document: dict[str, Any]) -> LaterIdentity | None:
    """The identity of a document, checked by everything that it holds, unless a later version's fields are gone."""
    version = head.identity_version
    if version is not None:
        if not check_version(version, head.score_debug_schema_version, "the run's identity"):
            raise malformed("identity_version", f"{version}, no later version than the run's own", "a later one")
        return LaterIdentity(head.identity, version)
    expected = _identity(document["provenance"]["digest"], document["question"])
    if head.identity != expected:
        message = f"identity is {head.identity:.80}; provenance and question give {expected}: the run was changed"
        raise InvalidArgument(Reason.ARTIFACT_CORRUPT, message, field="identity")
    later = check_version(head.score_debug_schema_version, SCHEMA_VERSION, "the run")
    return LaterIdentity(head.identity, head.score_debug_schema_version) if later else None


@dataclass(frozen=True)
class _Head:
    """The fields of a document beside question, provenance and the list of entries."""

    score_debug_schema_version: str
    created: str
    target: str
    identity: str
    usage: Usage | None
    execution: Execution | None
    complete: bool
    identity_version: str | None = field(default=None, metadata={"later": True})


def check_version(version: object, own: str, what: str) -> bool:
    """Whether a document is of a later minor version than this program writes; another major is refused."""
    match = _VERSION.fullmatch(version) if isinstance(version, str) else None
    if match is None:
        raise malformed("score_debug_schema_version", "missing or no version", 'text like "1.0"')
    major, minor = int(match[1]), int(match[2])
    own_major, own_minor = (int(part) for part in own.split("."))
    if major != own_major:
        message = f"{what} is of version {version}; this program reads {own_major}.x: use one that knows {major}.x"
        allowed = f"{own_major}.x"
        raise InvalidArgument(Reason.SCHEMA_VERSION, message, field="score_debug_schema_version", allowed=allowed)
    return minor > own_minor


def question_to_json(question: AskedQuestion) -> dict[str, Any]:
    """A question with its kind, as every document holds it."""
    return {"kind": question.kind.value, **to_json(question, "question")}


def read_question(raw: object, *, newer: bool = False) -> AskedQuestion:
    """A question that `question_to_json` wrote."""
    if not isinstance(raw, dict):
        raise malformed("question", "missing or no object", "an object")
    known = {kind.value: kind for kind in QUESTIONS}
    name = raw.get("kind")
    kind = known.get(name) if isinstance(name, str) else None
    if kind is None:
        allowed = ", ".join(known)
        message = f"question.kind is {raw.get('kind')!r:.40}; it can be {allowed}"
        raise InvalidArgument(Reason.UNKNOWN_ENUM_VALUE, message, field="question.kind", allowed=allowed)
    _check_inputs(raw, "question")
    body = {key: value for key, value in raw.items() if key != "kind"}
    return from_json(QUESTIONS[kind], body, "question", newer=newer)


def _check_inputs(raw: object, path: str) -> None:
    """Each input is text or ids: checked before an Input is made, which takes it for granted."""
    if isinstance(raw, list):
        for index, entry in enumerate(raw):
            _check_inputs(entry, f"{path}[{index}]")
    elif isinstance(raw, dict):
        if {field.name for field in fields(Input)} <= set(raw) and (raw["text"] is None) == (raw["ids"] is None):
            raise malformed(path, "both text and ids, or neither", "one of them")
        for key, entry in raw.items():
            _check_inputs(entry, f"{path}.{key}")


def _read_provenance(raw: object, newer: bool) -> ModelProvenance:
    if not isinstance(raw, dict) or not isinstance(raw.get("digest"), str):
        raise malformed("provenance", "missing or without its digest", "an object with its digest")
    body = {key: value for key, value in raw.items() if key != "digest"}
    provenance = from_json(ModelProvenance, body, "provenance", newer=newer)
    if not newer and raw["digest"] != provenance.digest():
        message = f"provenance.digest is {raw['digest']:.80}; its fields give {provenance.digest()}: it was changed"
        raise InvalidArgument(Reason.ARTIFACT_CORRUPT, message, field="provenance.digest")
    return provenance


def _check_entry(entry: Entry, path: str) -> Entry:
    """Lists that count the same things are equally long, and what follows from other fields does follow."""
    for names in _PARALLEL[type(entry)]:
        sizes = {name: len(value) for name in names if (value := getattr(entry, name)) is not None}
        if sizes.get("label_logprobs") == 0:  # a scorer may have no logprobs to give
            del sizes["label_logprobs"]
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} has {size}" for name, size in sizes.items())
            raise InvalidArgument(Reason.CONFLICT, f"{path}: {told}; they must be equally long", field=path)
    if isinstance(entry, ScoredItem):
        pairs = zip(entry.token_logprobs, entry.token_nll, strict=True)
        wrong = next((i for i, (p, n) in enumerate(pairs) if (None if p is None else -p) != n), None)
        if wrong is not None:
            message = f"{path}.token_nll[{wrong}] is not -token_logprobs[{wrong}]"
            raise InvalidArgument(Reason.CONFLICT, message, field=f"{path}.token_nll[{wrong}]")
    return entry


_PARALLEL: dict[type[Entry], tuple[tuple[str, ...], ...]] = {
    ScoredItem: (
        (
            "token_ids", "tokens", "char_starts", "char_ends", "token_logprobs", "token_nll", "token_ranks",
            "token_ties", "token_kl_base_masked", "token_kl_masked_base",
        ),
    ),
    NextEntry: (("top_ids", "top_tokens", "top_logprobs"),),
    ScoreEntry: (("scores", "label_logprobs"),),
    TokenizedEntry: (("token_ids", "tokens"), ("char_starts", "char_ends")),
}  # fmt: skip


def _list_name(kind: QuestionKind) -> str:
    return "items" if kind in STREAMED else "results"


def _identity(provenance_digest: str, question: dict[str, Any]) -> str:
    canonical = json.dumps(
        {"provenance": provenance_digest, "question": question},
        sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False,
    )  # fmt: skip
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
