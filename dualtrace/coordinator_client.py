"""The typed client of a coordinator: compares, runs jobs, reads what is kept. In the words of `library` and `compare`.

It knows the wire. It must not know how a coordinator works inside.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc

from dualtrace.artifacts import digest_of
from dualtrace.client import Connection, open_channel, problem_of, seconds_left
from dualtrace.compare.events import CompareEvent
from dualtrace.compare.report import CompareReport, Verdict, read_report, report_digest
from dualtrace.library import (
    Backend,
    Case,
    ComparePlan,
    ComparisonSummary,
    Job,
    JobEvent,
    Page,
    RunRecord,
    RunSummary,
)
from dualtrace.problems import Internal, Reason
from dualtrace.questions.answers import TokenizeAnswer
from dualtrace.runs.kept import read_record
from dualtrace.v1 import compare_pb2, compare_pb2_grpc, library_pb2, library_pb2_grpc
from dualtrace.wire import compare_events, jobs
from dualtrace.wire import library as wire
from dualtrace.wire.compare import compare_plan_to_pb, texts_to_pb, tokens_from_pb


@dataclass(frozen=True)
class CompareOutcome:
    """How a comparison ended: the last thing that `CoordinatorClient.compare` yields."""

    report: CompareReport
    report_text: str  # the very document, as its digest proves
    comparison_id: str  # "" when it was not kept


class CoordinatorClient:
    """One coordinator, asked asynchronously. `deadline` is on the clock of time.monotonic, None for none."""

    def __init__(self, connection: Connection) -> None:
        self._address = connection.address
        self._metadata = (("authorization", f"Bearer {connection.token}"),) if connection.token else ()
        self._channel = open_channel(connection)
        # Its calls are looked up by name here; the generated stubs do not know grpc.aio.
        self._compare: Any = compare_pb2_grpc.CompareServiceStub(self._channel)
        self._library: Any = library_pb2_grpc.LibraryServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    # Comparing

    async def compare(
        self, plan: ComparePlan, *, deadline: float | None = None
    ) -> AsyncGenerator[CompareEvent | CompareOutcome, None]:
        """Events as they come, the outcome last. Leaving early cancels the comparison.

        A stream that breaks off before its end, or a report that is not the one announced, is an error.
        """
        parts: list[bytes] = []
        done: compare_events.CompareDone | None = None
        expected = 0
        async with aclosing(self._read(self._compare.Compare, compare_plan_to_pb(plan), deadline)) as responses:
            async for response in responses:
                _check_sequence(response.sequence, expected)
                expected += 1
                told = compare_events.told_from_pb(response)
                if isinstance(told, bytes):
                    parts.append(told)
                elif isinstance(told, compare_events.CompareDone):
                    done = told
                elif told is not None:
                    yield told
        if done is None:
            message = "the comparison ended without its last event; what came of it is incomplete"
            raise Internal(Reason.INCOMPLETE_STREAM, message)
        yield _join_report(parts, done)

    async def start_job(self, request_id: str, work: jobs.Work, *, deadline: float | None = None) -> Job:
        """Start long work; asked again with the same id and work it is the same job. Text runs that saved case."""
        response = await self._call(self._compare.StartJob, jobs.start_to_pb(request_id, work), deadline)
        return jobs.job_from_pb(response.job)

    async def get_job(self, job_id: str, *, deadline: float | None = None) -> Job:
        response = await self._call(self._compare.GetJob, compare_pb2.GetJobRequest(job_id=job_id), deadline)
        return jobs.job_from_pb(response.job)

    async def cancel_job(self, job_id: str, *, deadline: float | None = None) -> Job:
        response = await self._call(self._compare.CancelJob, compare_pb2.CancelJobRequest(job_id=job_id), deadline)
        return jobs.job_from_pb(response.job)

    async def tokenize(self, backend: str, texts: Sequence[str], *, deadline: float | None = None) -> TokenizeAnswer:
        """Texts as the tokenizer of a backend (its bare name) cuts them."""
        response = await self._call(self._compare.TokenizeTexts, texts_to_pb(backend, texts), deadline)
        return tokens_from_pb(response)

    async def watch_job(
        self, job_id: str, after_sequence: int = 0, *, deadline: float | None = None
    ) -> AsyncGenerator[JobEvent, None]:
        """Its events after that number, until it ends. Leaving early cancels nothing."""
        request = compare_pb2.WatchJobRequest(job_id=job_id, after_sequence=after_sequence)
        expected = after_sequence + 1
        ended = False
        async with aclosing(self._read(self._compare.WatchJob, request, deadline)) as responses:
            async for response in responses:
                _check_sequence(response.sequence, expected)
                expected += 1
                event = jobs.job_event_from_pb(response)
                ended = event.job.state.is_end
                yield event
        if not ended and expected > after_sequence + 1:
            message = f"the events of job {job_id} broke off; watch it again after number {expected - 1}"
            raise Internal(Reason.INCOMPLETE_STREAM, message)

    # What is kept

    async def list_backends(self, *, deadline: float | None = None) -> tuple[Backend, ...]:
        response = await self._call(self._library.ListBackends, library_pb2.ListBackendsRequest(), deadline)
        return tuple(wire.backend_from_pb(backend) for backend in response.backends)

    async def list_runs(
        self,
        page_size: int = 100,
        page_token: str = "",
        *,
        identity: str = "",
        target: str = "",
        deadline: float | None = None,
    ) -> Page[RunSummary]:
        request = library_pb2.ListRunsRequest(
            page_size=page_size, page_token=page_token, identity=identity, target=target
        )
        response = await self._call(self._library.ListRuns, request, deadline)
        return wire.read_page(response.runs, wire.run_summary_from_pb, response.next_page_token)

    async def get_run(self, run_id: str, *, deadline: float | None = None) -> RunRecord:
        return read_record(await self.get_run_text(run_id, deadline=deadline))

    async def get_run_text(self, run_id: str, *, deadline: float | None = None) -> str:
        """The very document of the run record."""
        return await self._read_text(self._library.GetRun, library_pb2.GetRunRequest(run_id=run_id), deadline)

    async def list_comparisons(
        self,
        page_size: int = 100,
        page_token: str = "",
        *,
        case: str = "",
        verdict: Verdict | None = None,
        deadline: float | None = None,
    ) -> Page[ComparisonSummary]:
        request = library_pb2.ListComparisonsRequest(
            page_size=page_size,
            page_token=page_token,
            case_name=case,
            verdict=None if verdict is None else compare_events.verdict_to_pb(verdict),
        )
        response = await self._call(self._library.ListComparisons, request, deadline)
        return wire.read_page(response.comparisons, wire.comparison_summary_from_pb, response.next_page_token)

    async def get_comparison(self, comparison_id: str, *, deadline: float | None = None) -> CompareReport:
        return read_report(await self.get_comparison_text(comparison_id, deadline=deadline))

    async def get_comparison_text(self, comparison_id: str, *, deadline: float | None = None) -> str:
        """The very document of the report."""
        request = library_pb2.GetComparisonRequest(comparison_id=comparison_id)
        return await self._read_text(self._library.GetComparison, request, deadline)

    async def get_artifact(self, digest: str, *, deadline: float | None = None) -> AsyncGenerator[bytes, None]:
        """The bytes behind a digest, in parts. See `fetch_artifact` for all of them, checked."""
        request = library_pb2.GetArtifactRequest(digest=digest)
        async with aclosing(self._read(self._library.GetArtifact, request, deadline)) as responses:
            async for response in responses:
                yield response.part

    async def fetch_artifact(self, digest: str, *, deadline: float | None = None) -> bytes:
        """All the bytes behind a digest; that they have it is checked."""
        data = b"".join([part async for part in self.get_artifact(digest, deadline=deadline)])
        if digest_of(data) != digest:
            message = f"the bytes that came have digest {digest_of(data)}, not {digest}; ask again"
            raise Internal(Reason.ARTIFACT_CORRUPT, message)
        return data

    # Cases

    async def list_cases(
        self, tag: str = "", page_size: int = 100, page_token: str = "", *, deadline: float | None = None
    ) -> Page[Case]:
        request = library_pb2.ListCasesRequest(tag=tag, page_size=page_size, page_token=page_token)
        response = await self._call(self._library.ListCases, request, deadline)
        return wire.read_page(response.cases, wire.case_from_pb, response.next_page_token)

    async def get_case(self, name: str, *, deadline: float | None = None) -> Case:
        response = await self._call(self._library.GetCase, library_pb2.GetCaseRequest(name=name), deadline)
        return wire.case_from_pb(response.saved_case)

    async def create_case(self, case: Case, *, deadline: float | None = None) -> Case:
        request = library_pb2.CreateCaseRequest(saved_case=wire.case_to_pb(case))
        response = await self._call(self._library.CreateCase, request, deadline)
        return wire.case_from_pb(response.saved_case)

    async def update_case(self, case: Case, expected_revision: int, *, deadline: float | None = None) -> Case:
        request = library_pb2.UpdateCaseRequest(saved_case=wire.case_to_pb(case), expected_revision=expected_revision)
        response = await self._call(self._library.UpdateCase, request, deadline)
        return wire.case_from_pb(response.saved_case)

    async def delete_case(self, name: str, expected_revision: int, *, deadline: float | None = None) -> None:
        request = library_pb2.DeleteCaseRequest(name=name, expected_revision=expected_revision)
        await self._call(self._library.DeleteCase, request, deadline)

    # Calls

    async def _call(self, method: Any, request: Any, deadline: float | None) -> Any:
        try:
            return await method(request, timeout=seconds_left(deadline), metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise problem_of(error, self._address, "a coordinator") from None

    async def _read(self, method: Any, request: Any, deadline: float | None) -> AsyncGenerator[Any, None]:
        call: Any = method(request, timeout=seconds_left(deadline), metadata=self._metadata)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise problem_of(error, self._address, "a coordinator") from None
        finally:
            call.cancel()  # harmless when it has ended

    async def _read_text(self, method: Any, request: Any, deadline: float | None) -> str:
        async with aclosing(self._read(method, request, deadline)) as responses:
            data = b"".join([response.part async for response in responses])
        return _decode(data, "the document")


def _check_sequence(came: int, due: int) -> None:
    if came != due:
        raise Internal(Reason.INCOMPLETE_STREAM, f"event {came} came where {due} was due; the stream has a hole")


def _join_report(parts: list[bytes], done: compare_events.CompareDone) -> CompareOutcome:
    text = _decode(b"".join(parts), "the report")
    digest = report_digest(text)
    if digest != done.report_digest:
        message = f"the report that came has digest {digest}; {done.report_digest} was announced"
        raise Internal(Reason.ARTIFACT_CORRUPT, message, field="report_digest")
    return CompareOutcome(read_report(text), text, done.comparison_id)


def _decode(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise Internal(Reason.ARTIFACT_CORRUPT, f"{what} that came is no text") from None
