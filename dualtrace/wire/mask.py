"""mask.proto: the mask language, both ways, and what an engine says of a mask it applied.

The objects check themselves when they are made; here only paths are put in front of what they say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from dualtrace.masks import spec as s
from dualtrace.masks.arrays import npy_bytes, read_npy
from dualtrace.problems import InvalidArgument, Problem, Reason
from dualtrace.questions.answers import MaskMetadata, MaskReceipt
from dualtrace.v1 import mask_pb2 as pb
from dualtrace.v1 import token_pb2
from dualtrace.wire.strict import finite

MAX_LEVELS = 32
"""Messages nested deeper than any mask that the language allows; it has a limit of its own below this."""


@contextmanager
def _under(path: str) -> Iterator[None]:
    try:
        yield
    except Problem as problem:
        raise problem.at(under=path) from None


# ---- from the wire


def mask_from_pb(message: pb.Mask, field: str) -> s.MaskSpec:
    with _under(field):
        if not message.HasField("base"):
            raise InvalidArgument(Reason.MISSING, "a mask needs a base; causal for edges alone", field="base")
        with _under("base"):
            base = _expression(message.base, 0)
        empty_row = s.EmptyRow.ERROR
        if message.HasField("empty_row"):
            empty_row = s.EmptyRow[pb.EmptyRow.Name(message.empty_row).removeprefix("EMPTY_ROW_")]
        edges = tuple(_edge(edge, index) for index, edge in enumerate(message.edges))
        return s.MaskSpec(base, edges, empty_row, message.replace_native, message.version)


def _expression(message: pb.MaskExpression, level: int) -> s.Expression:
    if level > MAX_LEVELS:
        raise InvalidArgument(Reason.NESTED_TOO_DEEP, f"expressions nest deeper than {MAX_LEVELS}")
    kind = message.WhichOneof("expression")
    if kind is None:
        raise InvalidArgument(Reason.MISSING, "the expression is not set; name a base or a combination")
    with _under(kind):
        return _EXPRESSIONS[kind](message, level)


def _prefix(message: pb.MaskExpression, _level: int) -> s.Expression:
    given = message.bidirectional_prefix
    match given.WhichOneof("prefix"):
        case "n":
            return s.BidirectionalPrefix(n=given.n)
        case "span":
            return s.BidirectionalPrefix(span=span_from_pb(given.span, "span"))
        case _:
            raise InvalidArgument(Reason.MISSING, "set n or span")


def _documents(message: pb.MaskExpression, _level: int) -> s.Expression:
    given = message.doc_isolation
    match given.WhichOneof("documents"):
        case "boundaries":
            return s.DocIsolation(boundaries=tuple(given.boundaries.starts), reset_positions=given.reset_positions)
        case "segment_ids":
            return s.DocIsolation(segment_ids=tuple(given.segment_ids.ids), reset_positions=given.reset_positions)
        case _:
            raise InvalidArgument(Reason.MISSING, "set boundaries or segment_ids")


def _array(message: pb.MaskExpression, _level: int) -> s.Expression:
    match message.array.WhichOneof("content"):
        case "npy":
            reading = read_npy(message.array.npy)
            return s.Array(content=reading.content, note=reading.note)
        case "artifact_digest":
            return s.Array(artifact_digest=message.array.artifact_digest)
        case _:
            raise InvalidArgument(Reason.MISSING, "set npy or artifact_digest")


def _terms(given: Sequence[pb.MaskExpression], level: int) -> tuple[s.Expression, ...]:
    terms = []
    for index, term in enumerate(given):
        with _under(f"terms[{index}]"):
            terms.append(_expression(term, level + 1))
    return tuple(terms)


def _minus(message: pb.MaskExpression, level: int) -> s.Expression:
    with _under("source"):
        source = _expression(message.minus.source, level + 1)
    with _under("take"):
        take = _expression(message.minus.take, level + 1)
    return s.Minus(source, take)


_EXPRESSIONS: dict[str, Callable[[pb.MaskExpression, int], s.Expression]] = {
    "causal": lambda _message, _level: s.Causal(),
    "full": lambda _message, _level: s.Full(),
    "bidirectional_prefix": _prefix,
    "sliding": lambda message, _level: s.Sliding(message.sliding.keys_back, message.sliding.keys_ahead),
    "chunked": lambda message, _level: s.Chunked(message.chunked.size),
    "doc_isolation": _documents,
    "array": _array,
    "all": lambda message, level: s.All(_terms(message.all.terms, level)),
    "any": lambda message, level: s.AnyOf(_terms(message.any.terms, level)),
    "negated": lambda message, level: s.Not(_expression(message.negated, level + 1)),
    "minus": _minus,
}


def _edge(message: pb.MaskEdge, index: int) -> s.Edge:
    with _under(f"edges[{index}]"):
        for name in ("queries", "keys"):
            if not message.HasField(name):
                raise InvalidArgument(Reason.MISSING, f"{name} is not set", field=name)
        mode = s.CutMode.PRE_SOFTMAX
        if message.HasField("mode"):
            mode = s.CutMode[pb.CutMode.Name(message.mode).removeprefix("CUT_MODE_")]
        return s.Edge(
            queries=span_from_pb(message.queries, "queries"),
            keys=span_from_pb(message.keys, "keys"),
            layers=tuple(message.layers.indices) if message.HasField("layers") else None,
            heads=tuple(message.heads.indices) if message.HasField("heads") else None,
            mode=mode,
        )


def span_from_pb(message: token_pb2.Span, field: str) -> s.Span:
    with _under(field):
        match message.WhichOneof("place"):
            case "tokens":
                return s.TokenRange(message.tokens.start, message.tokens.end)
            case "chars":
                if not message.chars.alignment:
                    text = "a character range needs STRICT or OVERLAP"
                    raise InvalidArgument(Reason.MISSING, text, field="chars.alignment")
                name = token_pb2.Alignment.Name(message.chars.alignment).removeprefix("ALIGNMENT_")
                return s.CharRange(message.chars.start, message.chars.end, s.Alignment[name])
            case "segment":
                return s.Named(segment_from_pb(message.segment))
            case _:
                raise InvalidArgument(Reason.MISSING, "the span names no place; set tokens, chars or segment")


def segment_from_pb(number: token_pb2.SegmentName.ValueType) -> s.SegmentName:
    return s.SegmentName[token_pb2.SegmentName.Name(number).removeprefix("SEGMENT_NAME_")]


# ---- to the wire


def mask_to_pb(mask: s.MaskSpec) -> pb.Mask:
    message = pb.Mask(version=mask.version, base=_expression_to_pb(mask.base), replace_native=mask.replace_native)
    if mask.empty_row is not s.EmptyRow.ERROR:
        message.empty_row = pb.EmptyRow.Value(f"EMPTY_ROW_{mask.empty_row.name}")
    for edge in mask.edges:
        message.edges.append(_edge_to_pb(edge))
    return message


def _expression_to_pb(node: s.Expression) -> pb.MaskExpression:
    match node:
        case s.All():
            return pb.MaskExpression(all=pb.MaskTerms(terms=[_expression_to_pb(term) for term in node.terms]))
        case s.AnyOf():
            return pb.MaskExpression(any=pb.MaskTerms(terms=[_expression_to_pb(term) for term in node.terms]))
        case s.Not():
            return pb.MaskExpression(negated=_expression_to_pb(node.term))
        case s.Minus():
            minus = pb.MinusMask(source=_expression_to_pb(node.source), take=_expression_to_pb(node.take))
            return pb.MaskExpression(minus=minus)
        case _:
            return _leaf_to_pb(node)


def _leaf_to_pb(node: s.Leaf) -> pb.MaskExpression:
    match node:
        case s.Causal():
            return pb.MaskExpression(causal=pb.CausalMask())
        case s.Full():
            return pb.MaskExpression(full=pb.FullMask())
        case s.BidirectionalPrefix():
            if node.span is not None:
                return pb.MaskExpression(bidirectional_prefix=pb.BidirectionalPrefixMask(span=span_to_pb(node.span)))
            return pb.MaskExpression(bidirectional_prefix=pb.BidirectionalPrefixMask(n=node.n or 0))
        case s.Sliding():
            return pb.MaskExpression(sliding=pb.SlidingMask(keys_back=node.keys_back, keys_ahead=node.keys_ahead))
        case s.Chunked():
            return pb.MaskExpression(chunked=pb.ChunkedMask(size=node.size))
        case s.DocIsolation():
            return pb.MaskExpression(doc_isolation=_documents_to_pb(node))
        case s.Array():
            if node.content is not None:
                return pb.MaskExpression(array=pb.ArrayMask(npy=npy_bytes(node.content.values)))
            return pb.MaskExpression(array=pb.ArrayMask(artifact_digest=node.artifact_digest or ""))


def _documents_to_pb(node: s.DocIsolation) -> pb.DocIsolationMask:
    message = pb.DocIsolationMask(reset_positions=node.reset_positions)
    if node.boundaries is not None:
        message.boundaries.CopyFrom(pb.DocumentBoundaries(starts=node.boundaries))
    else:
        message.segment_ids.CopyFrom(pb.DocumentIds(ids=node.segment_ids or ()))
    return message


def _edge_to_pb(edge: s.Edge) -> pb.MaskEdge:
    message = pb.MaskEdge(queries=span_to_pb(edge.queries), keys=span_to_pb(edge.keys))
    if edge.layers is not None:
        message.layers.CopyFrom(pb.IndexList(indices=edge.layers))
    if edge.heads is not None:
        message.heads.CopyFrom(pb.IndexList(indices=edge.heads))
    if edge.mode is not s.CutMode.PRE_SOFTMAX:
        message.mode = pb.CutMode.Value(f"CUT_MODE_{edge.mode.name}")
    return message


def span_to_pb(span: s.Span) -> token_pb2.Span:
    match span:
        case s.TokenRange():
            return token_pb2.Span(tokens=token_pb2.TokenRange(start=span.start, end=span.end))
        case s.CharRange():
            alignment = token_pb2.Alignment.Value(f"ALIGNMENT_{span.alignment.name}")
            return token_pb2.Span(chars=token_pb2.CharRange(start=span.start, end=span.end, alignment=alignment))
        case s.Named():
            return token_pb2.Span(segment=segment_to_pb(span.segment))


def segment_to_pb(segment: s.SegmentName) -> token_pb2.SegmentName.ValueType:
    return token_pb2.SegmentName.Value(f"SEGMENT_NAME_{segment.name}")


# ---- what was applied


def receipt_to_pb(receipt: MaskReceipt) -> pb.MaskReceipt:
    return pb.MaskReceipt(
        effective_mask_digest=receipt.effective_mask_digest,
        layers_hit=receipt.layers_hit,
        layers_applied=receipt.layers_applied,
        heads_hit=[pb.IndexList(indices=heads) for heads in receipt.heads_hit],
        heads_applied=[pb.IndexList(indices=heads) for heads in receipt.heads_applied],
        entries_cut=receipt.entries_cut,
        entries_cut_that_base_allowed=receipt.entries_cut_that_base_allowed,
        rows_emptied=receipt.rows_emptied,
    )


def receipt_from_pb(message: pb.MaskReceipt) -> MaskReceipt:
    return MaskReceipt(
        effective_mask_digest=message.effective_mask_digest,
        layers_hit=tuple(message.layers_hit),
        heads_hit=tuple(tuple(heads.indices) for heads in message.heads_hit),
        layers_applied=tuple(message.layers_applied),
        heads_applied=tuple(tuple(heads.indices) for heads in message.heads_applied),
        entries_cut=message.entries_cut,
        entries_cut_that_base_allowed=message.entries_cut_that_base_allowed,
        rows_emptied=message.rows_emptied,
    )


def metadata_to_pb(metadata: MaskMetadata) -> pb.MaskMetadata:
    return pb.MaskMetadata(
        name=metadata.name, digest=metadata.digest, shape=metadata.shape, sparsity=metadata.sparsity,
        notes=metadata.notes,
    )  # fmt: skip


def metadata_from_pb(message: pb.MaskMetadata) -> MaskMetadata:
    return MaskMetadata(
        message.name, message.digest, message.shape, finite(message.sparsity, "mask.sparsity"), tuple(message.notes)
    )
