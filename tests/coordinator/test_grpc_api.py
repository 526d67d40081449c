"""The gRPC face, over a real socket: what is asked arrives, what is told comes whole, every failure has its reason."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from coordinator.methods import METHODS, SERVICE_NAMES
from coordinator.operations import CompareOutcome
from dualtrace.client import Connection
from dualtrace.compare.events import CompareHeader, FirstDivergence, TokenPairs
from dualtrace.coordinator_client import CompareOutcome as ToldOutcome
from dualtrace.coordinator_client import CoordinatorClient
from dualtrace.library import ComparePlan, JobState, RunPlan, SideSpec
from dualtrace.problems import (
    AlreadyExists,
    DeadlineExceeded,
    Exhausted,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    Problem,
    Reason,
    Unauthenticated,
    Unavailable,
)
from dualtrace.questions.asked import PLAIN, Variant
from dualtrace.v1 import compare_pb2
from tests.support.desk import Desk, desk_of, plan, rolling, twins, wait_until
from tests.support.faces import ScriptedOperations, client_of, open_faces, outcome
from tests.support.stored import make_case
from tests.support.strategies import same

PLAN = ComparePlan(rolling(20), SideSpec("backend:torch"), SideSpec("backend:jax"))


async def refused(work: Any) -> Problem:
    with pytest.raises(Problem) as caught:
        await work
    return caught.value


async def read_all(events: Any) -> list[Any]:
    return [event async for event in events]


@contextlib.asynccontextmanager
async def desk_client(folder: Path, **right: Any) -> AsyncIterator[tuple[Desk, CoordinatorClient]]:
    """A client of a whole coordinator over two fake sidecars."""
    async with desk_of(folder, twins(**right)) as desk, client_of(desk.operations) as client:
        yield desk, client


# The whole of it, over fake sidecars


async def test_a_comparison_streams_its_events_and_ends_with_the_stored_report(tmp_path: Path) -> None:
    async with desk_client(tmp_path) as (desk, client):
        *events, last = await read_all(client.compare(plan()))
        assert isinstance(events[0], CompareHeader)
        assert isinstance(last, ToldOutcome)
        assert last.report_text == await desk.store.get_comparison_text(last.comparison_id)


async def test_the_pairs_that_arrive_are_all_of_the_text(tmp_path: Path) -> None:
    async with desk_client(tmp_path) as (_desk, client):
        told = [event for event in await read_all(client.compare(plan())) if isinstance(event, TokenPairs)]
        assert sum(len(pairs.token_ids) for pairs in told) == 300


async def test_a_comparison_can_be_read_again_by_its_id(tmp_path: Path) -> None:
    async with desk_client(tmp_path) as (_desk, client):
        last = (await read_all(client.compare(plan())))[-1]
        assert await client.get_comparison_text(last.comparison_id) == last.report_text


async def test_a_job_can_be_started_and_watched_to_its_end(tmp_path: Path) -> None:
    async with desk_client(tmp_path) as (_desk, client):
        job = await client.start_job("night-1", plan())
        events = await read_all(client.watch_job(job.job_id))
        assert events[-1].job.state is JobState.DONE


async def test_a_job_is_the_same_when_it_is_started_again(tmp_path: Path) -> None:
    async with desk_client(tmp_path) as (_desk, client):
        first = await client.start_job("night-1", plan())
        assert (await client.start_job("night-1", plan())).job_id == first.job_id


async def test_other_work_under_the_same_request_id_is_refused(tmp_path: Path) -> None:
    async with desk_client(tmp_path) as (_desk, client):
        await client.start_job("night-1", plan())
        problem = await refused(client.start_job("night-1", plan(left="backend:jax")))
        assert isinstance(problem, AlreadyExists)


async def test_a_run_is_kept_with_the_bytes_of_its_answer(tmp_path: Path) -> None:
    async with desk_client(tmp_path) as (_desk, client):
        job = await client.start_job("run-1", RunPlan(rolling(20), SideSpec("backend:torch")))
        last = (await read_all(client.watch_job(job.job_id)))[-1]
        record = await client.get_run(last.job.run_id)
        assert len(await client.fetch_artifact(record.raw_response_ref)) > 0


async def test_stored_runs_are_listed_page_by_page(tmp_path: Path) -> None:
    async with desk_client(tmp_path) as (_desk, client):
        await read_all(client.compare(plan()))
        first = await client.list_runs(page_size=1)
        second = await client.list_runs(page_size=1, page_token=first.next_page_token)
        assert len({entry.run_id for entry in (*first.entries, *second.entries)}) == 2


async def test_comparisons_are_listed(tmp_path: Path) -> None:
    async with desk_client(tmp_path) as (_desk, client):
        last = (await read_all(client.compare(plan())))[-1]
        page = await client.list_comparisons()
        assert [entry.comparison_id for entry in page.entries] == [last.comparison_id]


async def test_backends_are_listed_with_their_cards(tmp_path: Path) -> None:
    async with desk_client(tmp_path) as (_desk, client):
        assert [(b.name, b.healthy, b.card is not None) for b in await client.list_backends()] == [
            ("jax", True, True),
            ("torch", True, True),
        ]


CASE = make_case(question=rolling(5), left=SideSpec("backend:torch", Variant()), right=SideSpec("backend:jax"))


async def test_a_case_comes_back_as_it_was_created(tmp_path: Path) -> None:
    async with desk_client(tmp_path) as (_desk, client):
        created = await client.create_case(CASE)
        assert same(await client.get_case("first"), created)


async def test_an_update_from_an_old_revision_is_refused(tmp_path: Path) -> None:
    async with desk_client(tmp_path) as (_desk, client):
        created = await client.create_case(CASE)
        await client.update_case(CASE, created.revision)
        problem = await refused(client.update_case(CASE, created.revision))
        assert (type(problem), problem.reason) == (FailedPrecondition, Reason.REVISION_CONFLICT)


async def test_a_case_is_listed_by_its_tag_until_it_is_deleted(tmp_path: Path) -> None:
    async with desk_client(tmp_path) as (_desk, client):
        created = await client.create_case(CASE)
        tagged = [case.name for case in (await client.list_cases("smoke")).entries]
        await client.delete_case("first", created.revision)
        assert (tagged, (await client.list_cases("smoke")).entries) == (["first"], ())


async def test_a_job_that_nobody_watches_any_more_goes_on(tmp_path: Path) -> None:
    async with desk_client(tmp_path, step_ms=50) as (desk, client):
        job = await client.start_job("night-1", plan())
        async with contextlib.aclosing(client.watch_job(job.job_id)) as events:
            await anext(events)
        assert (await desk.finish(job))[-1].job.state is JobState.DONE


async def test_a_comparison_that_is_dropped_gives_its_place_back(tmp_path: Path) -> None:
    async with desk_client(tmp_path, step_ms=200) as (desk, client):
        async with contextlib.aclosing(client.compare(plan())) as events:
            await anext(events)
        await wait_until(lambda: desk.metrics.running_comparisons._value.get() == 0)


async def test_an_unknown_backend_is_named(tmp_path: Path) -> None:
    async with desk_client(tmp_path) as (_desk, client):
        problem = await refused(read_all(client.compare(plan(right="backend:nobody"))))
        assert isinstance(problem, NotFound)
        assert "nobody" in str(problem)


async def test_an_unknown_run_is_refused(tmp_path: Path) -> None:
    async with desk_client(tmp_path) as (_desk, client):
        assert isinstance(await refused(client.get_run("run-0")), NotFound)


# Operations that do as they are told


async def test_dropping_a_comparison_cancels_it() -> None:
    operations = ScriptedOperations(endless=True)
    async with client_of(operations) as client:
        async with contextlib.aclosing(client.compare(PLAN)) as events:
            await anext(events)
        await asyncio.wait_for(operations.left.wait(), 5)


async def test_dropping_a_watch_cancels_no_job() -> None:
    operations = ScriptedOperations(endless=True)
    async with client_of(operations) as client:
        async with contextlib.aclosing(client.watch_job("job-1")) as events:
            await anext(events)
        await asyncio.wait_for(operations.left.wait(), 5)
        assert operations.cancelled_jobs == []


async def test_a_problem_arrives_with_all_it_says() -> None:
    told = Exhausted(Reason.QUEUE_FULL, "32 comparisons run; wait", field="left", allowed="0-32", item=4)
    async with client_of(ScriptedOperations(failure=told)) as client:
        problem = await refused(client.list_backends())
        assert (type(problem), problem.detail) == (Exhausted, told.detail)


async def test_a_problem_in_the_middle_of_a_stream_comes_after_what_was_told() -> None:
    told = Unavailable(Reason.UNREACHABLE, "gone")
    operations = ScriptedOperations(told=(FirstDivergence(0, 1, -1.0, -2.0),), failure=told)
    async with client_of(operations) as client:
        events = client.compare(PLAN)
        before = await anext(events)
        problem = await refused(anext(events))
        assert (before, type(problem)) == (FirstDivergence(0, 1, -1.0, -2.0), Unavailable)


async def test_a_bug_says_no_more_than_its_kind() -> None:
    async with client_of(ScriptedOperations(failure=KeyError("secret path"))) as client:
        problem = await refused(client.list_backends())
        assert (problem.reason, "secret" in str(problem), "KeyError" in str(problem)) == (Reason.BUG, False, True)


async def test_a_large_report_arrives_whole() -> None:
    large = outcome(reproduce="x" * (3 << 20))
    async with client_of(ScriptedOperations(told=(large,))) as client:
        (last,) = await read_all(client.compare(PLAN))
        assert last.report_text == large.report_text


async def test_a_large_run_arrives_whole() -> None:
    text = "y" * (5 << 20)
    async with client_of(ScriptedOperations(text=text)) as client:
        assert await client.get_run_text("run-1") == text


async def test_a_comparison_without_its_end_is_incomplete() -> None:
    async with client_of(ScriptedOperations(told=(FirstDivergence(0, 1, -1.0, -2.0),))) as client:
        problem = await refused(read_all(client.compare(PLAN)))
        assert (type(problem), problem.reason) == (Internal, Reason.INCOMPLETE_STREAM)


async def test_a_watch_that_breaks_off_says_from_where_to_watch_again() -> None:
    async with client_of(ScriptedOperations()) as client:
        problem = await refused(read_all(client.watch_job("job-1", 4)))
        assert problem.reason is Reason.INCOMPLETE_STREAM
        assert "after number 5" in str(problem)


async def test_the_deadline_of_the_caller_reaches_operations() -> None:
    operations = ScriptedOperations()
    async with client_of(operations) as client:
        deadline = time.monotonic() + 30
        await client.list_backends(deadline=deadline)
        seen = operations.callers[0].deadline
        assert seen is not None
        assert abs(seen - deadline) < 5


async def test_a_caller_without_a_deadline_has_none() -> None:
    operations = ScriptedOperations()
    async with client_of(operations) as client:
        await client.list_backends()
        assert operations.callers[0].deadline is None


async def test_a_deadline_that_passes_ends_the_call() -> None:
    async with client_of(ScriptedOperations(endless=True)) as client:
        problem = await refused(read_all(client.compare(PLAN, deadline=time.monotonic() + 0.3)))
        assert isinstance(problem, DeadlineExceeded)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text("# callers\nsesame\nother\n")
    return file


async def test_a_caller_without_a_token_is_refused(token_file: Path) -> None:
    async with client_of(ScriptedOperations(), token_file=token_file) as client:
        problem = await refused(client.list_backends())
        assert (type(problem), problem.reason) == (Unauthenticated, Reason.BAD_TOKEN)


async def test_a_stream_too_needs_a_token(token_file: Path) -> None:
    operations = ScriptedOperations()
    async with client_of(operations, token="wrong", token_file=token_file) as client:
        assert isinstance(await refused(read_all(client.compare(PLAN))), Unauthenticated)
        assert operations.callers == []


async def test_two_tokens_are_two_callers_and_neither_is_told(token_file: Path) -> None:
    operations = ScriptedOperations()
    for token in ("sesame", "other"):
        async with client_of(operations, token=token, token_file=token_file) as client:
            await client.list_backends()
    first, second = (caller.identity for caller in operations.callers)
    assert first != second
    assert "sesame" not in first


async def check_health(address: str) -> list[str]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        found = [await stub.Check(health_pb2.HealthCheckRequest(service=name)) for name in ("", *SERVICE_NAMES)]
    return [health_pb2.HealthCheckResponse.ServingStatus.Name(response.status) for response in found]


async def test_health_needs_no_token_and_says_serving_of_both_services(token_file: Path) -> None:
    async with open_faces(ScriptedOperations(), token_file=token_file) as opened:
        assert await check_health(opened.grpc) == ["SERVING"] * 3


async def test_a_coordinator_that_starts_is_not_serving() -> None:
    async with open_faces(ScriptedOperations(), ready=False) as opened:
        assert await check_health(opened.grpc) == ["NOT_SERVING"] * 3


async def test_a_coordinator_that_starts_refuses_calls() -> None:
    async with client_of(ScriptedOperations(), ready=False) as client:
        problem = await refused(client.list_backends())
        assert (type(problem), problem.reason) == (Unavailable, Reason.NOT_READY)


async def list_services(address: str) -> list[str]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = stub.ServerReflectionInfo(iter([request]))
        return [service.name async for reply in call for service in reply.list_services_response.service]


async def test_reflection_names_both_services() -> None:
    async with open_faces(ScriptedOperations()) as opened:
        assert set(SERVICE_NAMES) <= set(await list_services(opened.grpc))


async def test_bytes_that_are_no_message_are_refused_with_a_reason() -> None:
    async with open_faces(ScriptedOperations()) as opened, grpc.aio.insecure_channel(opened.grpc) as channel:
        call: Any = channel.unary_unary("/dualtrace.v1.LibraryService/ListBackends")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\xff\xff")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_unknown_field_is_refused() -> None:
    async with open_faces(ScriptedOperations()) as opened, grpc.aio.insecure_channel(opened.grpc) as channel:
        call: Any = channel.unary_unary("/dualtrace.v1.LibraryService/ListBackends")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\xfa\x3e\x01\x00")
        assert "UNKNOWN_FIELD" in str(caught.value.details())


async def test_calls_are_counted_by_method_and_code() -> None:
    async with open_faces(ScriptedOperations()) as opened:
        async with CoordinatorClient(Connection(opened.grpc)) as client:
            await client.list_backends()
        assert opened.metrics.calls.labels(method="ListBackends", code="OK")._value.get() == 1


def test_every_method_of_the_protos_is_served() -> None:
    assert len(METHODS) == 17


def test_what_the_protos_stream_is_streamed() -> None:
    streamed = {method.name for method in METHODS if method.streamed}
    assert streamed == {"Compare", "WatchJob", "GetRun", "GetComparison", "GetArtifact"}


# A server that is not ours, or is wrong


@contextlib.asynccontextmanager
async def answering(method: str, responses: Sequence[Any]) -> AsyncIterator[CoordinatorClient]:
    """A client of a server that answers one streamed method with these very messages."""

    async def answer(_request: Any, _context: Any) -> AsyncIterator[Any]:
        for response in responses:
            yield response

    server = grpc.aio.server()
    handler: Any = grpc.unary_stream_rpc_method_handler(
        answer, response_serializer=lambda message: message.SerializeToString()
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAMES[0], {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with CoordinatorClient(Connection(f"127.0.0.1:{port}")) as client:
            yield client
    finally:
        await server.stop(0)


DONE = compare_pb2.CompareDone(verdict=compare_pb2.VERDICT_PASS, report_digest="sha256:0")


async def test_a_hole_in_the_stream_is_noticed() -> None:
    async with answering("Compare", [compare_pb2.CompareResponse(sequence=1, done=DONE)]) as client:
        assert (await refused(read_all(client.compare(PLAN)))).reason is Reason.INCOMPLETE_STREAM


async def test_a_report_that_is_not_the_one_announced_is_refused() -> None:
    part = compare_pb2.CompareResponse(sequence=0, report_part=compare_pb2.ReportPart(json=b"{}"))
    async with answering("Compare", [part, compare_pb2.CompareResponse(sequence=1, done=DONE)]) as client:
        assert (await refused(read_all(client.compare(PLAN)))).reason is Reason.ARTIFACT_CORRUPT


async def test_a_hole_in_the_events_of_a_job_is_noticed() -> None:
    async with answering("WatchJob", [compare_pb2.WatchJobResponse(sequence=3)]) as client:
        assert (await refused(read_all(client.watch_job("job-1", 1)))).reason is Reason.INCOMPLETE_STREAM


async def test_a_coordinator_that_is_not_there_is_named() -> None:
    async with CoordinatorClient(Connection("127.0.0.1:1")) as client:
        problem = await refused(client.list_backends())
        assert isinstance(problem, Unavailable)
        assert "coordinator" in str(problem)


async def test_a_question_with_variants_never_leaves_the_client() -> None:
    async with CoordinatorClient(Connection("127.0.0.1:1")) as client:
        problem = await refused(read_all(client.compare(plan(question=rolling(5, variants=PLAIN * 2)))))
        assert isinstance(problem, InvalidArgument)


# Draining


async def test_a_running_comparison_may_end_while_the_coordinator_drains() -> None:
    operations = SlowOperations()
    async with open_faces(operations) as opened, CoordinatorClient(Connection(opened.grpc)) as client:
        events = client.compare(PLAN)
        await anext(events)
        draining = asyncio.create_task(opened.faces.drain(10))
        await asyncio.sleep(0.05)
        operations.go_on.set()
        rest = await read_all(events)
        await draining
        assert isinstance(rest[-1], ToldOutcome)


class SlowOperations(ScriptedOperations):
    """Tells its outcome when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = asyncio.Event()

    async def compare(self, caller: Any, plan: ComparePlan) -> Any:
        yield self.told[0]
        await self.go_on.wait()
        assert isinstance(self.told[1], CompareOutcome)
        yield self.told[1]


async def test_a_watch_ends_at_once_when_the_coordinator_drains() -> None:
    operations = ScriptedOperations(endless=True)
    async with open_faces(operations) as opened, CoordinatorClient(Connection(opened.grpc)) as client:
        events = client.watch_job("job-1")
        await anext(events)
        begun = time.monotonic()
        await opened.faces.drain(10)
        problem = await refused(read_all(events))
        assert (problem.reason, time.monotonic() - begun < 5) == (Reason.DRAINING, True)


async def test_a_comparison_that_does_not_end_in_time_is_cut() -> None:
    operations = ScriptedOperations(endless=True)
    async with open_faces(operations) as opened, CoordinatorClient(Connection(opened.grpc)) as client:
        events = client.compare(PLAN)
        await anext(events)
        await opened.faces.drain(0.1)
        await asyncio.wait_for(operations.left.wait(), 5)
        with contextlib.suppress(Problem):
            await events.aclose()
