"""A mask as immutable objects. Every syntax error is raised when one is made: a MaskSpec that exists is well formed.

It knows the words of the language and their bounds. It must not know the sequence a mask will be used on: lengths,
layers, heads, named segments and characters are looked up by `resolve`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from dualtrace.masks.arrays import BoolArray
from dualtrace.masks.limits import INDEX_MAX, MAX_DEPTH, MAX_EDGES, MAX_LENGTH, MAX_NODES, VERSION
from dualtrace.problems import InvalidArgument, Reason


class Alignment(StrEnum):
    STRICT = "STRICT"  # a token that straddles the edge of a character range is refused
    OVERLAP = "OVERLAP"  # it is included, and a note says so


class SegmentName(StrEnum):
    QUERY = "query"
    ITEM = "item"
    PROMPT = "prompt"
    COMPLETION = "completion"


class CutMode(StrEnum):
    PRE_SOFTMAX = "PRE_SOFTMAX"
    POST_SOFTMAX_ZERO = "POST_SOFTMAX_ZERO"


class EmptyRow(StrEnum):
    ERROR = "ERROR"
    ZERO = "ZERO"
    SELF = "SELF"


def require_index(value: object, field_name: str, low: int, high: int = INDEX_MAX) -> None:
    if type(value) is not int:
        raise InvalidArgument(
            Reason.MALFORMED,
            f"{field_name} must be an integer, got {type(value).__name__}",
            field=field_name,
            allowed=f"{low}-{high}",
        )
    if not low <= value <= high:
        shown = str(value) if abs(value) < 10**20 else "an integer of more than 20 digits"
        raise InvalidArgument(
            Reason.OUT_OF_RANGE, f"{field_name} is {shown}", field=field_name, allowed=f"{low}-{high}"
        )


def require_bool(value: object, field_name: str) -> None:
    if type(value) is not bool:
        raise InvalidArgument(
            Reason.MALFORMED, f"{field_name} must be true or false, got {type(value).__name__}", field=field_name
        )


def require_kind(value: object, kinds: type | tuple[type, ...], field_name: str, wanted: str) -> None:
    if not isinstance(value, kinds):
        raise InvalidArgument(
            Reason.MALFORMED, f"{field_name} must be {wanted}, got {type(value).__name__}", field=field_name
        )


def require_ascending(values: object, field_name: str, low: int, *, may_be_empty: bool) -> None:
    """A tuple of integers, each above the one before."""
    require_kind(values, tuple, field_name, "a tuple of integers")
    assert isinstance(values, tuple)
    if not values and not may_be_empty:
        raise InvalidArgument(Reason.EMPTY, f"{field_name} is empty; leave it out to mean all", field=field_name)
    if len(values) > MAX_LENGTH:
        raise InvalidArgument(
            Reason.TOO_MANY, f"{field_name} has {len(values)} entries", field=field_name, allowed=f"up to {MAX_LENGTH}"
        )
    for i, value in enumerate(values):
        require_index(value, f"{field_name}[{i}]", low)
        if i and value <= values[i - 1]:
            reason = Reason.DUPLICATE if value == values[i - 1] else Reason.MALFORMED
            raise InvalidArgument(
                reason,
                f"{field_name} must ascend without duplicates: {value} follows {values[i - 1]}",
                field=f"{field_name}[{i}]",
            )


def _require_range(start: object, end: object) -> None:
    require_index(start, "start", 0)
    require_index(end, "end", 0)
    assert isinstance(start, int)
    assert isinstance(end, int)
    if start > end:
        raise InvalidArgument(Reason.OUT_OF_RANGE, f"the span starts at {start} and ends at {end}", field="end")
    if start == end:
        raise InvalidArgument(Reason.EMPTY, f"the span {start}-{end} is empty; its end is exclusive", field="end")


@dataclass(frozen=True)
class TokenRange:
    """Tokens start .. end-1, counted without the sequence's own prefix token."""

    start: int
    end: int

    def __post_init__(self) -> None:
        _require_range(self.start, self.end)


@dataclass(frozen=True)
class CharRange:
    """Characters start .. end-1 of the text, in Unicode code points."""

    start: int
    end: int
    alignment: Alignment

    def __post_init__(self) -> None:
        _require_range(self.start, self.end)
        require_kind(self.alignment, Alignment, "alignment", "STRICT or OVERLAP")


@dataclass(frozen=True)
class Named:
    """A named segment of the request."""

    segment: SegmentName

    def __post_init__(self) -> None:
        require_kind(self.segment, SegmentName, "segment", "a segment name")


