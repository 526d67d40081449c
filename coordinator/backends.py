"""The named backends: replicas of one model behind one name, asked over one channel, each of them watched.

It knows addresses, balancing and provenance. It must not know questions, comparisons or what is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from coordinator.addresses import Endpoint, is_dns, join_endpoints, look_up, write_endpoint
from coordinator.replicas import ReplicaWatch
from coordinator.settings import BackendSettings, split_address
from dualtrace.client import Client, Connection
from dualtrace.library import Backend, Replica
from dualtrace.metrics import CoordinatorMetrics
from dualtrace.problems import FailedPrecondition, InvalidArgument, NotFound, Problem, Reason, Unavailable
from dualtrace.sidecar import SERVICE_NAME

log = logging.getLogger(__name__)

LOOK_UP_SECONDS = 30.0  # names move
LONGEST_CALL_SECONDS = 3600.0

SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": SERVICE_NAME},
    "methodConfig": [
        {
            # All its questions are idempotent. A stream is retried before its first message only.
            "name": [{"service": SERVICE_NAME}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
            # No timeout here: it fires a second early. Every call brings its own deadline.
        }
    ],
}
Options = tuple[tuple[str, str | int], ...]
RECONNECT: Options = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A machine that vanished in the middle of a call sends nothing, and TCP would wait for a quarter of an hour.
    # Servers that know nothing of us send whoever pings more often than every five minutes away, calls and all.
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),  # no limit: an engine may compute for long between two messages
)
BALANCED: Options = (("grpc.service_config", json.dumps(SERVICE_CONFIG)), ("grpc.enable_retries", 1), *RECONNECT)


class BackendBook:
    """The backends by name. `start`, then ask; `close` ends every watch and every channel."""

    def __init__(
        self,
        backends: Sequence[BackendSettings],
        metrics: CoordinatorMetrics | None = None,
        longest_call_seconds: float = LONGEST_CALL_SECONDS,
    ) -> None:
        self._metrics = metrics or CoordinatorMetrics()
        self._changed = asyncio.Event()
        self._backends = {
            settings.name: NamedBackend(settings, self._count, longest_call_seconds) for settings in backends
        }

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._backends))

    async def start(self) -> None:
        """Waits for names, which are looked up all at once, and for no replica: its watch waits for it."""
        await asyncio.gather(*(backend.start() for backend in self._backends.values()))

    async def close(self) -> None:
        await asyncio.gather(*(backend.close() for backend in self._backends.values()))

    async def settle(self, seconds: float) -> None:
        """Wait until every replica is known to serve or not, but no longer than so."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not all(one.is_settled for one in self._backends.values()):
                    self._changed.clear()
                    await self._changed.wait()

    def list(self) -> tuple[Backend, ...]:
        return tuple(self._backends[name].show() for name in self.names)

    def get(self, name: str) -> Backend:
        return self._find(name).show()

    def scorer(self, name: str) -> Client:
        """Whoever serves under that name; closed by the book, not by the caller."""
        return self._find(name).scorer()

    def _find(self, name: str) -> NamedBackend:
        found = self._backends.get(name)
        if found is None:
            known = ", ".join(self.names) or "none: start the coordinator with --backend NAME=HOST:PORT"
            message = f"there is no backend {name!r:.120}; known are {known}"
            raise NotFound(Reason.NOT_FOUND, message, field="backend", allowed=", ".join(self.names))
        return found

    def _count(self, backend: Backend) -> None:
        self._changed.set()
        serving = sum(replica.serving for replica in backend.replicas)
        self._metrics.backend_replicas.labels(backend=backend.name).set(len(backend.replicas))
        self._metrics.backend_replicas_serving.labels(backend=backend.name).set(0 if backend.problem else serving)


