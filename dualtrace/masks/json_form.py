"""The canonical JSON twin of a mask, and its digest.

    {"version": 1, "base": {"sliding": {"keys_back": 64}},
     "edges": [{"queries": {"segment": "completion"}, "keys": {"tokens": [3, 9]}, "layers": [0, 1]}],
     "empty_row": "ERROR", "replace_native": false}

It knows JSON and the objects of `spec`. It must not know sequences or models. The digest is taken from the parsed
object, so key order, spacing and left-out defaults do not change it, and other twins (protobuf) share it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from enum import StrEnum
from typing import NoReturn, TypeVar, cast

from dualtrace.masks import spec as s
from dualtrace.masks.arrays import npy_bytes, read_json_matrix, read_npy
from dualtrace.masks.limits import DEFAULT_LIMITS, MAX_DEPTH, MAX_EDGES, MAX_NODES, VERSION, ArrayLimits
from dualtrace.problems import InvalidArgument, Problem, Reason

Object = dict[str, object]
Word = TypeVar("Word", bound=StrEnum)


def parse_json(source: str | bytes | Object, limits: ArrayLimits = DEFAULT_LIMITS) -> s.MaskSpec:
    """A mask from JSON text or from an object that was read from JSON."""
    value = _load(source, limits) if isinstance(source, str | bytes) else source
    fields = _fields(value, {"version", "base", "edges", "empty_row", "replace_native"}, {"base"})
    edges = []
    for i, edge in enumerate(_list(fields.get("edges", []), "edges")):
        if i == MAX_EDGES:
            raise InvalidArgument(
                Reason.TOO_MANY, "the mask has too many edges", field="edges", allowed=f"up to {MAX_EDGES}"
            )
        with _under(f"edges[{i}]"):
            edges.append(_edge(edge))
    with _under("base"):
        base = _expression(fields["base"], limits, MAX_DEPTH)
    return s.MaskSpec(
        base=base,
        edges=tuple(edges),
        empty_row=_word(s.EmptyRow, fields.get("empty_row", "ERROR"), "empty_row"),
        replace_native=cast(bool, fields.get("replace_native", False)),
        version=cast(int, fields.get("version", VERSION)),
    )


def to_json(mask: s.MaskSpec) -> str:
    """Canonical JSON: sorted keys, no spaces, defaults written out, arrays as NPY in base64."""
    return _canonical(_object(mask, _inline_array))


def digest(mask: s.MaskSpec) -> str:
    """SHA-256 over the canonical JSON in which array content stands by its own digest and shape."""
    return "sha256:" + hashlib.sha256(_canonical(_object(mask, _digested_array)).encode()).hexdigest()


def _canonical(value: Object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


# ---- reading


def _load(text: str | bytes, limits: ArrayLimits) -> object:
    if len(text) > limits.json_bytes:
        raise InvalidArgument(
            Reason.MASK_TOO_LARGE, f"the JSON mask has {len(text)} bytes", allowed=f"up to {limits.json_bytes}"
        )
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_int=_bounded_int)
    except RecursionError:
        raise InvalidArgument(Reason.NESTED_TOO_DEEP, "the JSON is nested too deep to be read") from None
    except UnicodeDecodeError as error:
        raise InvalidArgument(Reason.INVALID_TEXT, f"the JSON mask is not valid Unicode: {error.reason}") from None
    except ValueError as error:
        raise InvalidArgument(Reason.MALFORMED, f"the mask is not valid JSON: {error}") from None


def _shown(text: str) -> str:
    """A stranger's word, short and plain enough to stand in a message."""
    return text[:64].encode("ascii", "backslashreplace").decode("ascii")


def _no_duplicates(pairs: list[tuple[str, object]]) -> Object:
    found: Object = {}
    for key, value in pairs:
        if key in found:
            raise InvalidArgument(Reason.DUPLICATE, f"the key {_shown(key)} stands twice in one JSON object")
        found[key] = value
    return found


def _no_constant(word: str) -> NoReturn:
    raise InvalidArgument(Reason.NOT_FINITE, f"{word} is not a number that JSON knows")


def _bounded_int(digits: str) -> int:
    if len(digits) > 20:
        raise InvalidArgument(Reason.OUT_OF_RANGE, f"an integer of {len(digits)} digits", allowed="int32")
    return int(digits)


@contextmanager
def _under(path: str) -> Iterator[None]:
    """Every problem raised inside is placed below `path`."""
    try:
        yield
    except Problem as problem:
        raise problem.at(under=path) from None


def _fields(value: object, known: set[str], needed: Set[str] = frozenset()) -> Object:
    if not isinstance(value, dict):
        raise InvalidArgument(Reason.MALFORMED, f"a JSON object is wanted here, got {type(value).__name__}")
    for key in value:
        if key not in known:
            shown = _shown(str(key))
            raise InvalidArgument(
                Reason.UNKNOWN_FIELD,
                f"{shown} is not known here",
                field=shown,
                allowed=", ".join(sorted(known)) or "nothing",
            )
    for key in sorted(needed - set(value)):
        raise InvalidArgument(Reason.MISSING, f"{key} is missing", field=key)
    return value


