"""What a stranger's page, a slow caller or a large request can do to the HTTP face: little, and not to the others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from google.protobuf import json_format

from coordinator import connections
from coordinator.http_api import MAX_JSON_BYTES
from dualtrace.library import ComparePlan, SideSpec
from dualtrace.v1 import compare_pb2
from dualtrace.wire.compare import compare_plan_to_pb
from tests.support.desk import rolling, wait_until
from tests.support.faces import OpenFaces, Reply, ScriptedOperations, Slow, call_http, enveloped, open_faces, outcome

LIST = "/dualtrace.v1.LibraryService/ListBackends"
COMPARE = "/dualtrace.v1.CompareService/Compare"
PLAN = ComparePlan(rolling(20), SideSpec("backend:torch"), SideSpec("backend:jax"))
ASKED = enveloped(compare_plan_to_pb(PLAN).SerializeToString())
ERRORS = "uvicorn.error"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text("sesame\n")
    return file


# Names and pages


async def ask_as(opened: OpenFaces, path: str = LIST, **headers: str) -> Reply:
    if path != LIST:
        return await call_http(opened.http, path, None, method="GET", **headers)
    return await call_http(opened.http, path, b"{}", **headers)


async def test_a_name_that_a_stranger_could_point_here_is_refused() -> None:
    async with open_faces(ScriptedOperations()) as opened:
        reply = await ask_as(opened, host="evil.example", origin="http://evil.example")
        assert (reply.status, "http_names" in reply.json["message"]) == (403, True)


@pytest.mark.parametrize("host", ["evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "evil", ""])
async def test_no_other_name_passes_for_a_local_one(host: str) -> None:
    async with open_faces(ScriptedOperations()) as opened:
        assert (await ask_as(opened, host=host)).status == 403


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8080", "localhost.", "desk.localhost", "127.0.0.1:1", "10.1.2.3", "[::1]:80", "::1"],
)
async def test_names_and_numbers_that_nobody_can_point_elsewhere_are_let_in(host: str) -> None:
    async with open_faces(ScriptedOperations()) as opened:
        assert (await ask_as(opened, host=host)).status == 200


@pytest.mark.parametrize("host", ["coordinator", "desk.example:8080"])
async def test_a_listed_name_is_let_in(host: str) -> None:
    async with open_faces(ScriptedOperations(), http_names="coordinator, desk.example") as opened:
        assert (await ask_as(opened, host=host)).status == 200


async def test_where_a_token_is_asked_for_every_name_is_let_in(token_file: Path) -> None:
    async with open_faces(ScriptedOperations(), token_file=token_file) as opened:
        assert (await ask_as(opened, host="desk.example", authorization="Bearer sesame")).status == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
async def test_probes_may_use_any_name(path: str) -> None:
    async with open_faces(ScriptedOperations()) as opened:
        assert (await ask_as(opened, path, host="pod-17.cluster")).status == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "http://localhost:9999", "null", "http://[", "file://"])
async def test_a_page_of_another_origin_is_refused(origin: str) -> None:
    async with open_faces(ScriptedOperations()) as opened:
        assert (await ask_as(opened, host="localhost:8080", origin=origin)).status == 403


async def test_a_page_of_another_port_of_this_machine_is_refused() -> None:
    async with open_faces(ScriptedOperations()) as opened:
        assert (await ask_as(opened, host="127.0.0.1:8080", origin="http://127.0.0.1:9999")).status == 403


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:8080", "http://localhost:8080"),
        ("localhost", "https://localhost"),
        ("127.0.0.1:80", "http://127.0.0.1"),
        ("127.0.0.1:8080", "https://desk.example"),  # through a proxy that names us in its own way
    ],
)
async def test_a_page_of_the_same_origin_or_of_a_listed_one_may_ask(host: str, origin: str) -> None:
    async with open_faces(ScriptedOperations(), http_names="desk.example") as opened:
        assert (await ask_as(opened, host=host, origin=origin)).status == 200


# Large requests


async def test_while_a_large_request_is_read_others_are_answered() -> None:
    may_read = threading.Event()
    parse = json_format.Parse

    def wait_and_parse(data: bytes, message: Any) -> Any:
        if len(data) > 10_000:
            may_read.wait(10)
        return parse(data, message)

    large = json.dumps({"pageToken": "x" * 20_000}).encode()
    async with open_faces(ScriptedOperations()) as opened:
        with mock.patch.object(json_format, "Parse", wait_and_parse):
            waiting = asyncio.create_task(call_http(opened.http, LIST.replace("Backends", "Comparisons"), large))
            answered = (await call_http(opened.http, LIST)).status
            was_waiting = not waiting.done()
            may_read.set()
            assert ((await waiting).status, answered, was_waiting) == (400, 200, True)


async def test_more_json_than_is_read_is_refused_with_the_way_out() -> None:
    async with open_faces(ScriptedOperations()) as opened:
        reply = await call_http(opened.http, LIST, b" " * (MAX_JSON_BYTES + 1))
        assert (reply.json["code"], "application/proto" in reply.json["message"]) == ("resource_exhausted", True)


async def test_more_json_than_is_read_is_refused_in_a_stream_too() -> None:
    async with open_faces(ScriptedOperations()) as opened:
        body = enveloped(b" " * (MAX_JSON_BYTES + 1))
        reply = await call_http(opened.http, COMPARE, body, content_type="application/connect+json")
        assert reply.frames[-1]["error"]["code"] == "resource_exhausted"


async def test_the_binary_form_may_be_larger_than_json() -> None:
    request = compare_pb2.CancelJobRequest(job_id="x" * 2 * MAX_JSON_BYTES).SerializeToString()
    async with open_faces(ScriptedOperations()) as opened:
        path = "/dualtrace.v1.CompareService/CancelJob"
        reply = await call_http(opened.http, path, request, content_type="application/proto")
        assert reply.json["code"] == "invalid_argument"  # it was read: no id is so long


# Connections that say nothing


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEAD_SECONDS", "BODY_SECONDS", "CLOSE_SECONDS"):
        monkeypatch.setattr(connections, name, 0.3)


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def connected(opened: OpenFaces, *, limit: int = 1 << 16) -> AsyncIterator[Streams]:
    host, _, port = opened.http.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=limit)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def is_closed(reader: asyncio.StreamReader, seconds: float = 3.0) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await reader.read()
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


HEAD = f"POST {LIST} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n".encode()

SAID = {
    "nothing": b"",
    "half a head": b"POST /x HTTP/1.1\r\nhost:",
    "half a body": HEAD + b"content-length: 100\r\n\r\n{",
    "half a body where nothing is": b"POST /x HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{",
    "a call, and half a head": HEAD + b"content-length: 2\r\n\r\n{}" + b"POST /x",
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("said", SAID)
async def test_a_connection_that_falls_silent_is_closed(said: str) -> None:
    async with open_faces(ScriptedOperations()) as opened, connected(opened) as (reader, writer):
        writer.write(SAID[said])
        assert await is_closed(reader)


@pytest.mark.usefixtures("impatient")
async def test_a_head_that_comes_byte_by_byte_winds_nothing_up() -> None:
    async with open_faces(ScriptedOperations()) as opened, connected(opened) as (reader, writer):

        async def trickle() -> None:
            for byte in HEAD:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.05)

        trickling = asyncio.create_task(trickle())
        assert await is_closed(reader)
        trickling.cancel()


@pytest.mark.usefixtures("impatient")
async def test_a_call_that_takes_long_is_not_closed() -> None:
    """Only the caller's own silence counts, not ours."""
    operations = ScriptedOperations(told=(outcome(),), endless=True)
    async with open_faces(operations) as opened, connected(opened) as (reader, writer):
        await write_compare(writer)
        assert await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(1)
        assert not operations.left.is_set()


