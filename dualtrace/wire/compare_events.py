"""compare.proto, what a comparison tells: its events, its report in parts, and how it ended; both ways."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dualtrace.compare.events import (
    CompareEvent,
    CompareHeader,
    FirstDivergence,
    IdMismatch,
    ProvenanceDifference,
    SideFailed,
    TokenPairs,
)
from dualtrace.compare.pass_rule import TokenStatus
from dualtrace.compare.report import Verdict
from dualtrace.compare.sides import SideName
from dualtrace.problems import Internal, Reason
from dualtrace.v1 import compare_pb2 as pb
from dualtrace.wire import problem as problem_wire
from dualtrace.wire.compare import tolerance_from_pb, tolerance_to_pb
from dualtrace.wire.model import provenance_from_pb, provenance_to_pb

PAIR_TOKENS = 4096
"""Tokens in one message: a wider chunk of pairs is cut, so that no message comes near gRPC's limit of 4 MiB."""

REPORT_PART_BYTES = 1 << 20


@dataclass(frozen=True)
class CompareDone:
    """The last event: how a comparison ended, and the digest that its report must have."""

    schema_version: str
    verdict: Verdict
    reasons: tuple[str, ...]
    comparison_id: str  # "" when it was not kept
    report_digest: str


Told = CompareEvent | bytes | CompareDone
"""What one CompareResponse tells; bytes are a part of the report's document."""


def told_to_pb(told: Told, sequence: int) -> pb.CompareResponse:
    match told:
        case TokenPairs():
            return pb.CompareResponse(sequence=sequence, pairs=_pairs_to_pb(told))
        case CompareHeader():
            return pb.CompareResponse(sequence=sequence, header=_header_to_pb(told))
        case FirstDivergence():
            place = pb.Divergence(
                item=told.item,
                index=told.index,
                left_logprob=told.left_logprob,
                right_logprob=told.right_logprob,
            )
            return pb.CompareResponse(sequence=sequence, first_divergence=place)
        case IdMismatch():
            return pb.CompareResponse(sequence=sequence, first_id_mismatch=_id_mismatch_to_pb(told))
        case SideFailed():
            failed = pb.SideProblem(left=told.side is SideName.LEFT, problem=problem_wire.to_pb(told.problem))
            return pb.CompareResponse(sequence=sequence, side_problem=failed)
        case bytes():
            return pb.CompareResponse(sequence=sequence, report_part=pb.ReportPart(json=told))
        case CompareDone():
            return pb.CompareResponse(sequence=sequence, done=_done_to_pb(told))


def told_from_pb(message: pb.CompareResponse) -> Told | None:
    """None for an event that only a newer server knows."""
    match message.WhichOneof("event"):
        case "pairs":
            return _pairs_from_pb(message.pairs)
        case "header":
            return _header_from_pb(message.header)
        case "first_divergence":
            place = message.first_divergence
            left = place.left_logprob if place.HasField("left_logprob") else None
            right = place.right_logprob if place.HasField("right_logprob") else None
            return FirstDivergence(place.item, place.index, left, right)
        case "first_id_mismatch":
            return _id_mismatch_from_pb(message.first_id_mismatch)
        case "side_problem":
            side = SideName.LEFT if message.side_problem.left else SideName.RIGHT
            return SideFailed(side, problem_wire.from_pb(message.side_problem.problem))
        case "report_part":
            return message.report_part.json
        case "done":
            return _done_from_pb(message.done)
        case _:
            return None


def cut_report(text: str) -> Iterator[bytes]:
    """The document's bytes in parts; an empty one has one empty part."""
    return cut_bytes(text.encode("utf-8"))


def cut_bytes(data: bytes, part_bytes: int = REPORT_PART_BYTES) -> Iterator[bytes]:
    for start in range(0, max(len(data), 1), part_bytes):
        yield data[start : start + part_bytes]


def cut_pairs(pairs: TokenPairs, most: int = PAIR_TOKENS) -> Iterator[TokenPairs]:
    """The same pairs in chunks of at most so many tokens."""
    count = len(pairs.token_ids)
    if count <= most:
        yield pairs
        return
    for start in range(0, count, most):
        part = slice(start, start + most)
        yield TokenPairs(
            item=pairs.item,
            first_index=pairs.first_index + start,
            token_ids=pairs.token_ids[part],
            pieces=None if pairs.pieces is None else pairs.pieces[part],
            statuses=pairs.statuses[part],
            left_logprobs=pairs.left_logprobs[part],
            right_logprobs=pairs.right_logprobs[part],
            left_ranks=pairs.left_ranks[part],
            right_ranks=pairs.right_ranks[part],
        )


def _header_to_pb(header: CompareHeader) -> pb.CompareHeader:
    return pb.CompareHeader(
        left=provenance_to_pb(header.left),
        right=provenance_to_pb(header.right),
        tolerance=tolerance_to_pb(header.tolerance),
        differences=[pb.ProvenanceDifference(field=d.field, left=d.left, right=d.right) for d in header.differences],
    )