Span = TokenRange | CharRange | Named
_SPAN = (TokenRange, CharRange, Named)


@dataclass(frozen=True)
class Causal:
    """k <= q."""


@dataclass(frozen=True)
class Full:
    """Every row sees every key."""


@dataclass(frozen=True)
class BidirectionalPrefix:
    """k <= q, or k among the first n tokens; a span means all tokens before its end."""

    n: int | None = None
    span: Span | None = None

    def __post_init__(self) -> None:
        _require_one("n", self.n, "span", self.span)
        if self.n is not None:
            require_index(self.n, "n", 0)
        else:
            require_kind(self.span, _SPAN, "span", "a span")


@dataclass(frozen=True)
class Sliding:
    """q - keys_back < k <= q + keys_ahead: keys_back counts the query itself."""

    keys_back: int
    keys_ahead: int = 0

    def __post_init__(self) -> None:
        require_index(self.keys_back, "keys_back", 1)
        require_index(self.keys_ahead, "keys_ahead", 0)


@dataclass(frozen=True)
class Chunked:
    """k <= q and the same chunk of `size` tokens."""

    size: int

    def __post_init__(self) -> None:
        require_index(self.size, "size", 1)


@dataclass(frozen=True)
class DocIsolation:
    """k <= q and the same document."""

    boundaries: tuple[int, ...] | None = None  # first token of each document after the first
    segment_ids: tuple[int, ...] | None = None  # one per token; equal ids are one document
    reset_positions: bool = False

    def __post_init__(self) -> None:
        _require_one("boundaries", self.boundaries, "segment_ids", self.segment_ids)
        require_bool(self.reset_positions, "reset_positions")
        if self.boundaries is not None:
            require_ascending(self.boundaries, "boundaries", 1, may_be_empty=True)
        else:
            _require_document_ids(self.segment_ids)


def _require_document_ids(ids: object) -> None:
    require_kind(ids, tuple, "segment_ids", "a tuple of integers")
    assert isinstance(ids, tuple)
    if not 1 <= len(ids) <= MAX_LENGTH:
        reason = Reason.TOO_MANY if ids else Reason.EMPTY
        raise InvalidArgument(
            reason, f"segment_ids has {len(ids)} entries", field="segment_ids", allowed=f"1-{MAX_LENGTH}"
        )
    for i, value in enumerate(ids):
        require_index(value, f"segment_ids[{i}]", 0)


def _require_one(first: str, a: object, second: str, b: object) -> None:
    if a is None and b is None:
        raise InvalidArgument(Reason.MISSING, f"set {first} or {second}", allowed=f"exactly one of {first}, {second}")
    if a is not None and b is not None:
        raise InvalidArgument(Reason.CONFLICT, f"{first} and {second} exclude each other", field=second)


@dataclass(frozen=True)
class Array:
    """A boolean matrix, [Q,K], [H,Q,K] or [L,H,Q,K], True = may see; its content, or a stored NPY file's digest."""

    content: BoolArray | None = None
    artifact_digest: str | None = None
    note: str = field(default="", compare=False)  # how the content was converted; no part of the mask's identity

    def __post_init__(self) -> None:
        _require_one("content", self.content, "artifact_digest", self.artifact_digest)
        if self.content is not None:
            require_kind(self.content, BoolArray, "content", "a BoolArray")
        else:
            _require_digest(self.artifact_digest)


def _require_digest(digest: object) -> None:
    head, _, tail = digest.partition(":") if isinstance(digest, str) else ("", "", "")
    if head != "sha256" or len(tail) != 64 or set(tail) - set("0123456789abcdef"):
        raise InvalidArgument(
            Reason.MALFORMED,
            "artifact_digest is not a digest",
            field="artifact_digest",
            allowed='"sha256:" and 64 lower-case hexadecimal digits',
        )


@dataclass(frozen=True)
class All:
    """Every term allows."""

    terms: tuple[Expression, ...]
    depth: int = field(init=False, compare=False, repr=False)
    nodes: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        _require_terms(self.terms)
        _measure(self, self.terms)


@dataclass(frozen=True)
class AnyOf:
    """At least one term allows."""

    terms: tuple[Expression, ...]
    depth: int = field(init=False, compare=False, repr=False)
    nodes: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        _require_terms(self.terms)
        _measure(self, self.terms)


@dataclass(frozen=True)
class Not:
    """The term does not allow. Mind the future: not(causal) allows exactly the keys after the row."""

    term: Expression
    depth: int = field(init=False, compare=False, repr=False)
    nodes: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        require_kind(self.term, _EXPRESSION, "not", "an expression")
        _measure(self, (self.term,))


