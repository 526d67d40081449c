"""Kept things over the wire: what is sent arrives, lists are bounded, odd names and revisions are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings

from dualtrace.compare.report import Verdict
from dualtrace.library import Case, SideSpec
from dualtrace.problems import Reason
from dualtrace.questions.asked import Input, RollingQuestion
from dualtrace.v1 import compare_pb2
from dualtrace.v1 import library_pb2 as pb
from dualtrace.wire import library as wire
from tests.support import compare_strategies as known
from tests.support.strategies import same
from tests.support.wired import FUTURE, over_the_wire, refused

FEW = settings(max_examples=60)
CASE = Case("smoke", RollingQuestion((Input(text="one two"),)), SideSpec("backend:a"), SideSpec("run:run-1"))


@FEW
@given(known.BACKENDS)
def test_a_backend_arrives_as_it_stands(backend: Any) -> None:
    assert wire.backend_from_pb(over_the_wire(wire.backend_to_pb(backend))) == backend


@FEW
@given(known.BACKENDS)
def test_whether_a_backend_can_be_asked_is_told(backend: Any) -> None:
    assert wire.backend_to_pb(backend).healthy == backend.healthy


@FEW
@given(known.RUN_SUMMARIES)
def test_a_runs_summary_arrives(summary: Any) -> None:
    assert wire.run_summary_from_pb(over_the_wire(wire.run_summary_to_pb(summary))) == summary


@FEW
@given(known.COMPARISON_SUMMARIES)
def test_a_comparisons_summary_arrives(summary: Any) -> None:
    assert wire.comparison_summary_from_pb(over_the_wire(wire.comparison_summary_to_pb(summary))) == summary


@FEW
@given(known.CASES)
def test_a_case_arrives_as_it_is_kept(case: Case) -> None:
    assert same(wire.case_from_pb(over_the_wire(wire.case_to_pb(case))), case)


@FEW
@given(known.CASES)
def test_a_case_arrives_as_it_was_sent(case: Case) -> None:
    message = pb.UpdateCaseRequest(saved_case=wire.case_to_pb(case), expected_revision=4)
    arrived, revision = wire.update_case_from_pb(over_the_wire(message))
    assert (same(arrived, case), revision) == (True, 4)


def test_a_page_that_is_not_sized_has_the_default_size() -> None:
    assert wire.page_from_pb(pb.ListCasesRequest()) == {"page_size": 100, "page_token": ""}


def test_a_verdict_that_is_absent_is_any() -> None:
    assert wire.list_comparisons_from_pb(pb.ListComparisonsRequest())["verdict"] is None


def test_a_verdict_that_is_set_is_looked_for() -> None:
    message = pb.ListComparisonsRequest(verdict=compare_pb2.VERDICT_FAIL)
    assert wire.list_comparisons_from_pb(message)["verdict"] is Verdict.FAIL


def case_with(**changes: Any) -> pb.CreateCaseRequest:
    message = pb.CreateCaseRequest(saved_case=wire.case_to_pb(CASE))
    message.saved_case.MergeFrom(pb.Case(**changes))
    return message


LISTS: dict[str, tuple[Callable[..., object], Message, Reason, str]] = {
    "a page below 0": (wire.list_cases_from_pb, pb.ListCasesRequest(page_size=-1), Reason.OUT_OF_RANGE, "page_size"),
    "a page above 1000": (wire.list_runs_from_pb, pb.ListRunsRequest(page_size=1001), Reason.OUT_OF_RANGE, "page_size"),
    "a token that is too long": (
        wire.list_runs_from_pb, pb.ListRunsRequest(page_token="x" * 1001), Reason.TOO_MANY, "page_token",
    ),
    "an identity that is too long": (
        wire.list_runs_from_pb, pb.ListRunsRequest(identity="x" * 201), Reason.TOO_MANY, "identity",
    ),
    "a tag that is no name": (wire.list_cases_from_pb, pb.ListCasesRequest(tag="a b"), Reason.MALFORMED, "tag"),
    "a case that is no name": (
        wire.list_comparisons_from_pb, pb.ListComparisonsRequest(case_name="../x"), Reason.MALFORMED, "case_name",
    ),
    "a verdict that is set to nothing": (
        wire.list_comparisons_from_pb,
        pb.ListComparisonsRequest(verdict=compare_pb2.VERDICT_UNSPECIFIED),
        Reason.UNKNOWN_ENUM_VALUE,
        "verdict",
    ),
    "a run without an id": (wire.id_from_pb, pb.GetRunRequest(), Reason.MISSING, "run_id"),
    "a comparison's id that is too long": (
        wire.id_from_pb, pb.GetComparisonRequest(comparison_id="c" * 101), Reason.MALFORMED, "comparison_id",
    ),
    "a digest that is a path": (
        wire.digest_from_pb, pb.GetArtifactRequest(digest="sha256:../../x"), Reason.MALFORMED, "digest",
    ),
    "no case": (wire.create_case_from_pb, pb.CreateCaseRequest(), Reason.MISSING, "saved_case"),
    "a case without a side": (
        wire.create_case_from_pb,
        pb.CreateCaseRequest(saved_case=pb.Case(name="a", ask=wire.case_to_pb(CASE).ask)),
        Reason.MISSING,
        "saved_case.left",
    ),
    "a case's name that is a path": (
        wire.create_case_from_pb, case_with(name="../x"), Reason.MALFORMED, "saved_case.name",
    ),
    "a tag twice": (wire.create_case_from_pb, case_with(tags=["x", "x"]), Reason.DUPLICATE, "saved_case.tags"),
    "too many tags": (
        wire.create_case_from_pb, case_with(tags=[f"t{i}" for i in range(65)]), Reason.TOO_MANY, "saved_case.tags",
    ),
    "a book for a description": (
        wire.create_case_from_pb, case_with(description="x" * 10_001), Reason.TOO_MANY, "saved_case.description",
    ),
    "a new case with a revision": (
        wire.create_case_from_pb, case_with(revision=3), Reason.OUT_OF_RANGE, "saved_case.revision",
    ),
    "a bad tolerance in a case": (
        wire.create_case_from_pb,
        case_with(tolerance=compare_pb2.Tolerance(abs_epsilon=-1)),
        Reason.OUT_OF_RANGE,
        "saved_case.tolerance.abs_epsilon",
    ),
    "an update that says of no revision": (
        wire.update_case_from_pb,
        pb.UpdateCaseRequest(saved_case=wire.case_to_pb(CASE)),
        Reason.OUT_OF_RANGE,
        "expected_revision",
    ),
    "a deletion that says of no revision": (
        wire.delete_case_from_pb, pb.DeleteCaseRequest(name="a"), Reason.OUT_OF_RANGE, "expected_revision",
    ),
    "a field of a later version": (
        wire.case_name_from_pb,
        pb.GetCaseRequest.FromString(pb.GetCaseRequest(name="a").SerializeToString() + FUTURE),
        Reason.UNKNOWN_FIELD,
        "<1007>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_a_request_is_refused_at_the_field_to_blame(name: str) -> None:
    call, message, reason, field = LISTS[name]
    assert refused(call, message) == (reason, field)
