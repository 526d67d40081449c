"""library.proto: backends, summaries of runs and comparisons, saved cases, and the lists of them; both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message

from dualtrace.compare.gates import DEFAULT_GATES
from dualtrace.compare.tolerance import Tolerance
from dualtrace.library import Backend, Case, ComparisonSummary, Page, Replica, RunMode, RunSummary, check_name
from dualtrace.problems import Internal, InvalidArgument, Problem, Reason
from dualtrace.v1 import compare_pb2
from dualtrace.v1 import library_pb2 as pb
from dualtrace.wire.compare import (
    ask_from_pb,
    ask_to_pb,
    check_id,
    gates_from_pb,
    gates_to_pb,
    need,
    question_kind_from_pb,
    question_kind_to_pb,
    side_from_pb,
    side_to_pb,
    tolerance_from_pb,
    tolerance_from_request,
    tolerance_to_pb,
)
from dualtrace.wire.compare_events import verdict_from_pb, verdict_to_pb
from dualtrace.wire.model import card_from_pb, card_to_pb
from dualtrace.wire.strict import refuse_unknown

T = TypeVar("T")
M = TypeVar("M", bound=Message)

DEFAULT_PAGE, MAX_PAGE = 100, 1000
MAX_PAGE_TOKEN_CHARS = 1000
MAX_FILTER_CHARS = 200
MAX_TAGS = 64
MAX_CASE_BYTES = (4 << 20) - (64 << 10)
"""Of one case as told: alone in an answer it stays below what gRPC takes, with room for a page token."""
MAX_DESCRIPTION_CHARS = 10_000
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


# Backends


def backend_to_pb(backend: Backend) -> pb.Backend:
    return pb.Backend(
        name=backend.name,
        replicas=[pb.Replica(address=r.address, serving=r.serving, problem=r.problem) for r in backend.replicas],
        healthy=backend.healthy,
        card=None if backend.card is None else card_to_pb(backend.card),
        synthetic=backend.synthetic,
        problem=backend.problem,
    )


def backend_from_pb(message: pb.Backend) -> Backend:
    return Backend(
        name=message.name,
        replicas=tuple(Replica(r.address, r.serving, r.problem) for r in message.replicas),
        card=card_from_pb(message.card) if message.HasField("card") else None,
        synthetic=message.synthetic,
        problem=message.problem,
    )


# Runs and comparisons


def run_summary_to_pb(summary: RunSummary) -> pb.RunSummary:
    return pb.RunSummary(
        run_id=summary.run_id,
        created=summary.created,
        mode=compare_pb2.RunMode.Value(f"RUN_MODE_{summary.mode}"),
        target=summary.target,
        model_id=summary.model_id,
        framework=summary.framework,
        question=question_kind_to_pb(summary.question_kind),
        identity=summary.identity,
        complete=summary.complete,
        synthetic=summary.synthetic,
    )


def run_summary_from_pb(message: pb.RunSummary) -> RunSummary:
    modes = {compare_pb2.RunMode.Value(f"RUN_MODE_{mode}"): mode for mode in RunMode}
    if message.mode not in modes:
        text = f"the coordinator sent run mode {message.mode}, which this version does not know; update it"
        raise Internal(Reason.UNKNOWN_ENUM_VALUE, text, field="mode")
    return RunSummary(
        run_id=message.run_id,
        created=message.created,
        mode=modes[message.mode],
        target=message.target,
        model_id=message.model_id,
        framework=message.framework,
        question_kind=question_kind_from_pb(message.question),
        identity=message.identity,
        complete=message.complete,
        synthetic=message.synthetic,
    )


def comparison_summary_to_pb(summary: ComparisonSummary) -> pb.ComparisonSummary:
    return pb.ComparisonSummary(
        comparison_id=summary.comparison_id,
        created=summary.created,
        left=summary.left,
        right=summary.right,
        question=question_kind_to_pb(summary.question_kind),
        verdict=verdict_to_pb(summary.verdict),
        case_name=summary.case,
        first_divergence_index=summary.first_divergence_index,
        max_token_abs_diff=summary.max_token_abs_diff,
    )


def comparison_summary_from_pb(message: pb.ComparisonSummary) -> ComparisonSummary:
    first = message.first_divergence_index if message.HasField("first_divergence_index") else None
    return ComparisonSummary(
        comparison_id=message.comparison_id,
        created=message.created,
        left=message.left,
        right=message.right,
        question_kind=question_kind_from_pb(message.question),
        verdict=verdict_from_pb(message.verdict),
        case=message.case_name,
        first_divergence_index=first,
        max_token_abs_diff=message.max_token_abs_diff if message.HasField("max_token_abs_diff") else None,
    )


def id_from_pb(message: pb.GetRunRequest | pb.GetComparisonRequest) -> str:
    refuse_unknown(message)
    field = "run_id" if isinstance(message, pb.GetRunRequest) else "comparison_id"
    return check_id(getattr(message, field), field)


def digest_from_pb(message: pb.GetArtifactRequest) -> str:
    refuse_unknown(message)
    if DIGEST.fullmatch(message.digest) is None:
        text = f"{message.digest!r:.100} is no digest of an artifact"
        raise InvalidArgument(Reason.MALFORMED, text, field="digest", allowed=DIGEST.pattern)
    return message.digest


# Lists


def page_from_pb(message: Any) -> dict[str, Any]:
    """What every list is asked for: how many, and from where on."""
    refuse_unknown(message)
    size = message.page_size
    if not 0 <= size <= MAX_PAGE:
        text = f"page_size {size} asked; 1 to {MAX_PAGE}, or 0 for {DEFAULT_PAGE}"
        raise InvalidArgument(Reason.OUT_OF_RANGE, text, field="page_size", allowed=f"0-{MAX_PAGE}")
    _check_length(message.page_token, MAX_PAGE_TOKEN_CHARS, "page_token")
    return {"page_size": size or DEFAULT_PAGE, "page_token": message.page_token}


def list_runs_from_pb(message: pb.ListRunsRequest) -> dict[str, Any]:
    page = page_from_pb(message)  # first: it refuses what is no message at all
    for field in ("identity", "target"):
        _check_length(getattr(message, field), MAX_FILTER_CHARS, field)
    return {**page, "identity": message.identity, "target": message.target}


def list_comparisons_from_pb(message: pb.ListComparisonsRequest) -> dict[str, Any]:
    page = page_from_pb(message)
    if message.case_name:
        check_name(message.case_name, "case_name")
    verdict = verdict_from_pb(message.verdict) if message.HasField("verdict") else None
    return {**page, "case": message.case_name, "verdict": verdict}


def list_cases_from_pb(message: pb.ListCasesRequest) -> dict[str, Any]:
    page = page_from_pb(message)
    if message.tag:
        check_name(message.tag, "tag")
    return {**page, "tag": message.tag}


def _check_length(text: str, most: int, field: str) -> None:
    if len(text) > most:
        message = f"{field} has {len(text)} characters; at most {most}"
        raise InvalidArgument(Reason.TOO_MANY, message, field=field, allowed=f"up to {most} characters")


def read_page(messages: Sequence[M], read: Callable[[M], T], next_page_token: str) -> Page[T]:
    return Page(tuple(read(message) for message in messages), next_page_token)


# Cases


def case_to_pb(case: Case) -> pb.Case:
    return pb.Case(
        name=case.name,
        revision=case.revision,
        ask=ask_to_pb(case.question),
        left=side_to_pb(case.left),
        right=side_to_pb(case.right),
        tolerance=None if case.tolerance is None else tolerance_to_pb(case.tolerance),
        tags=case.tags,
        gates=gates_to_pb(case.policy),
        description=case.description,
    )


def case_from_pb(message: pb.Case, field: str = "saved_case") -> Case:
    """As told by a server."""
    return _case(message, field, lambda given, _field: tolerance_from_pb(given))


def case_name_from_pb(message: pb.GetCaseRequest) -> str:
    refuse_unknown(message)
    return check_id(message.name, "name")


def create_case_from_pb(message: pb.CreateCaseRequest) -> Case:
    refuse_unknown(message)
    case = _asked_case(message)
    if case.revision:
        text = f"revision {case.revision} was sent; a new case gets its revision from the server"
        raise InvalidArgument(Reason.OUT_OF_RANGE, text, field="saved_case.revision", allowed="0")
    return case


def update_case_from_pb(message: pb.UpdateCaseRequest) -> tuple[Case, int]:
    refuse_unknown(message)
    return _asked_case(message), _revision(message.expected_revision)


def delete_case_from_pb(message: pb.DeleteCaseRequest) -> tuple[str, int]:
    refuse_unknown(message)
    return check_id(message.name, "name"), _revision(message.expected_revision)


def _revision(number: int) -> int:
    if number < 1:
        text = f"expected_revision {number} asked; send the revision that the change was made from"
        raise InvalidArgument(Reason.OUT_OF_RANGE, text, field="expected_revision", allowed="1 or more")
    return number


def _asked_case(message: pb.CreateCaseRequest | pb.UpdateCaseRequest) -> Case:
    need(message, "saved_case", "saved_case")
    given = message.saved_case
    if len(given.tags) > MAX_TAGS:
        text = f"{len(given.tags)} tags; at most {MAX_TAGS}"
        raise InvalidArgument(Reason.TOO_MANY, text, field="saved_case.tags", allowed=f"0-{MAX_TAGS}")
    _check_length(given.description, MAX_DESCRIPTION_CHARS, "saved_case.description")
    case = _case(given, "saved_case", tolerance_from_request)
    size = case_to_pb(case).ByteSize()  # as it will be told, which may be more than was sent
    if size > MAX_CASE_BYTES:
        text = f"the case takes {size} bytes; at most {MAX_CASE_BYTES} fit into an answer: ask less in one case"
        raise InvalidArgument(Reason.TOO_MANY, text, field="saved_case", allowed=f"up to {MAX_CASE_BYTES} bytes")
    return case


def _case(message: pb.Case, field: str, read_tolerance: Callable[[compare_pb2.Tolerance, str], Tolerance]) -> Case:
    for part in ("ask", "left", "right"):
        need(message, part, f"{field}.{part}")
    ask = ask_from_pb(message.ask, f"{field}.ask")
    sides = [side_from_pb(side, f"{field}.{name}") for name, side in (("left", message.left), ("right", message.right))]
    tolerance = read_tolerance(message.tolerance, f"{field}.tolerance") if message.HasField("tolerance") else None
    policy = gates_from_pb(message.gates, f"{field}.gates") if message.HasField("gates") else DEFAULT_GATES
    try:
        return Case(
            name=message.name,
            question=ask,
            left=sides[0],
            right=sides[1],
            tolerance=tolerance,
            policy=policy,
            tags=tuple(message.tags),
            description=message.description,
            revision=message.revision,
        )
    except Problem as problem:
        raise problem.at(under=field) from None
