"""What every method does alike: bytes that are no message are refused as such, an answer fits into a message."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import pytest

from coordinator.methods import METHODS, Method
from coordinator.sides import check_side
from coordinator.store import runs
from dualtrace.client import Connection
from dualtrace.coordinator_client import CoordinatorClient
from dualtrace.library import BenchmarkPlan, RunMode, RunPlan, SideSpec
from dualtrace.problems import InvalidArgument, NotFound, Reason
from dualtrace.questions.asked import Input, RollingQuestion
from dualtrace.v1 import library_pb2
from dualtrace.wire.compare import run_plan_from_pb, run_plan_to_pb
from dualtrace.wire.library import MAX_CASE_BYTES, case_to_pb, create_case_from_pb
from tests.support.desk import ANYONE, desk_of, rolling, twins
from tests.support.faces import client_of, open_faces
from tests.support.stored import make_case, make_record

SIDES: dict[str, Any] = {"left": SideSpec("backend:torch"), "right": SideSpec("backend:jax")}


async def answer_to_bytes(channel: Any, method: Method, body: bytes) -> str:
    """The code and the reason that these bytes are answered with."""
    try:
        if method.unary:
            await channel.unary_unary(method.path)(body)
        else:
            async for _ in channel.unary_stream(method.path)(body):
                pass
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name} {str(error.details()).partition(':')[0]}"
    return "OK"


async def test_bytes_that_are_no_message_are_malformed_in_every_method(tmp_path: Path) -> None:
    async with (
        desk_of(tmp_path, twins()) as desk,
        open_faces(desk.operations) as opened,
        grpc.aio.insecure_channel(opened.grpc) as channel,
    ):
        told = {method.name: await answer_to_bytes(channel, method, b"\xff\xff\xff") for method in METHODS}
    assert told == {method.name: "INVALID_ARGUMENT MALFORMED" for method in METHODS}


# Cases


async def test_large_cases_are_listed_over_several_pages(tmp_path: Path) -> None:
    async with desk_of(tmp_path, twins()) as desk, client_of(desk.operations) as client:
        question = RollingQuestion((Input(text="x" * 1_500_000),))
        for number in range(4):
            await client.create_case(make_case(name=f"c{number}", question=question, **SIDES))
        found, token, pages = [], "", 0
        while token or not pages:
            page = await client.list_cases(page_token=token)
            found += [case.name for case in page.entries]
            token, pages = page.next_page_token, pages + 1
        assert (found, pages > 1) == (["c0", "c1", "c2", "c3"], True)


def test_a_case_that_would_not_fit_into_an_answer_is_refused() -> None:
    request = library_pb2.CreateCaseRequest(saved_case=case_to_pb(make_case(question=rolling(1), **SIDES)))
    request.saved_case.ask.rolling.inputs[0].ids.ids.extend([1] * MAX_CASE_BYTES)  # a byte each
    with pytest.raises(InvalidArgument) as caught:
        create_case_from_pb(request)
    assert (caught.value.reason, caught.value.detail.field) == (Reason.TOO_MANY, "saved_case")


# Benchmarks


def test_the_wire_takes_as_many_repeats_as_a_coordinator_may_allow() -> None:
    asked = BenchmarkPlan(repeats=2_000_000, warm_up=150_000)
    plan = RunPlan(rolling(3), SideSpec("backend:torch"), RunMode.BENCHMARK, benchmark=asked)
    assert run_plan_from_pb(run_plan_to_pb(plan), "run").benchmark == asked


async def test_more_repeats_than_the_coordinator_allows_are_refused_with_its_own_number(tmp_path: Path) -> None:
    async with (
        desk_of(tmp_path, twins(), max_benchmark_calls=50) as desk,
        open_faces(desk.operations) as opened,
        CoordinatorClient(Connection(opened.grpc)) as client,
    ):
        asked = BenchmarkPlan(repeats=51)
        plan = RunPlan(rolling(3), SideSpec("backend:torch"), RunMode.BENCHMARK, benchmark=asked)
        with pytest.raises(InvalidArgument) as caught:
            await client.start_job("many", plan)
        assert caught.value.detail.allowed == "1-50"


# What is left early, and what is not read at all


async def test_an_artifact_that_is_left_in_the_middle_lets_its_file_go_at_once(tmp_path: Path) -> None:
    async with desk_of(tmp_path, twins()) as desk:
        digest = await desk.store.artifacts.put(b"x" * (1 << 20))
        closed: list[str] = []
        parts = desk.store.artifacts.read(digest)

        async def told(_digest: str) -> AsyncIterator[bytes]:
            try:
                async with aclosing(parts):
                    async for part in parts:
                        yield part
            finally:
                closed.append(_digest)

        with mock.patch.object(desk.store.artifacts, "read", told):
            async with aclosing(desk.operations.read_artifact(ANYONE, digest)) as read:
                await anext(read)
            assert closed == [digest]


async def test_a_job_on_a_stored_run_does_not_read_the_run_to_know_that_it_is_there(tmp_path: Path) -> None:
    async with desk_of(tmp_path, twins()) as desk:
        record = make_record()
        await desk.store.add_run(record)
        with mock.patch.object(runs, "read_text", side_effect=AssertionError("read")):
            await check_side(desk.book, desk.store, SideSpec(f"run:{record.run_id}"), "left")


async def test_a_job_on_a_run_that_is_not_there_is_refused(tmp_path: Path) -> None:
    async with desk_of(tmp_path, twins()) as desk:
        with pytest.raises(NotFound) as caught:
            await check_side(desk.book, desk.store, SideSpec("run:run-0"), "left")
        assert caught.value.detail.field == "run_id"
