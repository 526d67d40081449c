"""The coordinator's settings: its own numbers, and the backends it may ask, by name. Read once, passed down.

It knows what each setting means and how a backend is written in a file, in the environment and in a flag. It must not
know who uses a setting; a file of a certificate or a token is only a path here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

from coordinator.store.folder import default_data_folder
from dualtrace.library import check_name
from dualtrace.problems import InvalidArgument, Reason
from dualtrace.settings import (
    COORDINATOR_PREFIX,
    HIDDEN,
    Sources,
    check_settings,
    list_settings,
    read_toml,
    setting,
    settle_settings,
)

BACKENDS = "backends"
BACKENDS_VARIABLE = COORDINATOR_PREFIX + BACKENDS.upper()


@dataclass(frozen=True)
class CoordinatorSettings:
    """What one coordinator process is told, but for its backends."""

    environment_prefix: ClassVar[str] = COORDINATOR_PREFIX

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(50050, "port of the gRPC face; 0 takes any free one", low=0, high=65535)
    http_port: int | None = setting(
        8080, "port of the HTTP face with /metrics; 0 takes any free one, none is off", low=0, high=65535
    )
    http_names: str | None = setting(
        None, "names that the HTTP face may be called by, separated by commas, beside localhost, IP addresses and host"
    )
    data: Path | None = setting(None, "folder of what is kept; none is the user's data folder")
    call_seconds: float = setting(600.0, "deadline of a call that names none", low=0.001, high=86_400)
    max_call_seconds: float = setting(3600.0, "longest deadline of a call; longer ones are cut", low=0.001, high=86_400)
    max_comparisons: int = setting(32, "comparisons at a time; one more is refused", low=1, high=10_000)
    job_workers: int = setting(2, "jobs that run at a time; others wait", low=1, high=1000)
    max_waiting_jobs: int = setting(1000, "jobs that may wait; one more is refused", low=1, high=1_000_000)
    max_job_seconds: float = setting(
        21_600.0, "how long a job may ask; a benchmark keeps what was timed by then", low=0.001, high=2_592_000
    )
    max_benchmark_calls: int = setting(100_000, "repeats of one benchmark", low=1, high=10_000_000)
    debug_token_limit: int = setting(
        65_536, "tokens a side that one report may keep; more is refused", low=0, high=10_000_000
    )
    tape_megabytes: int = setting(
        16, "raw request and raw response kept of one run, in MiB each; 0 keeps none", low=0, high=65_536
    )
    drain_seconds: float = setting(20.0, "how long running calls may finish after the stop signal", low=0, high=86_400)
    tls_certificate: Path | None = setting(None, "PEM file of the server's certificate chain; none is plain text")
    tls_key: Path | None = setting(None, "PEM file of the certificate's private key")
    tls_client_ca: Path | None = setting(None, "PEM file of the authority that client certificates must come from")
    token_file: Path | None = setting(None, "file of accepted bearer tokens, one a line; none accepts every caller")

    def __post_init__(self) -> None:
        check_settings(self)
        if (self.tls_certificate is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_certificate"
            message = f"tls_certificate and tls_key go together; {missing} is not set. Set both or none."
            raise InvalidArgument(Reason.CONFLICT, message, field=missing)
        if self.tls_client_ca is not None and self.tls_certificate is None:
            message = "tls_client_ca asks callers for certificates, which needs tls_certificate and tls_key as well."
            raise InvalidArgument(Reason.CONFLICT, message, field="tls_client_ca")
        if self.call_seconds > self.max_call_seconds:
            message = f"call_seconds {self.call_seconds:g} is above max_call_seconds {self.max_call_seconds:g}"
            raise InvalidArgument(Reason.CONFLICT, message, field="call_seconds")

    def split_http_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in (self.http_names or "").split(",") if name.strip())

    @property
    def folder(self) -> Path:
        """Where things are kept."""
        return self.data or default_data_folder()


@dataclass(frozen=True)
class BackendSettings:
    """One named backend: the addresses of its replicas, and how to be let in."""

    name: str
    addresses: tuple[str, ...]  # host:port, or one dns:///host:port
    tls: bool = False
    ca_file: Path | None = None  # None: the system's authorities
    certificate_file: Path | None = None  # our own, for mTLS
    key_file: Path | None = None
    tls_name: str | None = None  # in the replicas' certificates; None: their host
    token: str | None = None
    token_file: Path | None = None  # its first line is the token

    def __post_init__(self) -> None:
        check_name(self.name, BACKENDS)
        where = f"{BACKENDS}.{self.name}"
        if not self.addresses:
            message = f"backend {self.name} has no address; name one or more replicas"
            raise InvalidArgument(Reason.EMPTY, message, field=f"{where}.addresses")
        if len(set(self.addresses)) != len(self.addresses):
            message = f"backend {self.name} names an address twice"
            raise InvalidArgument(Reason.DUPLICATE, message, field=f"{where}.addresses")
        for address in self.addresses:
            split_address(address, f"{where}.addresses")
        if len(self.addresses) > 1 and any(address.startswith("dns:") for address in self.addresses):
            message = f"backend {self.name}: a dns:/// name stands for all replicas; name no other address beside it"
            raise InvalidArgument(Reason.CONFLICT, message, field=f"{where}.addresses")
        if self.token is not None and self.token_file is not None:
            message = f"backend {self.name} has token and token_file; give one of them"
            raise InvalidArgument(Reason.CONFLICT, message, field=f"{where}.token")
        of_tls = ("ca_file", "certificate_file", "key_file", "tls_name")
        given = next((name for name in of_tls if getattr(self, name) is not None), None)
        if given is not None and not self.tls:
            message = f"backend {self.name} has {given}, which is for TLS; set tls = true"
            raise InvalidArgument(Reason.CONFLICT, message, field=f"{where}.{given}")

    def __repr__(self) -> str:
        secret = HIDDEN if self.token else None
        return f"BackendSettings({self.name!r}, {self.addresses!r}, tls={self.tls}, token={secret})"


def split_address(address: str, field: str) -> tuple[str, int]:
    """Host and port of `host:port`, `[ipv6]:port` or `dns:///host:port`."""
    host, colon, port = address.removeprefix("dns:///").rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    is_ip6 = host != bare
    if not colon or not bare or "/" in bare or (":" in bare) != is_ip6 or not _is_port(port):
        message = f"{address!r:.200} is no address; write HOST:PORT, [IPV6]:PORT or dns:///HOST:PORT"
        raise InvalidArgument(Reason.MALFORMED, message, field=field, allowed="HOST:PORT")
    return bare, int(port)


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 5 and 1 <= int(text) <= 65535


@dataclass(frozen=True)
class Configuration:
    """Everything that a coordinator process is told, and where each value came from."""

    settings: CoordinatorSettings
    backends: tuple[BackendSettings, ...]  # by name
    sources: Sources  # of settings by name, of backends as "backends.NAME"

    def show(self) -> str:
        """What `--print-config` prints: a line each, secrets hidden."""
        known = list_settings(CoordinatorSettings)
        pairs = [(f"{field.name} = {field.show(getattr(self.settings, field.name))}", field.name) for field in known]
        for backend in self.backends:
            pairs.append((f"{BACKENDS}.{backend.name} = {_show_backend(backend)}", f"{BACKENDS}.{backend.name}"))
        width = max(len(left) for left, _ in pairs)
        return "\n".join(f"{left:<{width}}  ({self.sources[name]})" for left, name in pairs)


def _show_backend(backend: BackendSettings) -> str:
    parts = [",".join(backend.addresses)]
    for field in fields(backend)[2:]:
        value = getattr(backend, field.name)
        if value not in {None, False}:
            parts.append(
                f"{field.name}={HIDDEN if field.name == 'token' else str(value).lower() if value is True else value}"
            )
    return " ".join(parts)


def read_configuration(
    *, file: Path | None, environ: Mapping[str, str], flags: Mapping[str, object], backends: Sequence[str] = ()
) -> Configuration:
    """Read every source once. `backends`: the flags `NAME=ADDRESS[,ADDRESS]`, each replacing that name's addresses."""
    content = read_toml(file)
    tables = content.pop(BACKENDS, {})
    told_environ = {name: value for name, value in environ.items() if name != BACKENDS_VARIABLE}
    settings, sources = settle_settings(
        CoordinatorSettings, file=file, content=content, environ=told_environ, flags=flags
    )
    found, origins = _read_tables(tables, file), dict(sources)
    origins |= {f"{BACKENDS}.{name}": f"file {file}" for name in found}
    layers = (
        (environ.get(BACKENDS_VARIABLE, "").split(), f"environment {BACKENDS_VARIABLE}"),
        (backends, "flag --backend"),
    )
    for texts, origin in layers:
        for name, addresses in _read_texts(texts, origin).items():
            old = found.get(name)
            found[name] = BackendSettings(name, addresses) if old is None else replace(old, addresses=addresses)
            origins[f"{BACKENDS}.{name}"] = origin
    return Configuration(settings, tuple(found[name] for name in sorted(found)), origins)


