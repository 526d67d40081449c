"""The HTTP face, called as curl and a browser call it: JSON and binary, streams, the same errors, tokens and limits."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import struct
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from coordinator.http_api import MAX_BODY_BYTES
from dualtrace.client import Connection
from dualtrace.coordinator_client import CoordinatorClient
from dualtrace.problems import Exhausted, Problem, Reason, Unavailable
from dualtrace.v1 import library_pb2, problem_pb2
from dualtrace.wire.problem import from_pb
from tests.support.desk import desk_of, twins
from tests.support.faces import ScriptedOperations, call_http, enveloped, open_faces, outcome

LIBRARY, COMPARE = "/dualtrace.v1.LibraryService", "/dualtrace.v1.CompareService"
QUESTION = {"rolling": {"inputs": [{"ids": {"ids": list(range(40))}}]}}
ASKED = json.dumps({"ask": QUESTION, "left": {"backend": "torch"}, "right": {"backend": "jax"}}).encode()
STREAM = {"content_type": "application/connect+json"}


def problem_in(error: Any) -> Problem:
    """The Problem among a Connect error's details."""
    (detail,) = [one for one in error["details"] if one["type"] == "dualtrace.v1.Problem"]
    return from_pb(problem_pb2.Problem.FromString(base64.b64decode(detail["value"] + "==")))


async def compare_by_http(address: str, **headers: str) -> list[Any]:
    reply = await call_http(address, f"{COMPARE}/Compare", enveloped(ASKED), **STREAM, **headers)
    assert reply.status == 200, reply.body
    return reply.frames


# Answers


async def test_a_unary_call_answers_in_json() -> None:
    async with open_faces(ScriptedOperations()) as opened:
        reply = await call_http(opened.http, f"{LIBRARY}/ListBackends")
        assert (reply.status, reply.json) == (200, {"backends": [{"name": "torch"}]})


async def test_a_unary_call_answers_in_the_binary_form() -> None:
    async with open_faces(ScriptedOperations()) as opened:
        reply = await call_http(opened.http, f"{LIBRARY}/ListBackends", b"", content_type="application/proto")
        assert library_pb2.ListBackendsResponse.FromString(reply.body).backends[0].name == "torch"


async def test_a_compressed_request_is_read() -> None:
    async with open_faces(ScriptedOperations()) as opened:
        packed = gzip.compress(b"{}")
        reply = await call_http(opened.http, f"{LIBRARY}/ListBackends", packed, content_encoding="gzip")
        assert reply.status == 200


async def test_a_comparison_streams_in_json_up_to_done(tmp_path: Path) -> None:
    async with desk_of(tmp_path, twins()) as desk, open_faces(desk.operations) as opened:
        *told, end = await compare_by_http(opened.http)
        assert ("header" in told[0], told[-1]["done"]["verdict"], end) == (True, "VERDICT_PASS", {})


async def test_the_messages_of_a_stream_are_numbered_without_gaps(tmp_path: Path) -> None:
    async with desk_of(tmp_path, twins()) as desk, open_faces(desk.operations) as opened:
        *told, _end = await compare_by_http(opened.http)
        assert [int(message.get("sequence", 0)) for message in told] == list(range(len(told)))


async def test_both_faces_show_the_same_report(tmp_path: Path) -> None:
    async with desk_of(tmp_path, twins()) as desk, open_faces(desk.operations) as opened:
        *told, _end = await compare_by_http(opened.http)
        parts = [base64.b64decode(message["reportPart"]["json"]) for message in told if "reportPart" in message]
        async with CoordinatorClient(Connection(opened.grpc)) as client:
            by_grpc = await client.get_comparison_text(told[-1]["done"]["comparisonId"])
        assert b"".join(parts).decode() == by_grpc


async def test_a_large_report_comes_in_parts() -> None:
    async with open_faces(ScriptedOperations(told=(outcome(reproduce="x" * (3 << 20)),))) as opened:
        told = await compare_by_http(opened.http)
        assert sum("reportPart" in message for message in told) == 4


