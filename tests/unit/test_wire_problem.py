"""Problems over the wire: the enum mirrors ours, every class comes back as itself, others' clients find their own."""

from __future__ import annotations

import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given

from dualtrace import problems
from dualtrace.problems import BY_CODE, Internal, InvalidArgument, Problem, Reason
from dualtrace.v1 import problem_pb2 as pb
from dualtrace.wire import problem as wire
from tests.support.strategies import PROBLEMS, same

KINDS = sorted(BY_CODE.values(), key=lambda kind: kind.code)


def test_the_reasons_are_those_of_the_proto_both_ways() -> None:
    on_the_wire = {name.removeprefix("REASON_") for name in pb.Reason.keys()} - {"UNSPECIFIED"}  # noqa: SIM118
    assert on_the_wire == set(Reason.__members__)


def test_every_reason_has_its_own_number() -> None:
    numbers = [pb.Reason.Value(f"REASON_{reason}") for reason in Reason]
    assert sorted(numbers) == list(range(1, len(Reason) + 1))


def test_every_class_of_problem_can_be_rebuilt_from_its_code() -> None:
    subclasses = {kind for kind in vars(problems).values() if isinstance(kind, type) and issubclass(kind, Problem)}
    assert set(BY_CODE.values()) == subclasses - {Problem}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_problem_comes_back_from_a_status_as_itself(kind: type[Problem]) -> None:
    sent = kind(Reason.OUT_OF_RANGE, "layer 40 asked", field="edges[0]", allowed="0-31", item=0)
    status = status_pb2.Status.FromString(wire.to_status(sent).SerializeToString())
    back = wire.from_status(status)
    assert status.code == kind.code
    assert same(back, sent)


@given(PROBLEMS)
def test_any_problem_arrives_as_it_was_sent(sent: Problem) -> None:
    assert same(wire.from_pb(pb.Problem.FromString(wire.to_pb(sent).SerializeToString())), sent)


@given(PROBLEMS)
def test_any_problem_arrives_in_a_status_as_it_was_sent(sent: Problem) -> None:
    assert same(wire.from_status(wire.to_status(sent)), sent)


def test_item_zero_is_not_the_same_as_no_item() -> None:
    sent = InvalidArgument(Reason.EMPTY, "empty", item=0)
    assert wire.from_pb(wire.to_pb(sent)).detail.item == 0


def test_a_client_that_only_knows_google_rpc_finds_reason_and_field() -> None:
    status = wire.to_status(InvalidArgument(Reason.EMPTY, "empty", field="items", allowed="1-5"))
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[1].Unpack(info)
    assert status.details[2].Unpack(bad)
    assert (info.reason, info.domain, info.metadata["allowed"]) == ("EMPTY", "dualtrace", "1-5")
    assert [(violation.field, violation.description) for violation in bad.field_violations] == [("items", "empty")]


def test_a_status_without_our_problem_gives_none() -> None:
    assert wire.from_status(status_pb2.Status(code=3, message="a proxy says no")) is None


def test_a_reason_from_the_future_becomes_a_bug_that_keeps_its_message() -> None:
    back = wire.from_pb(pb.Problem(code=3, reason=9999, message="what it says"))  # type: ignore[arg-type]
    assert (back.reason, back.detail.message) == (Reason.BUG, "what it says")


@pytest.mark.parametrize("code", [0, 2, 10, 99, -1])
def test_a_code_that_is_none_of_ours_becomes_internal(code: int) -> None:
    assert isinstance(wire.from_pb(pb.Problem(code=code, reason=pb.REASON_BUG)), Internal)