@dataclass(frozen=True)
class Minus:
    """The first allows and the second does not."""

    source: Expression  # "from" in JSON
    take: Expression
    depth: int = field(init=False, compare=False, repr=False)
    nodes: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        require_kind(self.source, _EXPRESSION, "from", "an expression")
        require_kind(self.take, _EXPRESSION, "take", "an expression")
        _measure(self, (self.source, self.take))


Leaf = Causal | Full | BidirectionalPrefix | Sliding | Chunked | DocIsolation | Array
Expression = Leaf | All | AnyOf | Not | Minus
_COMBINATOR = (All, AnyOf, Not, Minus)
_EXPRESSION = (Causal, Full, BidirectionalPrefix, Sliding, Chunked, DocIsolation, Array, *_COMBINATOR)


def _require_terms(terms: object) -> None:
    require_kind(terms, tuple, "terms", "a tuple of expressions")
    assert isinstance(terms, tuple)
    if not terms:
        raise InvalidArgument(Reason.EMPTY, "a combinator needs at least one term", field="terms")
    for i, term in enumerate(terms):
        require_kind(term, _EXPRESSION, f"terms[{i}]", "an expression")


def _measure(node: All | AnyOf | Not | Minus, terms: tuple[Expression, ...]) -> None:
    """Depth and size are known at construction, so nothing that walks an expression can be driven too deep."""
    depth = 1 + max(term.depth if isinstance(term, _COMBINATOR) else 1 for term in terms)
    nodes = 1 + sum(term.nodes if isinstance(term, _COMBINATOR) else 1 for term in terms)
    if depth > MAX_DEPTH:
        raise InvalidArgument(Reason.NESTED_TOO_DEEP, "expressions are nested too deep", allowed=f"{MAX_DEPTH} levels")
    if nodes > MAX_NODES:
        raise InvalidArgument(Reason.TOO_MANY, f"the mask has {nodes} expressions", allowed=f"up to {MAX_NODES}")
    object.__setattr__(node, "depth", depth)
    object.__setattr__(node, "nodes", nodes)


@dataclass(frozen=True)
class Edge:
    """One cut: the rows of `queries` no longer see the keys of `keys`, at these layers and query heads (None = all)."""

    queries: Span
    keys: Span
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    mode: CutMode = CutMode.PRE_SOFTMAX

    def __post_init__(self) -> None:
        require_kind(self.queries, _SPAN, "queries", "a span")
        require_kind(self.keys, _SPAN, "keys", "a span")
        require_kind(self.mode, CutMode, "mode", "PRE_SOFTMAX or POST_SOFTMAX_ZERO")
        for name, indices in (("layers", self.layers), ("heads", self.heads)):
            if indices is not None:
                require_ascending(indices, name, 0, may_be_empty=False)


@dataclass(frozen=True)
class MaskSpec:
    """A whole mask. Order of application: base, edges, the model's own windows, empty_row."""

    base: Expression = field(default_factory=Causal)
    edges: tuple[Edge, ...] = ()
    empty_row: EmptyRow = EmptyRow.ERROR
    replace_native: bool = False
    version: int = VERSION

    def __post_init__(self) -> None:
        if type(self.version) is not int or self.version != VERSION:
            raise InvalidArgument(
                Reason.SCHEMA_VERSION, "this mask version is not known", field="version", allowed=str(VERSION)
            )
        require_kind(self.base, _EXPRESSION, "base", "an expression")
        require_kind(self.edges, tuple, "edges", "a tuple of edges")
        if len(self.edges) > MAX_EDGES:
            raise InvalidArgument(
                Reason.TOO_MANY, f"the mask has {len(self.edges)} edges", field="edges", allowed=f"up to {MAX_EDGES}"
            )
        for i, edge in enumerate(self.edges):
            require_kind(edge, Edge, f"edges[{i}]", "an edge")
        require_kind(self.empty_row, EmptyRow, "empty_row", "ERROR, ZERO or SELF")
        require_bool(self.replace_native, "replace_native")

    @property
    def name(self) -> str:
        """A word for people: the base's name when the base is the whole mask, else "custom"."""
        if self.edges or isinstance(self.base, _COMBINATOR):
            return "custom"
        return LEAF_NAMES[type(self.base)]


LEAF_NAMES: dict[type, str] = {
    Causal: "causal",
    Full: "full",
    BidirectionalPrefix: "bidirectional_prefix",
    Sliding: "sliding",
    Chunked: "chunked",
    DocIsolation: "doc_isolation",
    Array: "array",
}