@pytest.mark.usefixtures("impatient")
async def test_a_connection_may_be_used_again() -> None:
    async with open_faces(ScriptedOperations()) as opened, connected(opened) as (reader, writer):
        for _ in range(4):
            writer.write(HEAD + b"content-length: 2\r\n\r\n{}")
            assert b" 200 " in await reader.read(1 << 16)
            await asyncio.sleep(0.15)


# Callers who do not read


class Endless(ScriptedOperations):
    """A comparison that never runs out of things to tell."""

    async def compare(self, caller: Any, plan: ComparePlan) -> Any:
        self.callers.append(caller)
        with self._noting_a_leaver():
            while True:
                yield outcome(reproduce="x" * (1 << 20))


async def write_compare(writer: asyncio.StreamWriter, *headers: bytes) -> None:
    head = [f"POST {COMPARE} HTTP/1.1".encode(), b"host: localhost", b"content-type: application/connect+proto",
            *headers, f"content-length: {len(ASKED)}".encode()]  # fmt: skip
    writer.write(b"\r\n".join(head) + b"\r\n\r\n" + ASKED)
    await writer.drain()


SHORT: dict[str, Any] = {"call_seconds": 0.3, "max_call_seconds": 0.3}


async def test_a_caller_who_does_not_read_is_left_when_the_time_of_a_call_is_over() -> None:
    operations = Endless()
    async with open_faces(operations, **SHORT) as opened, connected(opened, limit=1024) as (_, writer):
        await write_compare(writer)
        await asyncio.wait_for(operations.left.wait(), 5)


