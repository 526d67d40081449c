"""Problems on the wire: in events, and in the status details of a failed call."""

from __future__ import annotations

from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from dualtrace import problems
from dualtrace.v1 import problem_pb2 as pb

DOMAIN = "dualtrace"


def to_pb(problem: problems.Problem) -> pb.Problem:
    detail = problem.detail
    message = pb.Problem(
        code=problem.code,
        reason=pb.Reason.Value(f"REASON_{detail.reason.value}"),
        field=detail.field,
        message=detail.message,
        allowed=detail.allowed,
    )
    if detail.item is not None:
        message.item = detail.item
    return message


def from_pb(message: pb.Problem) -> problems.Problem:
    item = message.item if message.HasField("item") else None
    detail = problems.Detail(_reason(message.reason), message.message, message.field, message.allowed, item)
    return problems.rebuild(message.code, detail)


def _reason(number: int) -> problems.Reason:
    """The reason by number; one that a newer server made up becomes BUG, its message still says what it is."""
    names = pb.Reason.DESCRIPTOR.values_by_number
    name = names[number].name.removeprefix("REASON_") if number in names else ""
    return problems.Reason(name) if name in problems.Reason.__members__ else problems.Reason.BUG


def to_status(problem: problems.Problem) -> status_pb2.Status:
    """A rich status: our Problem first, then the same for clients that only know google.rpc."""
    detail = problem.detail
    status = status_pb2.Status(code=problem.code, message=str(problem))
    info = error_details_pb2.ErrorInfo(reason=detail.reason.value, domain=DOMAIN)
    if detail.allowed:
        info.metadata["allowed"] = detail.allowed
    parts = [to_pb(problem), info]
    if detail.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=detail.field, description=detail.message)
        parts.append(error_details_pb2.BadRequest(field_violations=[violation]))
    for part in parts:
        packed = any_pb2.Any()
        packed.Pack(part)
        status.details.append(packed)
    return status


def from_status(status: status_pb2.Status) -> problems.Problem | None:
    """The Problem inside a rich status, or None when it carries none (another server, a proxy)."""
    for packed in status.details:
        if packed.Is(pb.Problem.DESCRIPTOR):
            message = pb.Problem()
            packed.Unpack(message)
            return from_pb(message)
    return None