class NamedBackend:
    """The replicas of one model: one balancing client, and one watch for each."""

    def __init__(
        self,
        settings: BackendSettings,
        tell: Callable[[Backend], None],
        longest_call_seconds: float = LONGEST_CALL_SECONDS,
    ) -> None:
        self._settings = settings
        self._tell = tell
        self._longest_call_seconds = longest_call_seconds
        self._connection = connect(settings)
        self._watches: dict[str, ReplicaWatch] = {}  # by address as shown
        self._unknown: dict[str, str] = {}  # addresses that cannot be looked up: why
        self._endpoints: tuple[Endpoint, ...] = ()
        self._client: Client | None = None
        self._retired: dict[Client, asyncio.Task[None]] = {}  # calls may still run, or begin, on them
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._look_up()
        if self._is_named:
            self._task = asyncio.create_task(self._look_up_again(), name=f"look up {self._settings.name}")

    async def close(self) -> None:
        tasks = [*self._retired.values(), *([self._task] if self._task is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(watch.close() for watch in self._watches.values()))
        for client in (*self._retired, *([self._client] if self._client is not None else [])):
            await client.close()

    @property
    def is_settled(self) -> bool:
        return all(watch.is_settled for watch in self._watches.values())

    def show(self) -> Backend:
        watched = [watch.replica for watch in self._watches.values()]
        unknown = [Replica(address, serving=False, problem=why) for address, why in self._unknown.items()]
        cards = [watch.card for watch in self._watches.values() if watch.card is not None and watch.replica.serving]
        known = cards or [watch.card for watch in self._watches.values() if watch.card is not None]
        return Backend(
            name=self._settings.name,
            replicas=tuple(sorted((*watched, *unknown), key=lambda replica: replica.address)),
            card=known[0] if known else None,
            synthetic=any(card.provenance.synthetic for card in known),
            problem=self._find_difference(),
        )

    def scorer(self) -> Client:
        shown = self.show()
        if shown.problem:
            message = f"backend {shown.name} must not be used: {shown.problem}"
            raise FailedPrecondition(Reason.CONFLICT, message, field="backend")
        if self._client is None or all(replica.problem for replica in shown.replicas):
            told = "; ".join(f"{replica.address}: {replica.problem}" for replica in shown.replicas)
            message = f"no replica of backend {shown.name} serves ({told}); start one, or ask another backend"
            raise Unavailable(Reason.UNREACHABLE, message, field="backend")
        return self._client

    def _find_difference(self) -> str:
        """Why serving replicas are not one model; "" when they are."""
        digests = {
            watch.replica.address: watch.card.provenance.digest()
            for watch in self._watches.values()
            if watch.card is not None and watch.replica.serving
        }
        if len(set(digests.values())) < 2:
            return ""
        told = ", ".join(f"{address} {digest[:19]}" for address, digest in sorted(digests.items()))
        return f"its replicas differ in provenance ({told}); serve the same model with the same precision on all"

    @property
    def _is_named(self) -> bool:
        """Whether a name must be looked up again and again. One plain name is gRPC's own business."""
        addresses = self._settings.addresses
        return is_dns(addresses[0]) or (len(addresses) > 1 and any(_is_name(address) for address in addresses))

    async def _look_up_again(self) -> None:
        while True:
            await asyncio.sleep(LOOK_UP_SECONDS)
            try:
                await self._look_up()
            except Exception:
                log.exception("looking up the replicas of %s failed; it is tried again", self._settings.name)

    async def _look_up(self) -> None:
        """Bring watches and channel in line with what the names mean now."""
        found: dict[str, tuple[Endpoint, ...]] = {}
        self._unknown = {}
        for address in self._settings.addresses:
            try:
                found[address] = await look_up(address)
            except Problem as problem:
                self._unknown[address] = problem.detail.message
        await self._watch(found)
        self._balance(tuple(one for endpoints in found.values() for one in endpoints))
        self._tell(self.show())

    async def _watch(self, found: dict[str, tuple[Endpoint, ...]]) -> None:
        wanted = set(found)
        if is_dns(self._settings.addresses[0]):
            wanted = {write_endpoint(one) for endpoints in found.values() for one in endpoints}
        for address in set(self._watches) - wanted:
            await self._watches.pop(address).close()
        for address in sorted(wanted - set(self._watches)):
            connection = replace(self._connection, address=address)
            watch = self._watches[address] = ReplicaWatch(address, connection, lambda: self._tell(self.show()))
            watch.start()

    def _balance(self, endpoints: tuple[Endpoint, ...]) -> None:
        several = len(self._settings.addresses) > 1
        if self._client is not None and (not several or endpoints == self._endpoints):
            return
        if several and not endpoints:
            return  # nothing to connect to; the watches of what was there go on
        target = join_endpoints(endpoints) if several else self._settings.addresses[0]
        if self._client is not None:
            self._retired[self._client] = asyncio.create_task(self._retire(self._client))
        self._endpoints = endpoints
        options = (*BALANCED, *self._connection.options)
        self._client = Client(replace(self._connection, address=target, options=options))

    async def _retire(self, client: Client) -> None:
        """Let go of a channel that was replaced, when no call that began on it can run. A benchmark may hold it longer
        and go on asking: gRPC closes a channel when nobody holds it any more."""
        await asyncio.sleep(self._longest_call_seconds)
        del self._retired[client]


def _is_name(address: str) -> bool:
    host, _ = split_address(address, "addresses")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False


def connect(settings: BackendSettings) -> Connection:
    """How every replica is connected to; the address is filled in for each."""
    hosts = {split_address(address, "addresses")[0] for address in settings.addresses}
    options = RECONNECT
    if settings.tls:
        # A channel is opened by IP address; the name in the certificate is another one.
        named = settings.tls_name or (hosts.pop() if len(hosts) == 1 else None)
        if named is None:
            message = f"backend {settings.name} has replicas on several hosts; set tls_name to the certificates' name"
            raise InvalidArgument(Reason.MISSING, message, field=f"backends.{settings.name}.tls_name")
        options = (*RECONNECT, ("grpc.ssl_target_name_override", named))
    return Connection(
        address="",
        tls=settings.tls,
        ca_file=settings.ca_file,
        certificate_file=settings.certificate_file,
        key_file=settings.key_file,
        token=settings.token if settings.token_file is None else read_token(settings.token_file),
        options=options,
    )


def read_token(file: Path) -> str:
    """The first line of a file that is no comment."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(Reason.NOT_FOUND, f"cannot read {file}: {error}", field="token_file") from error
    found = next((line.strip() for line in lines if line.strip() and not line.startswith("#")), None)
    if found is None:
        raise InvalidArgument(Reason.EMPTY, f"{file} holds no token; write one into it", field="token_file")
    return found