# Errors


async def test_an_error_carries_the_very_problem() -> None:
    told = Exhausted(Reason.QUEUE_FULL, "32 comparisons run; wait", field="left", allowed="0-32", item=4)
    async with open_faces(ScriptedOperations(failure=told)) as opened:
        reply = await call_http(opened.http, f"{LIBRARY}/ListBackends")
        assert (reply.status, reply.json["code"]) == (429, "resource_exhausted")
        assert problem_in(reply.json).detail == told.detail


async def test_an_error_reads_the_same_on_both_faces() -> None:
    failing = ScriptedOperations(failure=Unavailable(Reason.UNREACHABLE, "gone", field="left"))
    async with open_faces(failing) as opened, grpc.aio.insecure_channel(opened.grpc) as channel:
        reply = await call_http(opened.http, f"{LIBRARY}/ListBackends")
        call: Any = channel.unary_unary(f"{LIBRARY}/ListBackends")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"")
        assert reply.json["message"] == caught.value.details()


async def test_an_error_in_a_stream_stands_in_its_end() -> None:
    failing = ScriptedOperations(told=(), failure=Unavailable(Reason.UNREACHABLE, "gone"))
    async with open_faces(failing) as opened:
        (end,) = await compare_by_http(opened.http)
        assert problem_in(end["error"]).reason is Reason.UNREACHABLE


async def test_a_bug_says_no_more_than_its_kind() -> None:
    async with open_faces(ScriptedOperations(failure=KeyError("secret path"))) as opened:
        reply = await call_http(opened.http, f"{LIBRARY}/ListBackends")
        assert (reply.status, b"secret" in reply.body, b"KeyError" in reply.body) == (500, False, True)