def _header_from_pb(message: pb.CompareHeader) -> CompareHeader:
    return CompareHeader(
        provenance_from_pb(message.left),
        provenance_from_pb(message.right),
        tuple(ProvenanceDifference(d.field, d.left, d.right) for d in message.differences),
        tolerance_from_pb(message.tolerance),
    )


def _pairs_to_pb(pairs: TokenPairs) -> pb.TokenPairs:
    return pb.TokenPairs(
        item=pairs.item,
        first_index=pairs.first_index,
        statuses=[_STATUS_NUMBERS[status] for status in pairs.statuses],
        left_logprobs=[0.0 if value is None else value for value in pairs.left_logprobs],
        right_logprobs=[0.0 if value is None else value for value in pairs.right_logprobs],
        left_ranks=[rank or 0 for rank in pairs.left_ranks],
        right_ranks=[rank or 0 for rank in pairs.right_ranks],
        token_ids=pairs.token_ids,
        pieces=pairs.pieces or (),
        left_absent=[index for index, value in enumerate(pairs.left_logprobs) if value is None],
        right_absent=[index for index, value in enumerate(pairs.right_logprobs) if value is None],
    )


def _pairs_from_pb(message: pb.TokenPairs) -> TokenPairs:
    columns = (
        message.left_logprobs,
        message.right_logprobs,
        message.left_ranks,
        message.right_ranks,
        message.token_ids,
    )
    count = len(message.statuses)
    if any(len(column) != count for column in columns) or len(message.pieces) not in {0, count}:
        text = f"token pairs of item {message.item} came with columns of different lengths"
        raise Internal(Reason.MALFORMED, text, field="pairs")
    left_absent, right_absent = set(message.left_absent), set(message.right_absent)
    return TokenPairs(
        item=message.item,
        first_index=message.first_index,
        token_ids=tuple(message.token_ids),
        pieces=tuple(message.pieces) or None,
        statuses=tuple(_status_from_pb(number) for number in message.statuses),
        left_logprobs=tuple(None if i in left_absent else v for i, v in enumerate(message.left_logprobs)),
        right_logprobs=tuple(None if i in right_absent else v for i, v in enumerate(message.right_logprobs)),
        left_ranks=tuple(rank or None for rank in message.left_ranks),
        right_ranks=tuple(rank or None for rank in message.right_ranks),
    )


_STATUS_NUMBERS = {status: pb.TokenStatus.Value(f"TOKEN_STATUS_{status}") for status in TokenStatus}
_STATUSES = {number: status for status, number in _STATUS_NUMBERS.items()}


def _status_from_pb(number: pb.TokenStatus.ValueType) -> TokenStatus:
    if number not in _STATUSES:
        text = f"the coordinator sent token status {number}, which this version does not know; update it"
        raise Internal(Reason.UNKNOWN_ENUM_VALUE, text, field="pairs.statuses")
    return _STATUSES[number]


def _id_mismatch_to_pb(told: IdMismatch) -> pb.IdDivergence:
    return pb.IdDivergence(
        item=told.item,
        index=told.index,
        left_id=told.left_id,
        right_id=told.right_id,
        left_piece=told.left_piece,
        right_piece=told.right_piece,
    )


def _id_mismatch_from_pb(message: pb.IdDivergence) -> IdMismatch:
    return IdMismatch(
        item=message.item,
        index=message.index,
        left_id=message.left_id if message.HasField("left_id") else None,
        right_id=message.right_id if message.HasField("right_id") else None,
        left_piece=message.left_piece if message.HasField("left_piece") else None,
        right_piece=message.right_piece if message.HasField("right_piece") else None,
    )


def _done_to_pb(done: CompareDone) -> pb.CompareDone:
    return pb.CompareDone(
        score_debug_schema_version=done.schema_version,
        verdict=verdict_to_pb(done.verdict),
        reasons=done.reasons,
        comparison_id=done.comparison_id,
        report_digest=done.report_digest,
    )


def _done_from_pb(message: pb.CompareDone) -> CompareDone:
    return CompareDone(
        message.score_debug_schema_version,
        verdict_from_pb(message.verdict),
        tuple(message.reasons),
        message.comparison_id,
        message.report_digest,
    )


def verdict_to_pb(verdict: Verdict) -> pb.Verdict.ValueType:
    return pb.Verdict.Value(f"VERDICT_{verdict}")


def verdict_from_pb(number: pb.Verdict.ValueType) -> Verdict:
    known = {pb.Verdict.Value(f"VERDICT_{verdict}"): verdict for verdict in Verdict}
    if number not in known:
        text = f"the other end sent verdict {number}, which this version does not know; update it"
        raise Internal(Reason.UNKNOWN_ENUM_VALUE, text, field="verdict")
    return known[number]
