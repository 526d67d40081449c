"""TLS and mTLS between client and server, with certificates made for the test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme

from dualtrace.client import Client, Connection
from dualtrace.metrics import Metrics
from dualtrace.problems import InvalidArgument, Problem, Reason, Unavailable
from dualtrace.questions.answers import ItemDone
from dualtrace.server import SidecarServer
from dualtrace.settings import SidecarSettings
from tests.support.scorers import all_events, fake_scorer, only, rolling_ids, served


class Certificates:
    """One authority, a server certificate for localhost and one for a client."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.authority = folder / "ca.pem"
        authority.cert_pem.write_to_path(str(self.authority))
        for name, identity in (("server", "localhost"), ("client", "client@example.org")):
            issued = authority.issue_cert(identity)
            issued.private_key_pem.write_to_path(str(folder / f"{name}.key"))
            issued.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))
        self.folder = folder

    def pair(self, name: str) -> tuple[Path, Path]:
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
async def mutual(certificates: Certificates) -> AsyncIterator[str]:
    """A server that wants client certificates; its port."""
    certificate, key = certificates.pair("server")
    async with served(
        fake_scorer(),
        host="localhost",
        tls_certificate=certificate,
        tls_key=key,
        tls_client_ca=certificates.authority,
    ) as (address, _):
        yield address


async def test_a_client_with_the_authority_is_answered_over_tls(certificates: Certificates) -> None:
    certificate, key = certificates.pair("server")
    async with served(fake_scorer(), host="localhost", tls_certificate=certificate, tls_key=key) as (address, _):
        async with Client(Connection(address, tls=True, ca_file=certificates.authority)) as client:
            assert only(await all_events(client, rolling_ids(5)), ItemDone)
        async with Client(Connection(address)) as plain:
            with pytest.raises(Unavailable):
                await plain.describe()


async def test_a_client_that_does_not_know_the_authority_refuses_the_server(certificates: Certificates) -> None:
    certificate, key = certificates.pair("server")
    async with (
        served(fake_scorer(), host="localhost", tls_certificate=certificate, tls_key=key) as (address, _),
        Client(Connection(address, tls=True)) as client,
    ):
        with pytest.raises(Unavailable):
            await client.describe()


async def test_mutual_tls_lets_in_only_who_shows_a_certificate(mutual: str, certificates: Certificates) -> None:
    certificate, key = certificates.pair("client")
    known = Connection(mutual, tls=True, ca_file=certificates.authority, certificate_file=certificate, key_file=key)
    async with Client(known) as client:
        assert only(await all_events(client, rolling_ids(5)), ItemDone)
    async with Client(Connection(mutual, tls=True, ca_file=certificates.authority)) as stranger:
        with pytest.raises(Unavailable):
            await stranger.describe()


@pytest.mark.parametrize("missing", ["tls_key", "tls_certificate"])
async def test_half_a_pair_of_certificate_and_key_is_refused(certificates: Certificates, missing: str) -> None:
    certificate, key = certificates.pair("server")
    given = {"tls_certificate": certificate, "tls_key": key}
    del given[missing]
    scorer = fake_scorer()
    try:
        with pytest.raises(InvalidArgument) as caught:
            async with served(scorer, **given):
                pass
        assert caught.value.reason is Reason.CONFLICT
        assert caught.value.detail.field == missing
    finally:
        await scorer.close()


async def test_certificates_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    absent = tmp_path / "absent.pem"
    with pytest.raises(InvalidArgument, match=r"absent\.pem"):
        async with served(fake_scorer(), tls_certificate=absent, tls_key=absent):
            pass


async def test_a_token_file_without_a_token_locks_nobody_out_silently(tmp_path: Path) -> None:
    empty = tmp_path / "tokens"
    empty.write_text("# none yet\n")
    scorer = fake_scorer()
    try:
        with pytest.raises(Problem) as caught:
            SidecarServer(scorer, SidecarSettings(token_file=empty), Metrics())
        assert caught.value.reason is Reason.EMPTY
    finally:
        await scorer.close()
