"""TLS of the coordinator: one certificate for both faces, and a client certificate asked for on both."""

from __future__ import annotations

import asyncio
import http.client
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme

from dualtrace.client import Connection
from dualtrace.coordinator_client import CoordinatorClient
from dualtrace.problems import InvalidArgument
from tests.support.faces import ScriptedOperations, open_faces


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, and .pem and .key of `server` (localhost) and `client`."""
    made = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(made / "ca.pem"))
    for name, identity in (("server", "localhost"), ("client", "client@example.org")):
        issued = authority.issue_cert(identity)
        issued.private_key_pem.write_to_path(str(made / f"{name}.key"))
        issued.cert_chain_pems[0].write_to_path(str(made / f"{name}.pem"))
    return made


def settings(folder: Path) -> dict[str, Any]:
    return {"host": "localhost", "tls_certificate": folder / "server.pem", "tls_key": folder / "server.key"}


def ready_over_tls(address: str, context: ssl.SSLContext) -> int:
    connection = http.client.HTTPSConnection(address, context=context, timeout=20)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status
    finally:
        connection.close()


async def test_both_faces_speak_tls_with_one_certificate(folder: Path) -> None:
    async with open_faces(ScriptedOperations(), **settings(folder)) as opened:
        connection = Connection(opened.grpc, tls=True, ca_file=folder / "ca.pem")
        async with CoordinatorClient(connection) as client:
            names = [backend.name for backend in await client.list_backends()]
        context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        assert (names, await asyncio.to_thread(ready_over_tls, opened.http, context)) == (["torch"], 200)


async def test_the_http_face_too_asks_for_a_client_certificate(folder: Path) -> None:
    async with open_faces(ScriptedOperations(), **settings(folder), tls_client_ca=folder / "ca.pem") as opened:
        context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        with pytest.raises(OSError):  # noqa: PT011 - the handshake's end differs by the moment: ssl.SSLError or a reset
            await asyncio.to_thread(ready_over_tls, opened.http, context)
        context.load_cert_chain(folder / "client.pem", folder / "client.key")
        assert await asyncio.to_thread(ready_over_tls, opened.http, context) == 200


async def test_a_key_of_another_certificate_is_refused_before_it_listens(folder: Path) -> None:
    wrong = {**settings(folder), "tls_key": folder / "client.key"}
    with pytest.raises(InvalidArgument) as caught:
        async with open_faces(ScriptedOperations(), **wrong):
            pass
    assert caught.value.detail.field == "tls_certificate"
