"""Named backends: replicas behind one name, watched, balanced, and refused where they are not one model."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coordinator.addresses import join_endpoints, look_up
from coordinator.backends import BackendBook, read_token
from coordinator.settings import BackendSettings
from dualtrace.metrics import Metrics
from dualtrace.problems import FailedPrecondition, InvalidArgument, NotFound, Problem, Reason, Unavailable
from dualtrace.questions.answers import AnswerSummary
from dualtrace.server import SidecarServer
from dualtrace.settings import SidecarSettings
from tests.support.desk import fake_side
from tests.support.scorers import all_events, only, rolling_ids, served

ANYWHERE = "127.0.0.1:1"  # nobody listens on port 1
SOON = 5.0


@contextlib.asynccontextmanager
async def book_of(**backends: tuple[str, ...]) -> AsyncIterator[BackendBook]:
    book = BackendBook([BackendSettings(name, addresses) for name, addresses in backends.items()])
    await book.start()
    try:
        await book.settle(SOON)
        yield book
    finally:
        await book.close()


@pytest.fixture
async def twins() -> AsyncIterator[tuple[tuple[str, SidecarServer], tuple[str, SidecarServer]]]:
    """Two replicas of one model."""
    async with served(fake_side()) as one, served(fake_side()) as other:
        yield one, other


async def wait_until_serving(book: BackendBook, name: str, count: int) -> None:
    end = time.monotonic() + SOON
    while sum(replica.serving for replica in book.get(name).replicas) != count:
        assert time.monotonic() < end, book.get(name)
        await asyncio.sleep(0.02)


async def test_a_backend_is_shown_with_its_card_and_its_health() -> None:
    async with served(fake_side(seed=3)) as (address, _), book_of(torch=(address,)) as book:
        shown = book.get("torch")
        assert shown.card is not None
        assert (shown.healthy, shown.card.provenance.model_id, shown.synthetic) == (True, "fake-3", True)


async def test_a_replica_that_is_not_there_is_shown_with_the_reason() -> None:
    async with book_of(torch=(ANYWHERE,)) as book:
        (replica,) = book.get("torch").replicas
        assert (replica.serving, replica.address) == (False, ANYWHERE)
        assert "UNAVAILABLE" in replica.problem


async def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    async with book_of(torch=(ANYWHERE,), jax=(ANYWHERE,)) as book:
        with pytest.raises(NotFound) as caught:
            book.scorer("tourch")
        assert caught.value.detail.allowed == "jax, torch"


async def test_a_backend_none_of_whose_replicas_serves_cannot_be_asked() -> None:
    async with book_of(torch=(ANYWHERE,)) as book:
        with pytest.raises(Unavailable) as caught:
            book.scorer("torch")
        assert ANYWHERE in str(caught.value)


async def test_the_questions_of_a_name_go_round_its_replicas() -> None:
    one, other = fake_side(), fake_side()
    async with served(one) as (first, _), served(other) as (second, _), book_of(torch=(first, second)) as book:
        await wait_until_serving(book, "torch", 2)
        for _ in range(8):
            assert only(await all_events(book.scorer("torch"), rolling_ids(4)), AnswerSummary)
        asked = [scorer._engine.computed_tokens for scorer in (one, other)]  # type: ignore[attr-defined]
        assert min(asked) > 0


async def test_no_call_is_lost_while_one_of_two_replicas_goes(
    twins: tuple[tuple[str, SidecarServer], tuple[str, SidecarServer]],
) -> None:
    (first, server), (second, _) = twins
    async with book_of(torch=(first, second)) as book:
        await wait_until_serving(book, "torch", 2)
        answered = 0
        for number in range(40):
            if number == 10:
                await server.drain(0)
            answered += len(only(await all_events(book.scorer("torch"), rolling_ids(4)), AnswerSummary))
        assert answered == 40


async def test_a_replica_that_drains_is_seen_at_once(
    twins: tuple[tuple[str, SidecarServer], tuple[str, SidecarServer]],
) -> None:
    (first, server), (second, _) = twins
    async with book_of(torch=(first, second)) as book:
        await wait_until_serving(book, "torch", 2)
        await server.drain(0)
        await wait_until_serving(book, "torch", 1)
        assert book.get("torch").healthy


async def test_replicas_of_different_models_are_refused_until_they_are_one() -> None:
    async with (
        served(fake_side(seed=1)) as (first, _),
        served(fake_side(seed=2)) as (second, server),
        book_of(torch=(first, second)) as book,
    ):
        await wait_until_serving(book, "torch", 2)
        with pytest.raises(FailedPrecondition) as caught:
            book.scorer("torch")
        assert caught.value.reason is Reason.CONFLICT
        assert first in caught.value.detail.message
        await server.drain(0)
        await wait_until_serving(book, "torch", 1)
        assert only(await all_events(book.scorer("torch"), rolling_ids(4)), AnswerSummary)


async def test_a_replica_that_comes_later_is_found() -> None:
    async with served(fake_side()) as (address, server):
        await server.drain(0)
        async with book_of(torch=(address,)) as book:
            assert not book.get("torch").healthy
            scorer = fake_side()
            later = SidecarServer(scorer, SidecarSettings(port=int(address.rpartition(":")[2])), Metrics())
            await later.start()
            await later.make_ready()
            try:
                await wait_until_serving(book, "torch", 1)
                assert only(await all_events(book.scorer("torch"), rolling_ids(4)), AnswerSummary)
            finally:
                await later.drain(0)
                await scorer.close()


async def test_the_token_of_a_backend_is_sent(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("# who may ask\nopen-sesame\n")
    async with served(fake_side(), token_file=file) as (address, _):
        book = BackendBook([BackendSettings("torch", (address,), token_file=file)])
        await book.start()
        try:
            await book.settle(SOON)
            assert book.get("torch").healthy
            assert only(await all_events(book.scorer("torch"), rolling_ids(4)), AnswerSummary)
        finally:
            await book.close()


async def test_a_wrong_token_is_named_as_the_replica_s_problem(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("secret\n")
    async with served(fake_side(), token_file=file) as (address, _), book_of(torch=(address,)) as book:
        (replica,) = book.get("torch").replicas
        assert "token" in replica.problem


async def test_a_host_name_among_several_addresses_is_looked_up() -> None:
    async with served(fake_side()) as (first, _), served(fake_side()) as (second, _):
        named = second.replace("127.0.0.1", "localhost")
        async with book_of(torch=(first, named)) as book:
            await wait_until_serving(book, "torch", 2)
            assert only(await all_events(book.scorer("torch"), rolling_ids(4)), AnswerSummary)


async def test_a_dns_name_stands_for_all_its_addresses() -> None:
    async with served(fake_side()) as (address, _):
        port = address.rpartition(":")[2]
        async with book_of(torch=(f"dns:///localhost:{port}",)) as book:
            await wait_until_serving(book, "torch", 1)
            assert [replica.address for replica in book.get("torch").replicas] == [address]
            assert only(await all_events(book.scorer("torch"), rolling_ids(4)), AnswerSummary)


async def test_a_name_that_cannot_be_looked_up_is_a_problem_of_that_replica_alone() -> None:
    async with served(fake_side()) as (address, _), book_of(torch=(address, "no-such-host.invalid:1")) as book:
        await wait_until_serving(book, "torch", 1)
        assert [replica.serving for replica in book.get("torch").replicas] == [True, False]
        assert only(await all_events(book.scorer("torch"), rolling_ids(4)), AnswerSummary)


async def test_an_ip_address_is_taken_as_it_is() -> None:
    assert await look_up("[::1]:50051") == (("::1", 50051),)


def test_addresses_of_both_families_become_one_target() -> None:
    assert join_endpoints([("10.0.0.1", 1), ("::1", 2)]) == "ipv6:[::ffff:10.0.0.1]:1,[::1]:2"
    assert join_endpoints([("10.0.0.1", 1), ("10.0.0.2", 2)]) == "ipv4:10.0.0.1:1,10.0.0.2:2"


def test_a_token_file_without_a_token_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# nobody\n\n")
    with pytest.raises(InvalidArgument) as caught:
        read_token(tmp_path / "empty")
    assert caught.value.reason is Reason.EMPTY


def test_several_hosts_behind_tls_need_one_certificate_name() -> None:
    with pytest.raises(Problem) as caught:
        BackendBook([BackendSettings("torch", ("a:1", "b:1"), tls=True)])
    assert caught.value.detail.field == "backends.torch.tls_name"