REFUSED = {
    "an unknown name": (b'{"x": 1}', Reason.UNKNOWN_FIELD),
    "no JSON": (b"{", Reason.MALFORMED),
    "no UTF-8": (b'{"pageToken": "\xff"}', Reason.MALFORMED),
    "half a character": (b'{"pageToken": "\\ud800"}', Reason.MALFORMED),
    "JSON that nests without end": (b"[" * 100_000, Reason.MALFORMED),
    "a number too large": (b'{"pageSize": 99999999999}', Reason.MALFORMED),
    "an enum value that is not known": (b'{"verdict": "VERDICT_MAYBE"}', Reason.UNKNOWN_ENUM_VALUE),
    "an enum number that is not known": (b'{"verdict": 77}', Reason.UNKNOWN_ENUM_VALUE),
    "a page that is too large": (b'{"pageSize": 1001}', Reason.OUT_OF_RANGE),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_json_request_is_refused_with_its_reason(name: str) -> None:
    body, reason = REFUSED[name]
    async with open_faces(ScriptedOperations()) as opened:
        reply = await call_http(opened.http, f"{LIBRARY}/ListComparisons", body)
        assert (reply.status, problem_in(reply.json).reason) == (400, reason)


async def test_an_unknown_field_of_a_binary_request_is_refused() -> None:
    async with open_faces(ScriptedOperations()) as opened:
        body = b"\xfa\x3e\x01\x00"
        reply = await call_http(opened.http, f"{LIBRARY}/ListBackends", body, content_type="application/proto")
        assert problem_in(reply.json).reason is Reason.UNKNOWN_FIELD


async def test_bytes_that_are_no_message_are_refused() -> None:
    async with open_faces(ScriptedOperations()) as opened:
        reply = await call_http(opened.http, f"{LIBRARY}/ListBackends", b"\xff\xff", content_type="application/proto")
        assert problem_in(reply.json).reason is Reason.MALFORMED


async def test_a_body_above_the_limit_is_refused() -> None:
    async with open_faces(ScriptedOperations()) as opened:
        reply = await call_http(opened.http, f"{LIBRARY}/ListBackends", b" " * (MAX_BODY_BYTES + 1))
        assert reply.json["code"] == "resource_exhausted"


async def test_a_body_that_is_above_the_limit_when_unpacked_is_refused() -> None:
    async with open_faces(ScriptedOperations()) as opened:
        packed = gzip.compress(b" " * (MAX_BODY_BYTES * 8))
        reply = await call_http(opened.http, f"{LIBRARY}/ListBackends", packed, content_encoding="gzip")
        assert reply.json["code"] == "resource_exhausted"


async def test_a_stream_that_announces_too_much_is_refused() -> None:
    async with open_faces(ScriptedOperations()) as opened:
        body = struct.pack(">BI", 0, MAX_BODY_BYTES + 1)
        reply = await call_http(opened.http, f"{COMPARE}/Compare", body, **STREAM)
        assert reply.frames[-1]["error"]["code"] == "resource_exhausted"


# Callers


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text("sesame\n")
    return file


async def test_a_caller_without_a_token_is_refused(token_file: Path) -> None:
    async with open_faces(ScriptedOperations(), token_file=token_file) as opened:
        reply = await call_http(opened.http, f"{LIBRARY}/ListBackends")
        assert (reply.status, problem_in(reply.json).reason) == (401, Reason.BAD_TOKEN)


async def test_a_token_is_asked_for_before_the_body_is_looked_at(token_file: Path) -> None:
    async with open_faces(ScriptedOperations(), token_file=token_file) as opened:
        reply = await call_http(opened.http, f"{LIBRARY}/ListBackends", b"{")
        assert reply.status == 401


async def test_a_stream_without_a_token_is_refused(token_file: Path) -> None:
    operations = ScriptedOperations()
    async with open_faces(operations, token_file=token_file) as opened:
        (end,) = await compare_by_http(opened.http)
        assert (end["error"]["code"], operations.callers) == ("unauthenticated", [])


async def test_a_caller_is_the_same_on_both_faces(token_file: Path) -> None:
    operations = ScriptedOperations()
    async with open_faces(operations, token_file=token_file) as opened:
        await call_http(opened.http, f"{LIBRARY}/ListBackends", authorization="Bearer sesame")
        async with CoordinatorClient(Connection(opened.grpc, token="sesame")) as client:
            await client.list_backends()
    by_http, by_grpc = operations.callers
    assert by_http == by_grpc


async def test_the_deadline_of_the_caller_reaches_operations() -> None:
    operations = ScriptedOperations()
    async with open_faces(operations) as opened:
        await call_http(opened.http, f"{LIBRARY}/ListBackends", connect_timeout_ms="30000")
        seen = operations.callers[0].deadline
        assert seen is not None
        assert 20 < seen - time.monotonic() <= 30


async def test_a_deadline_that_passes_ends_the_stream() -> None:
    operations = ScriptedOperations(endless=True)
    async with open_faces(operations) as opened:
        *_told, end = await compare_by_http(opened.http, connect_timeout_ms="300")
        assert (end["error"]["code"], operations.left.is_set()) == ("deadline_exceeded", True)


async def drop_after_first_bytes(address: str, path: str, body: bytes) -> None:
    """Ask, read the beginning of the answer, and leave."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {STREAM['content_type']}\r\n"
    writer.write(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
    assert await reader.read(200)
    writer.close()
    await writer.wait_closed()


async def test_dropping_a_comparison_cancels_it() -> None:
    operations = ScriptedOperations(endless=True)
    async with open_faces(operations) as opened:
        await drop_after_first_bytes(opened.http, f"{COMPARE}/Compare", enveloped(ASKED))
        await asyncio.wait_for(operations.left.wait(), 5)


async def test_dropping_a_watch_cancels_no_job() -> None:
    operations = ScriptedOperations(endless=True)
    async with open_faces(operations) as opened:
        await drop_after_first_bytes(opened.http, f"{COMPARE}/WatchJob", enveloped(b'{"jobId": "job-1"}'))
        await asyncio.wait_for(operations.left.wait(), 5)
        assert operations.cancelled_jobs == []


# What a browser and a probe see


async def test_no_other_origin_is_let_in() -> None:
    async with open_faces(ScriptedOperations()) as opened:
        reply = await call_http(
            opened.http, f"{LIBRARY}/ListBackends", None, method="OPTIONS", origin="http://elsewhere"
        )
        assert reply.status == 403
        assert not [name for name in reply.headers if name.startswith("access-control")]


async def test_a_link_cannot_call_a_method() -> None:
    async with open_faces(ScriptedOperations()) as opened:
        path = f"{LIBRARY}/ListBackends?encoding=json&message=%7B%7D"
        assert (await call_http(opened.http, path, None, method="GET")).status == 405


async def test_a_form_cannot_call_a_method() -> None:
    async with open_faces(ScriptedOperations()) as opened:
        assert (await call_http(opened.http, f"{LIBRARY}/ListBackends", content_type="text/plain")).status == 415


async def test_grpc_is_told_where_to_go() -> None:
    async with open_faces(ScriptedOperations()) as opened:
        reply = await call_http(opened.http, f"{LIBRARY}/ListBackends", content_type="application/grpc+proto")
        assert (reply.status, "port" in reply.json["message"]) == (415, True)


async def test_an_unknown_path_is_not_found() -> None:
    async with open_faces(ScriptedOperations()) as opened:
        assert (await call_http(opened.http, "/dualtrace.v1.LibraryService/Nothing")).status == 404


async def test_health_and_readiness_need_no_token(token_file: Path) -> None:
    async with open_faces(ScriptedOperations(), token_file=token_file) as opened:
        replies = [await call_http(opened.http, path, None, method="GET") for path in ("/healthz", "/readyz")]
        assert [reply.status for reply in replies] == [200, 200]


async def test_a_coordinator_that_starts_lives_but_is_not_ready() -> None:
    async with open_faces(ScriptedOperations(), ready=False) as opened:
        replies = [await call_http(opened.http, path, None, method="GET") for path in ("/healthz", "/readyz")]
        assert [reply.status for reply in replies] == [200, 503]


async def test_metrics_count_the_calls_of_this_face() -> None:
    async with open_faces(ScriptedOperations()) as opened:
        await call_http(opened.http, f"{LIBRARY}/ListBackends")
        reply = await call_http(opened.http, "/metrics", None, method="GET")
        assert b'dualtrace_calls_total{code="OK",method="ListBackends"} 1.0' in reply.body


async def test_metrics_cannot_be_posted_to() -> None:
    async with open_faces(ScriptedOperations()) as opened:
        assert (await call_http(opened.http, "/metrics")).status == 405


async def test_a_second_http_face_on_a_port_is_refused_by_name() -> None:
    async with open_faces(ScriptedOperations()) as opened:
        port = int(opened.http.rpartition(":")[2])
        with pytest.raises(Unavailable) as caught:
            async with open_faces(ScriptedOperations(), http_port=port):
                pass
        assert caught.value.detail.field == "http_port"


async def test_a_stored_case_can_be_written_in_json(tmp_path: Path) -> None:
    async with desk_of(tmp_path, twins()) as desk, open_faces(desk.operations) as opened:
        case = {"name": "first", **json.loads(ASKED), "tags": ["smoke"]}
        body = json.dumps({"savedCase": case}).encode()
        assert (await call_http(opened.http, f"{LIBRARY}/CreateCase", body)).status == 200
        listed = await call_http(opened.http, f"{LIBRARY}/ListCases", b'{"tag": "smoke"}')
        assert [entry["name"] for entry in listed.json["cases"]] == ["first"]


async def test_an_unknown_backend_is_told_in_the_stream(tmp_path: Path) -> None:
    async with desk_of(tmp_path, twins()) as desk, open_faces(desk.operations) as opened:
        body = ASKED.replace(b"torch", b"nobody")
        reply = await call_http(opened.http, f"{COMPARE}/Compare", enveloped(body), **STREAM)
        assert reply.frames[-1]["error"]["code"] == "not_found"