def _list(value: object, name: str) -> list[object]:
    if not isinstance(value, list):
        raise InvalidArgument(Reason.MALFORMED, f"{name} must be a list, got {type(value).__name__}", field=name)
    return value


def _word(words: type[Word], value: object, name: str) -> Word:
    known = [word.value for word in words]
    if not isinstance(value, str) or value not in known:
        shown = _shown(value) if isinstance(value, str) else type(value).__name__
        raise InvalidArgument(Reason.UNKNOWN_ENUM_VALUE, f"{name} is {shown}", field=name, allowed=", ".join(known))
    return words(value)


def _only_key(value: object, known: set[str], what: str) -> str:
    fields = _fields(value, known)
    if len(fields) != 1:
        reason = Reason.CONFLICT if fields else Reason.MISSING
        raise InvalidArgument(
            reason, f"{what} needs exactly one key, got {len(fields)}", allowed=", ".join(sorted(known))
        )
    return next(iter(fields))


def _expression(value: object, limits: ArrayLimits, levels: int) -> s.Expression:
    if levels == 0:
        raise InvalidArgument(Reason.NESTED_TOO_DEEP, "expressions are nested too deep", allowed=f"{MAX_DEPTH} levels")
    kind = _only_key(value, {*_LEAVES, "array", "all", "any", "not", "minus"}, "an expression")
    content = cast(Object, value)[kind]
    if kind in ("all", "any"):
        terms = []
        for i, term in enumerate(_list(content, kind)):
            if i == MAX_NODES:
                raise InvalidArgument(Reason.TOO_MANY, f"{kind} has too many terms", allowed=f"up to {MAX_NODES}")
            with _under(f"{kind}[{i}]"):
                terms.append(_expression(term, limits, levels - 1))
        with _under(kind):
            return s.All(tuple(terms)) if kind == "all" else s.AnyOf(tuple(terms))
    with _under(kind):
        if kind == "not":
            return s.Not(_expression(content, limits, levels - 1))
        if kind == "minus":
            fields = _fields(content, {"from", "take"}, {"from", "take"})
            with _under("from"):
                source = _expression(fields["from"], limits, levels - 1)
            with _under("take"):
                take = _expression(fields["take"], limits, levels - 1)
            return s.Minus(source, take)
        return _array(content, limits) if kind == "array" else _LEAVES[kind](content)


def _bidirectional_prefix(value: object) -> s.BidirectionalPrefix:
    fields = _fields(value, {"n", "span"})
    if fields.get("n", 0) is None:
        raise InvalidArgument(Reason.MALFORMED, "n must be an integer, got null", field="n")
    span = None
    if "span" in fields:
        with _under("span"):
            span = _span(fields["span"])
    return s.BidirectionalPrefix(cast("int | None", fields.get("n")), span)


def _sliding(value: object) -> s.Sliding:
    fields = _fields(value, {"keys_back", "keys_ahead"}, {"keys_back"})
    return s.Sliding(cast(int, fields["keys_back"]), cast(int, fields.get("keys_ahead", 0)))


def _chunked(value: object) -> s.Chunked:
    return s.Chunked(cast(int, _fields(value, {"size"}, {"size"})["size"]))


def _doc_isolation(value: object) -> s.DocIsolation:
    fields = _fields(value, {"boundaries", "segment_ids", "reset_positions"})
    found = {name: _indices(fields, name) for name in ("boundaries", "segment_ids")}
    return s.DocIsolation(
        boundaries=found["boundaries"],
        segment_ids=found["segment_ids"],
        reset_positions=cast(bool, fields.get("reset_positions", False)),
    )


def _indices(fields: Object, name: str) -> tuple[int, ...] | None:
    return cast("tuple[int, ...]", tuple(_list(fields[name], name))) if name in fields else None


def _causal(value: object) -> s.Causal:
    _fields(value, set())
    return s.Causal()


def _full(value: object) -> s.Full:
    _fields(value, set())
    return s.Full()


_LEAVES: dict[str, Callable[[object], s.Expression]] = {
    "causal": _causal,
    "full": _full,
    "bidirectional_prefix": _bidirectional_prefix,
    "sliding": _sliding,
    "chunked": _chunked,
    "doc_isolation": _doc_isolation,
}


def _array(value: object, limits: ArrayLimits) -> s.Array:
    kind = _only_key(value, {"npy", "matrix", "artifact_digest"}, "an array")
    content = cast(Object, value)[kind]
    if kind == "artifact_digest":
        if not isinstance(content, str):
            raise InvalidArgument(Reason.MALFORMED, "artifact_digest must be a string", field=kind)
        return s.Array(artifact_digest=content)
    with _under(kind):
        reading = read_json_matrix(content, limits) if kind == "matrix" else read_npy(_base64(content, limits), limits)
    return s.Array(reading.content, note=reading.note)


