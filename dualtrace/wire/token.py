"""token.proto: inputs, tokens, boundary and prefix policies."""

from __future__ import annotations

import numpy as np

from dualtrace.arrays import IntArray
from dualtrace.problems import InvalidArgument, Reason
from dualtrace.questions.asked import Input
from dualtrace.tokens import Boundary, Prefix, PrefixKind, Tokens
from dualtrace.v1 import token_pb2 as pb


def ids_to_pb(ids: IntArray) -> pb.TokenIds:
    return pb.TokenIds(ids=ids.tolist())


def ids_from_pb(message: pb.TokenIds) -> IntArray:
    return np.array(message.ids, dtype=np.int32)


def input_to_pb(given: Input) -> pb.Input:
    if given.ids is not None:
        return pb.Input(ids=ids_to_pb(given.ids))
    assert given.text is not None
    return pb.Input(text=given.text)


def input_from_pb(message: pb.Input, field: str) -> Input:
    kind = message.WhichOneof("content")
    if kind is None:
        text = 'neither text nor ids are set; an empty input is text "" or an empty id list'
        raise InvalidArgument(Reason.MISSING, text, field=field)
    return Input(text=message.text) if kind == "text" else Input(ids=ids_from_pb(message.ids))


def tokens_to_pb(tokens: Tokens) -> pb.Tokens:
    message = pb.Tokens(ids=tokens.ids.tolist(), pieces=tokens.pieces)
    if tokens.starts is not None and tokens.ends is not None:
        message.char_starts.extend(tokens.starts.tolist())
        message.char_ends.extend(tokens.ends.tolist())
    return message


def tokens_from_pb(message: pb.Tokens) -> Tokens:
    ids = np.array(message.ids, dtype=np.int32)
    # No tokens have no offsets either way; a token has them or not.
    has_offsets = bool(message.char_starts)
    starts = np.array(message.char_starts, dtype=np.int32) if has_offsets else None
    ends = np.array(message.char_ends, dtype=np.int32) if has_offsets else None
    return Tokens(ids, tuple(message.pieces), starts, ends)


def boundary_to_pb(boundary: Boundary) -> pb.BoundaryPolicy.ValueType:
    return pb.BoundaryPolicy.Value(f"BOUNDARY_POLICY_{boundary.name}")


def boundary_from_pb(number: pb.BoundaryPolicy.ValueType) -> Boundary:
    return Boundary[pb.BoundaryPolicy.Name(number).removeprefix("BOUNDARY_POLICY_")]


def prefix_to_pb(prefix: Prefix) -> pb.PrefixPolicy | None:
    if prefix.kind is not None:
        return pb.PrefixPolicy(kind=pb.PrefixKind.Value(f"PREFIX_KIND_{prefix.kind.name}"))
    return None if prefix.token_id is None else pb.PrefixPolicy(token_id=prefix.token_id)


def prefix_from_pb(message: pb.PrefixPolicy | None) -> Prefix:
    """`None` is the default policy."""
    if message is None:
        return Prefix()
    match message.WhichOneof("policy"):
        case "kind":
            return Prefix(kind=PrefixKind[pb.PrefixKind.Name(message.kind).removeprefix("PREFIX_KIND_")])
        case "token_id":
            return Prefix(token_id=message.token_id)
        case _:
            text = "a prefix policy needs a kind or a token id; leave it out for the default"
            raise InvalidArgument(Reason.MISSING, text, field="prefix")
