"""The service over a real socket: what a client sees, and what the server does when the client misbehaves."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message

from dualtrace.client import BlockingClient, Client, Connection
from dualtrace.engine import int_array
from dualtrace.fake import FakeEngine, FakeSpec
from dualtrace.problems import (
    Cancelled,
    DeadlineExceeded,
    Exhausted,
    InvalidArgument,
    Problem,
    Reason,
    Unavailable,
    Unsupported,
)
from dualtrace.questions.answers import (
    AnswerHeader,
    AnswerSummary,
    ItemDone,
    ItemProblem,
    NextTokens,
    TokenChunk,
)
from dualtrace.questions.asked import (
    Input,
    LogprobQuestion,
    NextTokenQuestion,
    RollingQuestion,
    ScoreQuestion,
    TokenizeQuestion,
)
from dualtrace.scheduler import SchedulerLimits
from dualtrace.v1 import mask_pb2, scoring_pb2, scoring_pb2_grpc, token_pb2
from tests.support.scorers import all_events, connected, fake_scorer, logprob_text, only, rolling_ids, served


async def test_an_answer_over_the_wire_is_the_answer_in_process() -> None:
    question = logprob_text("Two and two are", " four", " five 🙂", top_k=3)
    local = fake_scorer()
    here = await all_events(local, question)
    await local.close()
    async with connected(fake_scorer()) as client:
        there = await all_events(client, question)
    assert [type(event) for event in there] == [type(event) for event in here]
    for mine, theirs in zip(only(here, TokenChunk), only(there, TokenChunk), strict=True):
        assert np.array_equal(mine.logprobs, theirs.logprobs)
        assert np.array_equal(mine.ranks, theirs.ranks)
        assert np.array_equal(mine.tokens.ids, theirs.tokens.ids)
        assert mine.tokens.pieces == theirs.tokens.pieces
        assert mine.top_ids is not None
        assert theirs.top_ids is not None
        assert np.array_equal(mine.top_ids, theirs.top_ids)
    assert only(here, ItemDone) == only(there, ItemDone)
    header = only(there, AnswerHeader)[0]
    assert header.provenance == only(here, AnswerHeader)[0].provenance


async def test_every_unary_question_is_answered_over_the_wire() -> None:
    async with connected(fake_scorer()) as client:
        tokens = (await client.tokenize(TokenizeQuestion((Input(text="naïve 🙂"),)))).results[0]
        assert not isinstance(tokens, Problem)
        assert b"".join(tokens.pieces).decode() == "naïve 🙂"
        score = await client.score(
            ScoreQuestion(Input(text="q "), (Input(text="a"),), labels=(1, 2), apply_softmax=True)
        )
        assert sum(score.results[0].scores) == pytest.approx(1.0)
        after = (await client.next_token(NextTokenQuestion((Input(text="abc"),), top_k=2))).results[0].outcome
        assert isinstance(after, NextTokens)
        assert len(after.top_pieces) == 2
        assert (await client.preflight()).results[0].ok
        assert (await client.describe()).provenance.synthetic


async def test_a_refusal_keeps_its_reason_field_and_range_over_the_wire() -> None:
    async with connected(fake_scorer()) as client:
        with pytest.raises(InvalidArgument) as caught:
            await all_events(client, rolling_ids(10, top_k=10_000))
    assert caught.value.reason == Reason.OUT_OF_RANGE
    assert caught.value.detail.field == "top_k"
    assert caught.value.detail.allowed.startswith("0-")


async def test_one_bad_item_does_not_spoil_the_others_over_the_wire() -> None:
    async with connected(fake_scorer()) as client:
        events = await all_events(client, logprob_text("a", " b", "", " c"))
    problems = only(events, ItemProblem)
    assert [(event.item, event.problem.reason) for event in problems] == [(1, Reason.EMPTY_COMPLETION)]
    assert problems[0].problem.detail.item == 1
    assert sorted(event.item for event in only(events, ItemDone)) == [0, 2]
    assert only(events, AnswerSummary)[0].failed == 1


async def test_status_details_speak_to_clients_that_only_know_google_rpc() -> None:
    from google.rpc import error_details_pb2
    from grpc_status import rpc_status

    async with served(fake_scorer()) as (address, _), grpc.aio.insecure_channel(address) as channel:
        stub: Any = scoring_pb2_grpc.ScoringServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.NextTokenDist(scoring_pb2.NextTokenDistRequest(top_k=-1))
        status = rpc_status.from_call(caught.value)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert status is not None
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert any(part.Unpack(info) for part in status.details)
    assert info.reason == "OUT_OF_RANGE"
    assert any(part.Unpack(bad) for part in status.details)
    assert bad.field_violations[0].field == "top_k"


async def _raw(address: str, method: str, request: bytes) -> grpc.aio.AioRpcError:
    async with grpc.aio.insecure_channel(address) as channel:
        call: Any = channel.unary_unary(f"/dualtrace.v1.ScoringService/{method}")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(request, timeout=5)
        return caught.value


async def test_a_field_from_the_future_is_refused_at_any_depth() -> None:
    inner = token_pb2.Input(text="a").SerializeToString() + b"\xa0\x06\x01"  # field 100, varint 1
    request = b"\x0a" + bytes([len(inner)]) + inner
    async with served(fake_scorer()) as (address, _):
        error = await _raw(address, "Tokenize", request)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "UNKNOWN_FIELD (inputs[0].<100>)" in (error.details() or "")


async def test_bytes_that_are_no_message_do_not_hurt_the_server() -> None:
    async with served(fake_scorer()) as (address, _):
        error = await _raw(address, "Tokenize", b"\xff\xff\xff\xff")
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "MALFORMED" in (error.details() or "")
        async with Client(Connection(address)) as client:
            await client.describe()


async def test_masks_views_and_packing_are_refused_by_name_and_never_ignored() -> None:
    from dualtrace.v1 import view_pb2

    mask = mask_pb2.Mask(version=1, base=mask_pb2.MaskExpression(full=mask_pb2.FullMask()))
    view = view_pb2.View(finetuned=view_pb2.FinetunedView(adapter="x"))
    text = token_pb2.Input(text="a")
    cases: list[tuple[str, Message, str]] = [
        (
            "NextTokenDist",
            scoring_pb2.NextTokenDistRequest(prompts=[text], variants=[scoring_pb2.Variant(mask=mask)]),
            "MASK",
        ),
        (
            "NextTokenDist",
            scoring_pb2.NextTokenDistRequest(prompts=[text], variants=[scoring_pb2.Variant(view=view)]),
            "VIEW",
        ),
        (
            "Score",
            scoring_pb2.ScoreRequest(
                query=text,
                label_token_ids=token_pb2.TokenIds(ids=[1]),
                packing=scoring_pb2.PACKING_MIS_HIDDEN_DELIMITER,
            ),
            "UNSUPPORTED_MASK (packing)",
        ),
    ]
    async with served(fake_scorer()) as (address, _):
        for method, request, word in cases:
            error = await _raw(address, method, request.SerializeToString())
            assert error.code() == grpc.StatusCode.UNIMPLEMENTED
            assert word in (error.details() or "")


async def test_tokens_stream_long_before_the_text_is_done_and_a_small_call_is_answered_first() -> None:
    scorer = fake_scorer(step=100, step_ms=20)
    async with connected(scorer) as client:
        times: dict[str, float] = {}
        begun = time.monotonic()

        async def long_call() -> None:
            async for event in client.rolling(rolling_ids(2001)):
                if isinstance(event, TokenChunk):
                    times.setdefault("first token", time.monotonic() - begun)
            times["last token"] = time.monotonic() - begun

        async def small_call() -> None:
            await asyncio.sleep(0.1)
            await all_events(client, rolling_ids(10))
            times["small call"] = time.monotonic() - begun

        await asyncio.gather(long_call(), small_call())
    # Twenty steps of at least 20 ms: the order is what matters, not the figures.
    assert times["first token"] < times["small call"] < times["last token"]
    assert times["first token"] < 0.5 * times["last token"]


async def test_a_client_that_leaves_in_mid_stream_leaves_no_work_behind() -> None:
    engine = FakeEngine(FakeSpec(step=50, step_ms=5))
    scorer = fake_scorer(engine)
    async with connected(scorer) as client:
        stream = client.rolling(rolling_ids(50_000))
        async for event in stream:
            if isinstance(event, TokenChunk):
                break
        await stream.aclose()  # type: ignore[attr-defined]
        await all_events(client, rolling_ids(5))
        for _ in range(200):
            before = engine.computed_tokens
            await asyncio.sleep(0.03)
            if engine.computed_tokens == before:
                break
        assert engine.computed_tokens < 25_000
        assert scorer.scheduler.waiting_rows == 0


async def test_a_deadline_ends_the_call_and_drops_the_work() -> None:
    engine = FakeEngine(FakeSpec(step=50, step_ms=10))
    async with connected(fake_scorer(engine)) as client:
        with pytest.raises(DeadlineExceeded):
            await all_events(client, rolling_ids(50_000), deadline=time.monotonic() + 0.15)
        await all_events(client, rolling_ids(5))
        done = engine.computed_tokens
        await asyncio.sleep(0.1)
        assert engine.computed_tokens == done


async def test_a_full_queue_refuses_and_recovers() -> None:
    scorer = fake_scorer(step=10, step_ms=20, scheduling=SchedulerLimits(batch_tokens=10, pass_tokens=0, queue_calls=2))
    async with connected(scorer) as client:
        calls = [asyncio.create_task(all_events(client, rolling_ids(40))) for _ in range(8)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        refused = [result for result in results if isinstance(result, BaseException)]
        assert refused
        assert all(isinstance(result, Exhausted) and result.reason == Reason.QUEUE_FULL for result in refused)
        assert len(refused) < len(results)
        await all_events(client, rolling_ids(5))


async def test_a_wrong_or_missing_token_is_refused_and_health_needs_none(tmp_path: Any) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    secrets = tmp_path / "tokens"
    secrets.write_text("# ours\nright\nalso-right\n")
    async with served(fake_scorer(), token_file=secrets) as (address, _):
        for token in (None, "wrong"):
            async with Client(Connection(address, token=token)) as client:
                with pytest.raises(Problem) as caught:
                    await all_events(client, rolling_ids(5))
                assert caught.value.reason == Reason.BAD_TOKEN
        async with Client(Connection(address, token="also-right")) as client:
            await all_events(client, rolling_ids(5))
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_draining_lets_a_running_call_end_and_refuses_new_ones() -> None:
    scorer = fake_scorer(step=100, step_ms=10)
    async with served(scorer) as (address, server), Client(Connection(address)) as client:
        stream = client.rolling(rolling_ids(2000))
        first = await anext(stream)
        assert isinstance(first, AnswerHeader)
        draining = asyncio.create_task(server.drain(10))
        await asyncio.sleep(0.02)
        with pytest.raises(Unavailable):
            await all_events(client, rolling_ids(5))
        rest = [event async for event in stream]
        assert isinstance(rest[-1], AnswerSummary)
        await draining


async def test_a_model_with_nan_weights_never_becomes_ready() -> None:
    scorer = fake_scorer(nan_at=3)
    with pytest.raises(Problem) as caught:
        async with served(scorer):
            pass
    assert caught.value.reason == Reason.NON_FINITE_LOGITS
    assert "view base" in str(caught.value)


async def test_a_server_that_is_not_there_is_unreachable_and_says_where() -> None:
    async with Client(Connection("127.0.0.1:1")) as client:
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1") as caught:
            await client.describe()
    assert caught.value.reason == Reason.UNREACHABLE


async def test_a_stream_without_its_summary_is_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = fake_scorer()
    whole = scorer.ask

    async def cut(question: Any, **options: Any) -> Any:
        async for event in whole(question, **options):
            if not isinstance(event, AnswerSummary):
                yield event

    monkeypatch.setattr(scorer, "ask", cut)
    async with connected(scorer, preflight=False) as client:
        with pytest.raises(Problem) as caught:
            await all_events(client, rolling_ids(5))
    assert caught.value.reason == Reason.INCOMPLETE_STREAM


async def test_a_fault_of_the_server_is_internal_and_tells_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = fake_scorer()

    async def broken(question: Any, **options: Any) -> Any:
        if options:
            raise ValueError("/secret/path")
        yield question

    monkeypatch.setattr(scorer, "ask", broken)
    async with connected(scorer, preflight=False) as client:
        with pytest.raises(Problem) as caught:
            await all_events(client, rolling_ids(5))
    assert caught.value.code_name == "INTERNAL"
    assert "secret" not in str(caught.value)


async def test_the_blocking_client_asks_and_streams() -> None:
    async with served(fake_scorer()) as (address, _):

        def use() -> tuple[int, int]:
            with BlockingClient(Connection(address)) as client:
                events = list(client.rolling(rolling_ids(300)))
                chunks = only(events, TokenChunk)
                client.describe()
                partly = client.rolling(rolling_ids(300))
                next(partly)
                partly.close()  # type: ignore[attr-defined]
                return len(chunks), sum(int(chunk.tokens.ids.size) for chunk in chunks)

        chunks, tokens = await asyncio.to_thread(use)
    assert tokens == 299
    assert chunks == 5


async def test_a_request_without_anything_to_score_is_refused_as_empty() -> None:
    async with connected(fake_scorer()) as client:
        with pytest.raises(InvalidArgument) as caught:
            await all_events(client, LogprobQuestion(items=()))
        assert caught.value.reason == Reason.EMPTY
        with pytest.raises(InvalidArgument):
            await all_events(client, RollingQuestion(inputs=()))


async def test_a_scorer_without_a_tokenizer_refuses_text_and_scores_ids() -> None:
    from dualtrace.engine_scorer import EngineScorer

    scorer = EngineScorer(FakeEngine(FakeSpec(vocab=50)), None)
    async with connected(scorer) as client:
        assert not (await client.describe()).capabilities.text
        with pytest.raises(Unsupported) as caught:
            await all_events(client, TokenizeQuestion((Input(text="a"),)))
        assert caught.value.reason == Reason.NO_TOKENIZER
        events = await all_events(client, RollingQuestion((Input(ids=int_array([1, 2, 3])), Input(text="a"))))
        assert [event.problem.reason for event in only(events, ItemProblem)] == [Reason.NO_TOKENIZER]
        chunk = only(events, TokenChunk)[0]
        assert chunk.tokens.pieces == ()
        assert chunk.tokens.starts is None


async def test_cancelling_the_callers_task_cancels_the_call() -> None:
    engine = FakeEngine(FakeSpec(step=50, step_ms=10))
    async with connected(fake_scorer(engine)) as client:
        task = asyncio.create_task(all_events(client, rolling_ids(50_000)))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises((asyncio.CancelledError, Cancelled)):
            await task
        await all_events(client, rolling_ids(5))
        done = engine.computed_tokens
        await asyncio.sleep(0.1)
        assert engine.computed_tokens == done
