"""What this version does not understand is refused by its path, at any depth; what it does is left alone."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from dualtrace.problems import InvalidArgument, Reason
from dualtrace.v1 import mask_pb2, token_pb2, view_pb2
from dualtrace.v1 import scoring_pb2 as pb
from dualtrace.wire.strict import MAX_DEPTH, MAX_ENTRIES, refuse_unknown

FUTURE = b"\xfa\x3e\x01\x00"  # field 1007, one byte
REQUESTS: list[Any] = [getattr(pb, name) for name in dir(pb) if name.endswith("Request")]


def with_future(message: Message) -> Any:
    """The same message with a field that only a newer version knows."""
    return type(message).FromString(message.SerializeToString() + FUTURE)


def refused(message: Message) -> tuple[Reason, str]:
    with pytest.raises(InvalidArgument) as caught:
        refuse_unknown(message)
    return caught.value.reason, caught.value.detail.field


TEXT = token_pb2.Input(text="x")
NESTED = [
    (pb.TokenizeRequest(inputs=[TEXT, with_future(TEXT)]), "inputs[1].<1007>"),
    (pb.LogprobRequest(items=[pb.LogprobItem(prompt=with_future(TEXT))]), "items[0].prompt.<1007>"),
    (pb.RollingLogprobRequest(prefix=with_future(token_pb2.PrefixPolicy())), "prefix.<1007>"),
    (pb.NextTokenDistRequest(execution=with_future(pb.ExecutionOptions())), "execution.<1007>"),
    (pb.ScoreRequest(variants=[pb.Variant(view=with_future(view_pb2.View()))]), "variants[0].view.<1007>"),
    (pb.ScoreRequest(query=token_pb2.Input(ids=with_future(token_pb2.TokenIds(ids=[1])))), "query.ids.<1007>"),
    (
        pb.ScoreRequest(item_label_token_ids=pb.LabelLists(lists=[with_future(token_pb2.TokenIds())])),
        "item_label_token_ids.lists[0].<1007>",
    ),
]


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.DESCRIPTOR.name)
def test_an_unknown_field_of_any_request_is_refused_by_its_number(kind: Any) -> None:
    assert refused(with_future(kind())) == (Reason.UNKNOWN_FIELD, "<1007>")


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.DESCRIPTOR.name)
def test_an_empty_request_is_understood(kind: Any) -> None:
    refuse_unknown(kind())


@pytest.mark.parametrize(("message", "path"), NESTED, ids=[path for _, path in NESTED])
def test_an_unknown_field_below_is_refused_by_its_path(message: Message, path: str) -> None:
    assert refused(message) == (Reason.UNKNOWN_FIELD, path)


def messages_below(kind: Any, seen: frozenset[str] = frozenset()) -> list[list[FieldDescriptor]]:
    """Paths of message fields from a request down to every kind of message it can hold, each kind once a branch."""
    paths = []
    for field in kind.fields:
        if field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type.full_name not in seen:
            paths.append([field])
            below = messages_below(field.message_type, seen | {field.message_type.full_name})
            paths += [[field, *rest] for rest in below]
    return paths


def build(message: Message, path: list[FieldDescriptor]) -> Message:
    """The message with the path filled in; the last message on it."""
    for field in path:
        child = getattr(message, field.name)
        message = child.add() if field.is_repeated else child
        message.SetInParent()
    return message


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.DESCRIPTOR.name)
def test_there_is_no_place_in_any_request_where_an_unknown_field_is_overlooked(kind: Any) -> None:
    for path in messages_below(kind.DESCRIPTOR):
        request = kind()
        build(request, path).MergeFromString(FUTURE)
        assert refused(request)[0] is Reason.UNKNOWN_FIELD, [field.name for field in path]


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.DESCRIPTOR.name)
def test_there_is_no_enum_in_any_request_where_an_unknown_value_is_overlooked(kind: Any) -> None:
    for path in [[], *messages_below(kind.DESCRIPTOR)]:
        holder: Any = path[-1].message_type if path else kind.DESCRIPTOR
        for field in (field for field in holder.fields if field.type == FieldDescriptor.TYPE_ENUM):
            request = kind()
            message = build(request, path)
            if field.is_repeated:
                getattr(message, field.name).append(999)
            else:
                setattr(message, field.name, 999)
            reason, where = refused(request)
            assert reason is Reason.UNKNOWN_ENUM_VALUE
            assert where.endswith(field.name)


def test_an_unspecified_value_that_was_sent_on_purpose_is_refused() -> None:
    assert refused(pb.LogprobRequest(boundary=0)) == (Reason.UNKNOWN_ENUM_VALUE, "boundary")  # type: ignore[arg-type]


def test_the_allowed_values_are_named_without_the_unspecified_one() -> None:
    with pytest.raises(InvalidArgument) as caught:
        refuse_unknown(pb.LogprobRequest(boundary=9))  # type: ignore[arg-type]
    names = "BOUNDARY_POLICY_JOINT, BOUNDARY_POLICY_SEPARATE, BOUNDARY_POLICY_STRICT"
    assert caught.value.detail.allowed == names


def test_every_enum_of_the_package_calls_zero_unspecified() -> None:
    modules = [pb, token_pb2, mask_pb2, view_pb2]
    enums = [enum for module in modules for enum in module.DESCRIPTOR.enum_types_by_name.values()]
    assert enums
    assert all(enum.values_by_number[0].name.endswith("_UNSPECIFIED") for enum in enums)


def test_messages_that_nest_too_deep_are_refused_and_do_not_exhaust_the_stack() -> None:
    expression = inner = mask_pb2.MaskExpression()
    for _ in range(MAX_DEPTH + 2):
        inner = inner.negated
    inner.SetInParent()
    assert refused(expression)[0] is Reason.NESTED_TOO_DEEP


def test_more_entries_than_any_limit_allows_are_refused_before_they_are_looked_through() -> None:
    request = pb.TokenizeRequest(inputs=[TEXT] * (MAX_ENTRIES + 1))
    assert refused(request) == (Reason.TOO_MANY, "inputs")


def test_as_many_entries_as_are_looked_at_pass() -> None:
    refuse_unknown(pb.TokenizeRequest(inputs=[TEXT] * MAX_ENTRIES))
