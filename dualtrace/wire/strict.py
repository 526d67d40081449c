"""Refuse what this version does not understand: unknown fields and enum values, at any depth of a request.

An older server that ignored a new mask option would answer with wrong numbers. Responses are not checked: there,
what is unknown is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from dualtrace.problems import Internal, InvalidArgument, Reason

MAX_DEPTH = 64
MAX_ENTRIES = 16_384
"""Messages in one repeated field: above every limit of the service, and few enough to be looked through at once."""


class Undecodable:
    """What stands in for a request whose bytes are no message, until it can be refused properly."""

    def __init__(self, error: DecodeError) -> None:
        self.error = error


def decode_leniently(decode: Callable[[bytes], Message]) -> Callable[[bytes], Message | Undecodable]:
    """gRPC answers a failing decoder with UNKNOWN; decoded like this, the request is refused by `refuse_unknown`."""

    def decoder(data: bytes) -> Message | Undecodable:
        try:
            return decode(data)
        except DecodeError as error:
            return Undecodable(error)

    return decoder


def refuse_unknown(message: Message | Undecodable, path: str = "", depth: int = 0) -> None:
    """Raise for the first unknown field or enum value in the message or below."""
    if isinstance(message, Undecodable):
        raise InvalidArgument(Reason.MALFORMED, f"the request is not a protobuf message: {message.error}")
    if depth > MAX_DEPTH:
        raise InvalidArgument(Reason.NESTED_TOO_DEEP, f"messages nest deeper than {MAX_DEPTH}", field=path)
    unknown = UnknownFieldSet(message)
    if len(unknown):
        number = unknown[0].field_number
        name = message.DESCRIPTOR.name
        where = f"{path}.<{number}>" if path else f"<{number}>"
        text = f"field number {number} of {name} is not known to this version; it may be newer than this server"
        raise InvalidArgument(Reason.UNKNOWN_FIELD, text, field=where)
    for field, value in message.ListFields():
        below = f"{path}.{field.name}" if path else field.name
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for place, child in _children(value, field, below):
                refuse_unknown(child, place, depth + 1)
        elif field.type == FieldDescriptor.TYPE_ENUM:
            _refuse_unknown_enum(value, field, below)


def _children(value: object, field: FieldDescriptor, path: str) -> Iterable[tuple[str, Message]]:
    if not field.is_repeated:
        assert isinstance(value, Message)
        return [(path, value)]
    count = len(value)  # type: ignore[arg-type]
    if count > MAX_ENTRIES:
        text = f"{count} entries of {field.name} asked; at most {MAX_ENTRIES} are looked at; split the request"
        raise InvalidArgument(Reason.TOO_MANY, text, field=path, allowed=f"0-{MAX_ENTRIES}")
    return [(f"{path}[{index}]", child) for index, child in enumerate(value)]  # type: ignore[arg-type, var-annotated]


def _refuse_unknown_enum(value: object, field: FieldDescriptor, path: str) -> None:
    numbers = [value] if not field.is_repeated else list(value)  # type: ignore[call-overload]
    kind = field.enum_type
    assert kind is not None
    for number in numbers:
        # 0 is UNSPECIFIED in every enum of this package: sent on purpose it has no meaning.
        if number == 0 or number not in kind.values_by_number:
            allowed = ", ".join(entry.name for entry in kind.values if entry.number)
            text = f"{kind.name} value {number} asked; leave the field out for the default"
            raise InvalidArgument(Reason.UNKNOWN_ENUM_VALUE, text, field=path, allowed=allowed)


def finite(value: float, field: str) -> float:
    """A number beside the scores of an answer. One that is none would make the whole report unwritable."""
    if not math.isfinite(value):
        raise Internal(Reason.INCOMPLETE_STREAM, f"the answer is broken: {field} is {value}", field=field)
    return value