def _read_texts(texts: Sequence[str], origin: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        if not equals or not name or not rest:
            message = f"{text!r:.200} ({origin}) names no backend; write NAME=HOST:PORT, more replicas after commas"
            raise InvalidArgument(Reason.MALFORMED, message, field="backend", allowed="NAME=HOST:PORT[,HOST:PORT]")
        if name in found:
            message = f"backend {name:.100} is named twice ({origin}); put its replicas into one, with commas"
            raise InvalidArgument(Reason.DUPLICATE, message, field="backend")
        found[name] = tuple(part.strip() for part in rest.split(","))
    return found


KINDS = {"tls": bool, "ca_file": Path, "certificate_file": Path, "key_file": Path, "tls_name": str, "token": str,
         "token_file": Path}  # fmt: skip
"""The keys of a `[backends.NAME]` table beside `addresses`."""


def _read_tables(tables: object, file: Path | None) -> dict[str, BackendSettings]:
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        message = f"backends in {file} must be tables: [backends.NAME] with addresses = ['HOST:PORT']"
        raise InvalidArgument(Reason.MALFORMED, message, field=BACKENDS)
    folder = Path() if file is None else file.parent
    return {name: _read_table(name, table, folder) for name, table in tables.items()}


def _read_table(name: str, table: Mapping[str, object], folder: Path) -> BackendSettings:
    where = f"{BACKENDS}.{name}"
    addresses = table.get("addresses")
    if not isinstance(addresses, list) or not all(isinstance(one, str) for one in addresses):
        message = f"{where}.addresses must be a list of texts like 'HOST:PORT'"
        raise InvalidArgument(Reason.MALFORMED, message, field=f"{where}.addresses")
    more: dict[str, object] = {}
    for key, value in table.items():
        kind = KINDS.get(key)
        if key == "addresses":
            continue
        if kind is None:
            allowed = ", ".join(("addresses", *KINDS))
            message = f"{where}.{key} is not a setting of a backend; known are {allowed}"
            raise InvalidArgument(Reason.UNKNOWN_FIELD, message, field=f"{where}.{key}", allowed=allowed)
        wanted = str if kind is Path else kind
        if not isinstance(value, wanted) or value == "":
            told = "true or false" if kind is bool else "text"
            raise InvalidArgument(Reason.MALFORMED, f"{where}.{key} must be {told}", field=f"{where}.{key}")
        more[key] = folder / value if kind is Path else value  # type: ignore[operator]
    return BackendSettings(name, tuple(addresses), **more)  # type: ignore[arg-type]
