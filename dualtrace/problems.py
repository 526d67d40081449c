"""Every way a call can fail: one exception tree, each class with its gRPC code and its machine-readable reasons.

    Problem                      anything that is told to the caller
    ├── InvalidArgument          the request is wrong; sending it again will not help
    ├── Unsupported              the request is right, this scorer cannot do it (see Describe)
    ├── NotFound                 a named thing does not exist
    ├── AlreadyExists            a name or request id is taken by something else
    ├── FailedPrecondition       the thing is in the wrong state (revision, not ready)
    ├── Unauthenticated          no or wrong bearer token
    ├── Exhausted                a queue or a buffer is full; try again later
    ├── DeadlineExceeded         the caller's deadline passed
    ├── Cancelled                the caller left
    ├── Unavailable              the other end cannot be reached or is draining
    ├── BadNumbers               the model gave numbers that must not become a score
    └── Internal                 our fault

It knows no protobuf and no grpc: `code` is the plain number of the status code, `wire/problem.py` translates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar


class Reason(StrEnum):
    """Why, for machines. The proto enum `dualtrace.v1.Reason` has the same names with the prefix `REASON_`."""

    # The shape of the request
    MISSING = "MISSING"  # a field that is needed is absent
    EMPTY = "EMPTY"  # a list or text that must hold something holds nothing
    OUT_OF_RANGE = "OUT_OF_RANGE"  # a number outside its range; `allowed` names the range
    NOT_FINITE = "NOT_FINITE"  # NaN or infinity where a number is needed
    DUPLICATE = "DUPLICATE"  # the same value twice where each may stand once
    CONFLICT = "CONFLICT"  # two fields that exclude each other, or one that needs another
    TOO_MANY = "TOO_MANY"  # more entries than the limit
    UNKNOWN_FIELD = "UNKNOWN_FIELD"  # a field this version does not know
    UNKNOWN_ENUM_VALUE = "UNKNOWN_ENUM_VALUE"  # an enum value this version does not know, or UNSPECIFIED
    MALFORMED = "MALFORMED"  # cannot be parsed (a target, a file, a number)
    # Text and tokens
    INVALID_TEXT = "INVALID_TEXT"  # text that is not valid Unicode
    TOKEN_OUT_OF_RANGE = "TOKEN_OUT_OF_RANGE"  # noqa: S105 - an id below 0 or at or above the logit width
    INPUT_TOO_LONG = "INPUT_TOO_LONG"  # more tokens than the model has positions
    EMPTY_PROMPT = "EMPTY_PROMPT"  # a prompt of zero tokens where one is read
    EMPTY_COMPLETION = "EMPTY_COMPLETION"  # nothing to score
    MIXED_INPUT_KINDS = "MIXED_INPUT_KINDS"  # text here and ids there
    BOUNDARY_STRADDLED = "BOUNDARY_STRADDLED"  # STRICT, and a token crosses the boundary
    UNALIGNABLE = "UNALIGNABLE"  # a span that does not fall on token boundaries
    NO_PREFIX_TOKEN = "NO_PREFIX_TOKEN"  # noqa: S105 - BOS or EOS asked, the tokenizer has none
    NO_TOKENIZER = "NO_TOKENIZER"  # text for a scorer that knows ids only
    # Masks and views
    UNSUPPORTED_MASK = "UNSUPPORTED_MASK"
    UNSUPPORTED_VIEW = "UNSUPPORTED_VIEW"
    MASK_NEEDS_ONE_WINDOW = "MASK_NEEDS_ONE_WINDOW"
    MASK_TOO_LARGE = "MASK_TOO_LARGE"
    EMPTY_ROW = "EMPTY_ROW"  # a row that may see nothing
    LEAK = "LEAK"  # a row that is read sees the token it predicts
    LEAK_UNKNOWN = "LEAK_UNKNOWN"  # whether it leaks cannot be computed cheaply at this size
    NESTED_TOO_DEEP = "NESTED_TOO_DEEP"
    MASK_NOT_APPLIED = "MASK_NOT_APPLIED"  # the receipt differs from the oracle
    ADAPTER_UNSUPPORTED = "ADAPTER_UNSUPPORTED"
    ADAPTER_MISMATCH = "ADAPTER_MISMATCH"
    ARTIFACT_CORRUPT = "ARTIFACT_CORRUPT"  # the bytes do not have the digest they were announced with
    # Models and files
    MODEL_INVALID = "MODEL_INVALID"  # a checkpoint that cannot be loaded as it stands
    MODEL_UNSUPPORTED = "MODEL_UNSUPPORTED"  # a family or a config value that is not implemented
    NON_FINITE_LOGITS = "NON_FINITE_LOGITS"
    SCHEMA_VERSION = "SCHEMA_VERSION"  # a file of an unknown major version
    # States and ends
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    REVISION_CONFLICT = "REVISION_CONFLICT"
    NOT_IMPLEMENTED = "NOT_IMPLEMENTED"
    NOT_READY = "NOT_READY"
    DRAINING = "DRAINING"
    QUEUE_FULL = "QUEUE_FULL"
    SLOW_READER = "SLOW_READER"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    DEADLINE = "DEADLINE"
    CANCELLED = "CANCELLED"
    UNREACHABLE = "UNREACHABLE"
    INCOMPLETE_STREAM = "INCOMPLETE_STREAM"  # it ended without a Summary
    BAD_TOKEN = "BAD_TOKEN"  # noqa: S105 - the bearer token is absent or wrong
    ENGINE_FAILED = "ENGINE_FAILED"
    BUG = "BUG"
    # What is kept
    STORAGE_FULL = "STORAGE_FULL"  # no room is left where things are kept
    STORAGE_BUSY = "STORAGE_BUSY"  # somebody else holds the store
    STORAGE_UNUSABLE = "STORAGE_UNUSABLE"  # read-only, damaged or not a store


@dataclass(frozen=True)
class Detail:
    """What a Problem says beside its code: the very fields of `dualtrace.v1.Problem`."""

    reason: Reason
    message: str  # what was asked, what is allowed, what to do
    field: str = ""  # path in the request, "items[3].completion"; empty when no field is to blame
    allowed: str = ""  # the allowed range or values, "0-49151"; empty when there is none
    item: int | None = None  # index of the item that failed; None when the whole call did


class Problem(Exception):  # noqa: N818 - the word of the wire and of the glossary
    """A failure that is told to the caller. Raise a subclass."""

    code: ClassVar[int] = 2  # gRPC status code number
    code_name: ClassVar[str] = "UNKNOWN"

    def __init__(
        self, reason: Reason, message: str, *, field: str = "", allowed: str = "", item: int | None = None
    ) -> None:
        super().__init__(message)
        self.detail = Detail(reason, message, field, allowed, item)

    @property
    def reason(self) -> Reason:
        return self.detail.reason

    def at(self, *, item: int | None = None, under: str = "") -> Problem:
        """The same problem, placed: its item index set, its field path put below `under`."""
        detail = self.detail
        field = f"{under}.{detail.field}" if under and detail.field else under or detail.field
        placed = type(self).__new__(type(self))
        Exception.__init__(placed, detail.message)
        placed.detail = replace(detail, field=field, item=detail.item if item is None else item)
        return placed

    def __str__(self) -> str:
        detail = self.detail
        where = f" ({detail.field})" if detail.field else ""
        allowed = f" Allowed: {detail.allowed}." if detail.allowed and detail.allowed not in detail.message else ""
        return f"{detail.reason}{where}: {detail.message}{allowed}"


class InvalidArgument(Problem):
    code, code_name = 3, "INVALID_ARGUMENT"


class DeadlineExceeded(Problem):
    code, code_name = 4, "DEADLINE_EXCEEDED"


class NotFound(Problem):
    code, code_name = 5, "NOT_FOUND"


class AlreadyExists(Problem):
    code, code_name = 6, "ALREADY_EXISTS"


class Exhausted(Problem):
    code, code_name = 8, "RESOURCE_EXHAUSTED"


class FailedPrecondition(Problem):
    code, code_name = 9, "FAILED_PRECONDITION"


class Cancelled(Problem):
    code, code_name = 1, "CANCELLED"


class Unsupported(Problem):
    code, code_name = 12, "UNIMPLEMENTED"


class Internal(Problem):
    code, code_name = 13, "INTERNAL"


class Unavailable(Problem):
    code, code_name = 14, "UNAVAILABLE"


class BadNumbers(Problem):
    """The model's own numbers are unusable (DATA_LOSS: the answer is lost, the caller did nothing wrong)."""

    code, code_name = 15, "DATA_LOSS"


class Unauthenticated(Problem):
    code, code_name = 16, "UNAUTHENTICATED"


BY_CODE: dict[int, type[Problem]] = {
    kind.code: kind
    for kind in (
        Cancelled, InvalidArgument, DeadlineExceeded, NotFound, AlreadyExists, Exhausted, FailedPrecondition,
        Unsupported, Internal, Unavailable, BadNumbers, Unauthenticated,
    )
}  # fmt: skip


def rebuild(code: int, detail: Detail) -> Problem:
    """The exception for a code and a detail that came over the wire or from a file."""
    kind = BY_CODE.get(code, Internal)
    return kind(detail.reason, detail.message, field=detail.field, allowed=detail.allowed, item=detail.item)
