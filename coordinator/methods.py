"""Every method of the two services, once for both faces: a request becomes an operation, its outcome a response.

It knows messages and operations. It must not know gRPC, HTTP, tokens or how a failure is told.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from coordinator.operations import Caller, CaseRun, CompareOutcome, Operations
from dualtrace.compare.events import CompareEvent, TokenPairs
from dualtrace.compare.report import report_digest
from dualtrace.v1 import compare_pb2, library_pb2
from dualtrace.wire import compare, compare_events, jobs, library
from dualtrace.wire.strict import refuse_unknown

SERVICES = (
    compare_pb2.DESCRIPTOR.services_by_name["CompareService"],
    library_pb2.DESCRIPTOR.services_by_name["LibraryService"],
)
SERVICE_NAMES = tuple(service.full_name for service in SERVICES)
PART_BYTES = 1 << 20

Unary = Callable[[Operations, Caller, Any], Awaitable[Message]]
Streamed = Callable[[Operations, Caller, Any], AsyncGenerator[Message, None]]


@dataclass(frozen=True)
class Method:
    """One method of a service; exactly one of `unary` and `streamed` is set."""

    name: str
    service: str  # full name
    request: type[Message]
    response: type[Message]
    unary: Unary | None
    streamed: Streamed | None

    @property
    def waits(self) -> bool:
        """It may have nothing to tell for long, and nothing is lost when it is cut short."""
        return self.name == "WatchJob"

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"


# CompareService


async def _compare(
    operations: Operations, caller: Caller, request: compare_pb2.CompareRequest
) -> AsyncGenerator[Message, None]:
    plan = compare.compare_plan_from_pb(request)
    sequence = itertools.count()
    async with aclosing(operations.compare(caller, plan)) as events:
        async for event in events:
            for told in _tell(event):
                yield compare_events.told_to_pb(told, next(sequence))


def _tell(event: CompareEvent | CompareOutcome) -> Iterator[compare_events.Told]:
    if isinstance(event, TokenPairs):
        yield from compare_events.cut_pairs(event)
    elif isinstance(event, CompareOutcome):
        yield from compare_events.cut_report(event.report_text)
        report = event.report
        digest = report_digest(event.report_text)
        yield compare_events.CompareDone(
            report.schema_version, report.verdict, report.reasons, event.comparison_id, digest
        )
    else:
        yield event


async def _start_job(operations: Operations, caller: Caller, request: compare_pb2.StartJobRequest) -> Message:
    request_id, work = jobs.start_from_pb(request)
    asked = CaseRun(work) if isinstance(work, str) else work
    job = await operations.start_job(caller, request_id, asked)
    return compare_pb2.StartJobResponse(job=jobs.job_to_pb(job))


async def _get_job(operations: Operations, caller: Caller, request: compare_pb2.GetJobRequest) -> Message:
    job = await operations.get_job(caller, jobs.job_id_from_pb(request))
    return compare_pb2.GetJobResponse(job=jobs.job_to_pb(job))


async def _watch_job(
    operations: Operations, caller: Caller, request: compare_pb2.WatchJobRequest
) -> AsyncGenerator[Message, None]:
    job_id, after_sequence = jobs.watch_from_pb(request)
    async with aclosing(operations.watch_job(caller, job_id, after_sequence)) as events:
        async for event in events:
            yield jobs.job_event_to_pb(event)


async def _cancel_job(operations: Operations, caller: Caller, request: compare_pb2.CancelJobRequest) -> Message:
    job = await operations.cancel_job(caller, jobs.job_id_from_pb(request))
    return compare_pb2.CancelJobResponse(job=jobs.job_to_pb(job))


async def _tokenize_texts(operations: Operations, caller: Caller, request: compare_pb2.TokenizeTextsRequest) -> Message:
    backend, texts = compare.texts_from_pb(request)
    return compare.tokens_to_pb(await operations.tokenize(caller, backend, texts))


# LibraryService


async def _list_backends(operations: Operations, caller: Caller, request: library_pb2.ListBackendsRequest) -> Message:
    refuse_unknown(request)
    found = await operations.list_backends(caller)
    return library_pb2.ListBackendsResponse(backends=[library.backend_to_pb(backend) for backend in found])


async def _list_runs(operations: Operations, caller: Caller, request: library_pb2.ListRunsRequest) -> Message:
    page = await operations.list_runs(caller, **library.list_runs_from_pb(request))
    runs = [library.run_summary_to_pb(summary) for summary in page.entries]
    return library_pb2.ListRunsResponse(runs=runs, next_page_token=page.next_page_token)


async def _get_run(
    operations: Operations, caller: Caller, request: library_pb2.GetRunRequest
) -> AsyncGenerator[Message, None]:
    text = await operations.get_run_text(caller, library.id_from_pb(request))
    for part in compare_events.cut_bytes(text.encode("utf-8")):
        yield library_pb2.GetRunResponse(part=part)


async def _list_comparisons(
    operations: Operations, caller: Caller, request: library_pb2.ListComparisonsRequest
) -> Message:
    page = await operations.list_comparisons(caller, **library.list_comparisons_from_pb(request))
    found = [library.comparison_summary_to_pb(summary) for summary in page.entries]
    return library_pb2.ListComparisonsResponse(comparisons=found, next_page_token=page.next_page_token)


async def _get_comparison(
    operations: Operations, caller: Caller, request: library_pb2.GetComparisonRequest
) -> AsyncGenerator[Message, None]:
    text = await operations.get_comparison_text(caller, library.id_from_pb(request))
    for part in compare_events.cut_bytes(text.encode("utf-8")):
        yield library_pb2.GetComparisonResponse(part=part)


async def _get_artifact(
    operations: Operations, caller: Caller, request: library_pb2.GetArtifactRequest
) -> AsyncGenerator[Message, None]:
    async with aclosing(operations.read_artifact(caller, library.digest_from_pb(request))) as parts:
        async for data in parts:
            for part in compare_events.cut_bytes(data):
                yield library_pb2.GetArtifactResponse(part=part)


async def _list_cases(operations: Operations, caller: Caller, request: library_pb2.ListCasesRequest) -> Message:
    page = await operations.list_cases(caller, **library.list_cases_from_pb(request))
    cases = [library.case_to_pb(case) for case in page.entries]
    return library_pb2.ListCasesResponse(cases=cases, next_page_token=page.next_page_token)


async def _get_case(operations: Operations, caller: Caller, request: library_pb2.GetCaseRequest) -> Message:
    case = await operations.get_case(caller, library.case_name_from_pb(request))
    return library_pb2.GetCaseResponse(saved_case=library.case_to_pb(case))


async def _create_case(operations: Operations, caller: Caller, request: library_pb2.CreateCaseRequest) -> Message:
    case = await operations.create_case(caller, library.create_case_from_pb(request))
    return library_pb2.CreateCaseResponse(saved_case=library.case_to_pb(case))


async def _update_case(operations: Operations, caller: Caller, request: library_pb2.UpdateCaseRequest) -> Message:
    case = await operations.update_case(caller, *library.update_case_from_pb(request))
    return library_pb2.UpdateCaseResponse(saved_case=library.case_to_pb(case))


async def _delete_case(operations: Operations, caller: Caller, request: library_pb2.DeleteCaseRequest) -> Message:
    await operations.delete_case(caller, *library.delete_case_from_pb(request))
    return library_pb2.DeleteCaseResponse()


UNARY: dict[str, Unary] = {
    "StartJob": _start_job,
    "GetJob": _get_job,
    "CancelJob": _cancel_job,
    "TokenizeTexts": _tokenize_texts,
    "ListBackends": _list_backends,
    "ListRuns": _list_runs,
    "ListComparisons": _list_comparisons,
    "ListCases": _list_cases,
    "GetCase": _get_case,
    "CreateCase": _create_case,
    "UpdateCase": _update_case,
    "DeleteCase": _delete_case,
}
STREAMED: dict[str, Streamed] = {
    "Compare": _compare,
    "WatchJob": _watch_job,
    "GetRun": _get_run,
    "GetComparison": _get_comparison,
    "GetArtifact": _get_artifact,
}

METHODS: tuple[Method, ...] = tuple(
    Method(
        name=method.name,
        service=service.full_name,
        request=GetMessageClass(method.input_type),
        response=GetMessageClass(method.output_type),
        unary=None if method.server_streaming else UNARY[method.name],
        streamed=STREAMED[method.name] if method.server_streaming else None,
    )
    for service in SERVICES
    for method in service.methods
)
"""All methods that the protos declare: one that nobody wrote fails here, when the module is loaded."""
