"""A mask meets a sequence: spans become token ranges, names and digests become what they name, indices are checked.

It knows lengths, character offsets, named segments, layers and heads. It must not know how a mask is evaluated: the
compiler and the naive oracle both start from what stands here.

Tokens are counted without the sequence's own prefix token (a BOS put in front), rows with it: row = token + prefix.
A prefix row belongs to the first document and the first chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dualtrace.arrays import IntArray
from dualtrace.masks import spec as s
from dualtrace.masks.arrays import BoolArray
from dualtrace.masks.limits import MAX_LENGTH
from dualtrace.model_card import ModelCard
from dualtrace.problems import InvalidArgument, NotFound, Problem, Reason

Longs = npt.NDArray[np.int64]

FetchArray = Callable[[str], BoolArray]
"""Artifact digest to array; raises NotFound."""


@dataclass(frozen=True)
class Geometry:
    """What a mask must know of a model."""

    layers: int
    heads: int  # query heads
    windows: tuple[int | None, ...] = ()  # native window per layer in positions, None = full; () = all full

    def __post_init__(self) -> None:
        assert self.layers >= 1
        assert self.heads >= 1
        assert len(self.windows) in (0, self.layers)

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None


def geometry_of(card: ModelCard) -> Geometry:
    return Geometry(card.layers, card.query_heads, card.windows)


@dataclass(frozen=True, eq=False)
class MaskContext:
    """The sequence a mask is used on."""

    length: int  # rows the model runs, prefix included
    geometry: Geometry
    prefix: int = 0  # rows in front that token indices do not count
    starts: IntArray | None = None  # [length - prefix] first character of each token; None when the input was ids
    ends: IntArray | None = None  # [length - prefix] character after the last one
    characters: int | None = None  # length of the text; None when the input was ids
    segments: Mapping[s.SegmentName, tuple[int, int]] = field(default_factory=dict)  # token ranges, end exclusive
    positions: IntArray | None = None  # [length]; None counts from 0

    def __post_init__(self) -> None:
        if not 1 <= self.length <= MAX_LENGTH:
            raise InvalidArgument(
                Reason.EMPTY if self.length < 1 else Reason.MASK_TOO_LARGE,
                f"the masked sequence has {self.length} rows",
                allowed=f"1-{MAX_LENGTH}",
            )
        assert 0 <= self.prefix <= self.length
        assert (self.starts is None) == (self.ends is None)
        assert self.starts is None or self.ends is None or self.starts.size == self.ends.size == self.tokens
        assert self.positions is None or self.positions.shape == (self.length,)

    @property
    def tokens(self) -> int:
        return self.length - self.prefix


@dataclass(frozen=True)
class Cut:
    """An edge on this sequence: rows [q0, q1) no longer see keys [k0, k1)."""

    q0: int
    q1: int
    k0: int
    k1: int
    layers: tuple[int, ...] | None
    heads: tuple[int, ...] | None
    mode: s.CutMode

    def hits(self, layer: int, head: int) -> bool:
        return (self.layers is None or layer in self.layers) and (self.heads is None or head in self.heads)


@dataclass(frozen=True, eq=False)
class ResolvedMask:
    spec: s.MaskSpec
    context: MaskContext
    base: s.Expression  # no spans left but token ranges, every array with its content
    cuts: tuple[Cut, ...]  # one per edge, in order
    positions: Longs  # [length] what the native windows and the model's position encoding use
    resets_positions: bool
    notes: tuple[str, ...]  # what a careful caller wants to be told


def resolve(spec: s.MaskSpec, context: MaskContext, fetch: FetchArray | None = None) -> ResolvedMask:
    resolver = _Resolver(context, fetch)
    base = resolver.expression(spec.base, "base", in_force=True)
    cuts = tuple(resolver.cut(edge, f"edges[{i}]") for i, edge in enumerate(spec.edges))
    positions = _given_positions(context) if resolver.reset is None else resolver.reset
    return ResolvedMask(
        spec, context, base, cuts, positions, resolver.reset is not None, tuple(dict.fromkeys(resolver.notes))
    )


def span_tokens(span: s.Span, context: MaskContext, path: str) -> tuple[int, int]:
    """The token range of a span that stands outside a mask, checked in the same way."""
    return _Resolver(context, None).span(span, path)


def _given_positions(context: MaskContext) -> Longs:
    """[length] the positions of the sequence before any mask resets them."""
    if context.positions is not None:
        return context.positions.astype(np.int64)
    return np.arange(context.length, dtype=np.int64)


class _Resolver:
    def __init__(self, context: MaskContext, fetch: FetchArray | None) -> None:
        self.context = context
        self.fetch = fetch
        self.notes: list[str] = []
        self.reset: Longs | None = None

    def expression(self, node: s.Expression, path: str, *, in_force: bool) -> s.Expression:
        """`in_force` is lost below `not` and `take`: what stands there forbids instead of allowing."""
        match node:
            case s.All(terms):
                return s.All(self._terms(terms, f"{path}.all", in_force))
            case s.AnyOf(terms):
                return s.AnyOf(self._terms(terms, f"{path}.any", in_force))
            case s.Not(term):
                return s.Not(self.expression(term, f"{path}.not", in_force=False))
            case s.Minus(source, take):
                return s.Minus(
                    self.expression(source, f"{path}.minus.from", in_force=in_force),
                    self.expression(take, f"{path}.minus.take", in_force=False),
                )
            case s.BidirectionalPrefix():
                return self._prefix(node, f"{path}.bidirectional_prefix")
            case s.DocIsolation():
                return self._documents(node, f"{path}.doc_isolation", in_force)
            case s.Array():
                return self._array(node, f"{path}.array")
            case _:
                return node

    def _terms(self, terms: tuple[s.Expression, ...], path: str, in_force: bool) -> tuple[s.Expression, ...]:
        return tuple(self.expression(term, f"{path}[{i}]", in_force=in_force) for i, term in enumerate(terms))

    def _prefix(self, node: s.BidirectionalPrefix, path: str) -> s.Expression:
        if node.span is not None:
            return s.BidirectionalPrefix(n=self.span(node.span, f"{path}.span")[1])
        assert node.n is not None
        self._require_at_most(node.n, self.context.tokens, f"{path}.n", "a prefix")
        return node

    def _documents(self, node: s.DocIsolation, path: str, in_force: bool) -> s.Expression:
        tokens = self.context.tokens
        if node.boundaries:
            self._require_at_most(node.boundaries[-1], tokens - 1, f"{path}.boundaries", "a document's first token")
        if node.segment_ids is not None and len(node.segment_ids) != tokens:
            raise InvalidArgument(
                Reason.OUT_OF_RANGE,
                f"{len(node.segment_ids)} segment ids for {tokens} tokens",
                field=f"{path}.segment_ids",
                allowed=f"{tokens} ids",
            )
        if node.reset_positions:
            self._reset(node, path, in_force)
        return node

    def _reset(self, node: s.DocIsolation, path: str, in_force: bool) -> None:
        field_path = f"{path}.reset_positions"
        if not in_force:
            raise InvalidArgument(
                Reason.CONFLICT, "positions cannot be reset by documents that stand under not or take", field=field_path
            )
        given = self.context.positions
        if given is not None and not np.array_equal(given, np.arange(self.context.length)):
            raise InvalidArgument(
                Reason.CONFLICT, "the request sets positions and the mask resets them; keep one", field=field_path
            )
        positions = positions_in_documents(document_of_rows(node, self.context))
        if self.reset is not None and not np.array_equal(self.reset, positions):
            raise InvalidArgument(
                Reason.CONFLICT, "two doc_isolation bases reset positions to different values", field=field_path
            )
        self.reset = positions

    def _array(self, node: s.Array, path: str) -> s.Expression:
        content = node.content
        if content is None:
            assert node.artifact_digest is not None
            if self.fetch is None:
                raise NotFound(
                    Reason.NOT_FOUND,
                    f"the array {node.artifact_digest} is not stored here; send it by PutArtifact first",
                    field=f"{path}.artifact_digest",
                )
            content = self.fetch(node.artifact_digest)
        self._require_array_shape(content.shape, path)
        if node.note:
            self.notes.append(f"{path}: {node.note}")
        return s.Array(content)

    def _require_array_shape(self, shape: tuple[int, ...], path: str) -> None:
        geometry, rows = self.context.geometry, self.context.length
        wanted = (geometry.layers, geometry.heads, rows, rows)[-len(shape) :]
        if shape != wanted:
            prefix = f", {self.context.prefix} of them prefix tokens" if self.context.prefix else ""
            raise InvalidArgument(
                Reason.OUT_OF_RANGE,
                f"the array has the shape {list(shape)}; the model has {geometry.layers} layers and {geometry.heads} "
                f"query heads and runs {rows} rows{prefix}",
                field=path,
                allowed=str(list(wanted)),
            )

    def cut(self, edge: s.Edge, path: str) -> Cut:
        geometry, shift = self.context.geometry, self.context.prefix
        for name, indices, extent in (("layers", edge.layers, geometry.layers), ("heads", edge.heads, geometry.heads)):
            for i, index in enumerate(indices or ()):
                if index >= extent:
                    kind = "layer" if name == "layers" else "query head"
                    raise InvalidArgument(
                        Reason.OUT_OF_RANGE,
                        f"{kind} {index} asked; the model has {extent} (0-{extent - 1})",
                        field=f"{path}.{name}[{i}]",
                        allowed=f"0-{extent - 1}",
                    )
        q0, q1 = self.span(edge.queries, f"{path}.queries")
        k0, k1 = self.span(edge.keys, f"{path}.keys")
        return Cut(q0 + shift, q1 + shift, k0 + shift, k1 + shift, edge.layers, edge.heads, edge.mode)

    def span(self, span: s.Span, path: str) -> tuple[int, int]:
        """Token range of a span, never empty."""
        match span:
            case s.TokenRange(start, end):
                self._require_at_most(end, self.context.tokens, f"{path}.tokens", "a token range's end")
                return start, end
            case s.Named(segment):
                return self._segment(segment, path)
            case s.CharRange():
                return self._characters(span, f"{path}.chars")

    def _segment(self, segment: s.SegmentName, path: str) -> tuple[int, int]:
        segments = self.context.segments
        if segment not in segments:
            raise InvalidArgument(
                Reason.MISSING,
                f"this request has no segment {segment.value!r}",
                field=f"{path}.segment",
                allowed=", ".join(sorted(name.value for name in segments)) or "no named segments",
            )
        start, end = segments[segment]
        assert 0 <= start <= end <= self.context.tokens
        if start == end:
            raise InvalidArgument(
                Reason.EMPTY, f"the segment {segment.value!r} holds no token", field=f"{path}.segment"
            )
        return start, end

    def _characters(self, span: s.CharRange, path: str) -> tuple[int, int]:
        starts, ends = self.context.starts, self.context.ends
        if starts is None or ends is None:
            raise InvalidArgument(Reason.CONFLICT, "a character range needs a text; ids have no characters", field=path)
        try:
            text_end = int(ends.max(initial=0)) if self.context.characters is None else self.context.characters
            range_ = tokens_of_characters(span, starts, ends, text_end)
        except Problem as problem:
            raise problem.at(under=path) from None
        straddling = [t for t in (range_[0], range_[1] - 1) if starts[t] < span.start or ends[t] > span.end]
        if straddling:
            named = " and ".join(str(t) for t in dict.fromkeys(straddling))
            self.notes.append(
                f"{path}: characters {span.start}-{span.end} include all of token {named}, which straddles"
            )
        return range_

    def _require_at_most(self, value: int, high: int, path: str, what: str) -> None:
        if value > high:
            raise InvalidArgument(
                Reason.OUT_OF_RANGE,
                f"{what} is {value}; the sequence has {self.context.tokens} tokens",
                field=path,
                allowed=f"up to {high}",
            )


def tokens_of_characters(span: s.CharRange, starts: IntArray, ends: IntArray, characters: int) -> tuple[int, int]:
    """Every token that overlaps the range, end exclusive. A token without characters overlaps nothing."""
    if span.end > characters:
        raise InvalidArgument(
            Reason.OUT_OF_RANGE,
            f"the range ends at {span.end}; the text has {characters} characters",
            allowed=f"0-{characters}",
        )
    overlapping = np.flatnonzero((starts < span.end) & (ends > span.start) & (starts < ends))
    if not overlapping.size:
        raise InvalidArgument(Reason.UNALIGNABLE, f"no token overlaps characters {span.start}-{span.end}")
    if span.alignment is s.Alignment.STRICT:
        outside = overlapping[(starts[overlapping] < span.start) | (ends[overlapping] > span.end)]
        if outside.size:
            token = int(outside[0])
            raise InvalidArgument(
                Reason.UNALIGNABLE,
                f"token {token} covers characters {starts[token]}-{ends[token]} and straddles the edge of "
                f"{span.start}-{span.end}; move the edge, or use OVERLAP",
            )
    return int(overlapping[0]), int(overlapping[-1]) + 1


def document_of_rows(node: s.DocIsolation, context: MaskContext) -> Longs:
    """[length] a number per row, equal within a document; prefix rows belong to the first one."""
    if node.segment_ids is not None:
        ids = np.asarray(node.segment_ids, np.int64)
    else:
        ids = np.searchsorted(np.asarray(node.boundaries, np.int64), np.arange(context.tokens), side="right")
    first = ids[:1] if ids.size else np.zeros(1, np.int64)
    return np.concatenate((np.repeat(first, context.prefix), ids)).astype(np.int64)


def positions_in_documents(documents: Longs) -> Longs:
    """[T] how many earlier rows are in the same document."""
    order = np.argsort(documents, kind="stable")
    grouped = documents[order]
    group_starts = np.searchsorted(grouped, grouped, side="left")
    positions = np.empty(documents.size, np.int64)
    positions[order] = np.arange(documents.size) - group_starts
    return positions


def document_starts(base: s.Expression, context: MaskContext) -> tuple[int, ...]:
    """Tokens that would be read from another document's row, under a doc_isolation that is in force."""
    match base:
        case s.All(terms) | s.AnyOf(terms):
            return tuple(sorted({t for term in terms for t in document_starts(term, context)}))
        case s.Minus(source, _):
            return document_starts(source, context)
        case s.DocIsolation():
            documents = document_of_rows(base, context)[context.prefix :]
            return tuple((np.flatnonzero(np.diff(documents)) + 1).tolist())
        case _:
            return ()