def _base64(value: object, limits: ArrayLimits) -> bytes:
    if not isinstance(value, str):
        raise InvalidArgument(Reason.MALFORMED, f"an NPY file in base64 is wanted, got {type(value).__name__}")
    if len(value) > 4 * (limits.inline_bytes // 3 + 1):
        raise InvalidArgument(
            Reason.MASK_TOO_LARGE,
            "the array is too large to stand in the mask; store it with PutArtifact and name its digest",
            allowed=f"up to {limits.inline_bytes} bytes",
        )
    try:
        return base64.b64decode(value.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise InvalidArgument(Reason.MALFORMED, "the NPY file is not valid base64") from None


def _span(value: object) -> s.Span:
    fields = _fields(value, {"tokens", "chars", "segment", "alignment"})
    kind = _only_key({k: v for k, v in fields.items() if k != "alignment"}, {"tokens", "chars", "segment"}, "a span")
    if kind != "chars" and "alignment" in fields:
        raise InvalidArgument(Reason.CONFLICT, "alignment goes with chars only", field="alignment")
    if kind == "segment":
        return s.Named(_word(s.SegmentName, fields["segment"], "segment"))
    ends = _list(fields[kind], kind)
    if len(ends) != 2:
        raise InvalidArgument(Reason.MALFORMED, f"{kind} must be [start, end]", field=kind)
    start, end = cast("tuple[int, int]", tuple(ends))
    if kind == "chars" and "alignment" not in fields:
        raise InvalidArgument(Reason.MISSING, "chars need an alignment", field="alignment", allowed="STRICT, OVERLAP")
    with _under(kind):
        if kind == "tokens":
            return s.TokenRange(start, end)
        return s.CharRange(start, end, _word(s.Alignment, fields["alignment"], "alignment"))


def _edge(value: object) -> s.Edge:
    fields = _fields(value, {"queries", "keys", "layers", "heads", "mode"}, {"queries", "keys"})
    with _under("queries"):
        queries = _span(fields["queries"])
    with _under("keys"):
        keys = _span(fields["keys"])
    mode = _word(s.CutMode, fields.get("mode", "PRE_SOFTMAX"), "mode")
    return s.Edge(queries, keys, _indices(fields, "layers"), _indices(fields, "heads"), mode)


# ---- writing

ArrayWriter = Callable[[s.Array], Object]


def _object(mask: s.MaskSpec, write_array: ArrayWriter) -> Object:
    return {
        "version": mask.version,
        "base": _write_expression(mask.base, write_array),
        "edges": [_write_edge(edge) for edge in mask.edges],
        "empty_row": mask.empty_row.value,
        "replace_native": mask.replace_native,
    }


def _inline_array(array: s.Array) -> Object:
    if array.content is None:
        return {"artifact_digest": array.artifact_digest}
    return {"npy": base64.b64encode(npy_bytes(array.content.values)).decode("ascii")}


def _digested_array(array: s.Array) -> Object:
    if array.content is None:
        return {"artifact_digest": array.artifact_digest}
    return {"content_digest": array.content.digest, "shape": list(array.content.shape)}


def _write_expression(node: s.Expression, write_array: ArrayWriter) -> Object:
    match node:
        case s.All(terms):
            return {"all": [_write_expression(term, write_array) for term in terms]}
        case s.AnyOf(terms):
            return {"any": [_write_expression(term, write_array) for term in terms]}
        case s.Not(term):
            return {"not": _write_expression(term, write_array)}
        case s.Minus(source, take):
            return {
                "minus": {"from": _write_expression(source, write_array), "take": _write_expression(take, write_array)}
            }
        case s.Array():
            return {"array": write_array(node)}
        case _:
            return {s.LEAF_NAMES[type(node)]: _write_leaf(node)}


def _write_leaf(node: s.Leaf) -> Object:
    match node:
        case s.BidirectionalPrefix(n, None):
            return {"n": n}
        case s.BidirectionalPrefix(_, span) if span is not None:
            return {"span": _write_span(span)}
        case s.Sliding(keys_back, keys_ahead):
            return {"keys_back": keys_back, "keys_ahead": keys_ahead}
        case s.Chunked(size):
            return {"size": size}
        case s.DocIsolation(boundaries, segment_ids, reset_positions):
            documents: Object = (
                {"boundaries": list(boundaries)} if boundaries is not None else {"segment_ids": list(segment_ids or ())}
            )
            return {**documents, "reset_positions": reset_positions}
        case _:
            return {}


def _write_span(span: s.Span) -> Object:
    match span:
        case s.TokenRange(start, end):
            return {"tokens": [start, end]}
        case s.CharRange(start, end, alignment):
            return {"chars": [start, end], "alignment": alignment.value}
        case s.Named(segment):
            return {"segment": segment.value}


def _write_edge(edge: s.Edge) -> Object:
    written: Object = {
        "queries": _write_span(edge.queries),
        "keys": _write_span(edge.keys),
        "mode": edge.mode.value,
    }
    for name, indices in (("layers", edge.layers), ("heads", edge.heads)):
        if indices is not None:
            written[name] = list(indices)
    return written