async def test_a_long_deadline_of_a_caller_who_does_not_read_is_cut() -> None:
    operations = Endless()
    async with open_faces(operations, **SHORT) as opened, connected(opened, limit=1024) as (_, writer):
        await write_compare(writer, b"connect-timeout-ms: 60000")
        await asyncio.wait_for(operations.left.wait(), 5)


def open_connections(opened: OpenFaces) -> int:
    face: Any = opened.faces._http
    return len(face._server.server_state.connections)


async def test_the_connection_of_a_caller_who_does_not_read_is_ended(caplog: pytest.LogCaptureFixture) -> None:
    async with open_faces(Endless(), **SHORT) as opened, connected(opened, limit=1024) as (_, writer):
        await write_compare(writer)
        await wait_until(lambda: open_connections(opened) == 1)
        await wait_until(lambda: open_connections(opened) == 0)
    assert not find_errors(caplog)


def find_errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What would be taken for a bug of ours."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_caller_who_reads_is_told_that_the_time_of_a_call_is_over() -> None:
    async with open_faces(Slow(), **SHORT) as opened:
        body = enveloped(compare_plan_to_json())
        reply = await call_http(opened.http, COMPARE, body, content_type="application/connect+json")
        assert reply.frames[-1]["error"]["code"] == "deadline_exceeded"


def compare_plan_to_json() -> bytes:
    question = {"rolling": {"inputs": [{"ids": {"ids": [1, 2, 3]}}]}}
    return json.dumps({"ask": question, "left": {"backend": "torch"}, "right": {"backend": "jax"}}).encode()


async def test_a_deadline_that_is_no_number_is_refused() -> None:
    async with open_faces(ScriptedOperations()) as opened:
        reply = await call_http(opened.http, LIST, connect_timeout_ms="soon")
        assert (reply.status, "soon" in reply.json["message"]) == (400, True)


async def test_a_caller_who_names_no_deadline_still_has_none_of_its_own() -> None:
    operations = ScriptedOperations()
    async with open_faces(operations) as opened:
        await call_http(opened.http, LIST)
        assert operations.callers[0].deadline is None


async def test_a_caller_who_stalls_and_then_goes_is_no_failure_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    operations = Endless()
    async with open_faces(operations) as opened:
        async with connected(opened, limit=1024) as (_, writer):
            await write_compare(writer)
            await asyncio.sleep(0.5)  # until all buffers are full
        await asyncio.wait_for(operations.left.wait(), 5)
        await wait_until(lambda: open_connections(opened) == 0)
    assert not find_errors(caplog)


async def test_a_caller_who_does_not_read_does_not_hold_up_the_end_of_the_coordinator(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with open_faces(Endless()) as opened, connected(opened, limit=1024) as (_, writer):
        await write_compare(writer)
        await asyncio.sleep(0.5)
        async with asyncio.timeout(5):
            await opened.faces.drain(0)
    assert not find_errors(caplog)


async def test_a_caller_who_reads_is_told_that_the_coordinator_ends() -> None:
    operations = ScriptedOperations(endless=True)
    async with open_faces(operations) as opened:
        body = enveloped(compare_plan_to_json())
        asking = asyncio.create_task(call_http(opened.http, COMPARE, body, content_type="application/connect+json"))
        await wait_until(lambda: operations.callers)
        await asyncio.sleep(0.1)
        await opened.faces.drain(0.1)
        assert (await asking).frames[-1]["error"]["code"] == "canceled"


@pytest.mark.usefixtures("impatient")
async def test_an_answer_that_nobody_takes_does_not_keep_its_connection() -> None:
    class Large(ScriptedOperations):
        async def list_comparisons(self, caller: Any, **asked: Any) -> Any:
            return mock.Mock(entries=(), next_page_token="x" * (32 << 20))

    async with open_faces(Large()) as opened, connected(opened, limit=1024) as (_, writer):
        body = b"{}"
        path = LIST.replace("Backends", "Comparisons")
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
        writer.write(head.encode() + b"content-length: 2\r\n\r\n" + body)
        await wait_until(lambda: open_connections(opened) == 1)
        await wait_until(lambda: open_connections(opened) == 0)
