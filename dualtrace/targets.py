"""The one grammar for "what to ask", and how each kind becomes a Scorer.

    grpc://HOST:PORT      a running sidecar        grpcs://HOST:PORT  the same over TLS
    torch:DIR             the PyTorch engine over a checkpoint folder, in this process; for DIR here and below the
                          hub id of a model that is in this machine's hub cache will do
    jax:DIR               the JAX engine, likewise; and so every engine that an installed package announces
    reference:DIR         the float64 engine, likewise
    fake:SPEC             the fake engine, SPEC = name=value,... (may be empty)
    py:MODULE:FUNCTION    any logits(ids[T]) -> [T, V]; text needs a tokenizer folder
    FILE.json             a stored run, replayed: it answers its own question and no other
    run:ID                the same out of a coordinator's store
    backend:NAME          a coordinator's backend; it takes part in comparisons only

It knows every kind of Scorer. It must not know questions or what is done with the answers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from dualtrace.callable_engine import CallableEngine, load_function
from dualtrace.client import Client, Connection
from dualtrace.engine import EngineSettings
from dualtrace.engine_registry import find_engine, list_engines
from dualtrace.engine_scorer import EngineScorer
from dualtrace.fake import FakeEngine, fake_tokenizer, parse_spec
from dualtrace.models.hub_cache import find_model
from dualtrace.problems import InvalidArgument, Problem, Reason, rebuild
from dualtrace.runs.run import Run, read_run
from dualtrace.runs.stored_scorer import StoredScorer
from dualtrace.scorer import Scorer
from dualtrace.tokens import Tokenizer

GRAMMAR = (
    "grpc://HOST:PORT, grpcs://HOST:PORT, torch:DIR, jax:DIR, reference:DIR, fake:SPEC, py:MODULE:FUNCTION, "
    "FILE.json, run:ID, backend:NAME"
)
KINDS = ("grpc", "grpcs", "torch", "jax", "reference", "fake", "py", "run", "backend")
FILE = "file"  # the kind of a target that is only a path
COORDINATED = {"run", "backend"}  # kinds that only a coordinator knows
MAX_RUN_BYTES = 256 << 20


@dataclass(frozen=True)
class Target:
    """A parsed target: its kind and the rest of its text."""

    kind: str  # one of KINDS, FILE, or an engine's name
    rest: str

    @property
    def is_engine(self) -> bool:
        """A model that must be loaded: an engine over a checkpoint folder."""
        return self.kind not in {"grpc", "grpcs", "fake", "py", FILE} | COORDINATED

    def __str__(self) -> str:
        if self.kind == FILE:
            return self.rest
        return f"{self.kind}://{self.rest}" if self.kind in {"grpc", "grpcs"} else f"{self.kind}:{self.rest}"


@dataclass(frozen=True)
class TargetOptions:
    """What a target may need beside its name."""

    threads: int = 1
    dtype: str = ""  # of an engine over a checkpoint; "" is the engine's own
    device: str = ""  # "" is the processor
    adapters: tuple[tuple[str, Path], ...] = ()  # (name, PEFT folder), for an engine over a checkpoint
    tokenizer: Path | None = None  # folder with a tokenizer.json, for targets that know none
    token: str | None = None
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    variant: int | None = None  # of a stored run; None: it has one
    coordinator: str = ""  # HOST:PORT, for run:ID


def parse_target(text: str) -> Target:
    if text.endswith(".json") and os.path.isfile(text):
        return Target(FILE, text)
    kind, colon, rest = text.partition(":")
    if not colon or not (kind in KINDS or kind in list_engines()):
        message = f"target {text!r} is not understood; write one of: {GRAMMAR}"
        if os.path.isdir(text):  # unlike Path.is_dir it says no, and does not raise, to a name that is too long
            message += f". Did you mean reference:{text}?"
        elif text.endswith(".json"):
            message += ". There is no such file"
        raise InvalidArgument(Reason.MALFORMED, message, field="target", allowed=GRAMMAR)
    if kind in {"grpc", "grpcs"}:
        if not rest.startswith("//") or len(rest) < 3:
            message = f"target {text!r} names no address; write {kind}://HOST:PORT"
            raise InvalidArgument(Reason.MALFORMED, message, field="target")
        rest = rest[2:]
    elif not rest and kind != "fake":
        message = f"target {text!r} names nothing; write one of: {GRAMMAR}"
        raise InvalidArgument(Reason.MALFORMED, message, field="target", allowed=GRAMMAR)
    return Target(kind, rest)


async def open_target(target: Target, options: TargetOptions) -> Scorer:
    """The Scorer behind a target. Engines are loaded here; a sidecar is not contacted before it is asked."""
    if not target.is_engine:
        _refuse_engine_options(target, options)
    match target.kind:
        case "grpc" | "grpcs":
            return Client(find_connection(target, options))
        case "fake":
            return EngineScorer(FakeEngine(parse_spec(target.rest)), _tokenizer(options) or fake_tokenizer())
        case "file":
            return StoredScorer(read_run_file(Path(target.rest)), target.rest, options.variant)
        case "run":
            return await _fetch_run(target, options)
        case "backend":
            message = f"{target} is a coordinator's; it takes part in comparisons only: use `dualtrace compare`"
            raise InvalidArgument(Reason.CONFLICT, message, field="target")
        case "py":
            name, function = load_function(target.rest)
            return EngineScorer(CallableEngine(name, function), _tokenizer(options))
        case _:
            return _open_engine(target, options)


def read_run_file(path: Path) -> Run:
    """A run document, checked whole; a mistake is named with the file."""
    with path.open("rb") as stream:
        content = stream.read(MAX_RUN_BYTES + 1)
    if len(content) > MAX_RUN_BYTES:
        raise InvalidArgument(Reason.TOO_MANY, f"{path} holds more than {MAX_RUN_BYTES >> 20} MiB", field=str(path))
    try:
        return read_run(content.decode())
    except UnicodeDecodeError as error:
        message = f"{path} is not UTF-8 (byte {error.start}); name a run document"
        raise InvalidArgument(Reason.INVALID_TEXT, message, field=str(path)) from None
    except Problem as problem:
        detail = problem.detail
        message = f"{path} cannot be read as a run: {detail.message}"
        raise rebuild(problem.code, replace(detail, message=message)) from None


async def _fetch_run(target: Target, options: TargetOptions) -> StoredScorer:
    """The run out of the coordinator's store. What the file or the wire holds is checked by whoever reads it."""
    from dualtrace.coordinator_client import CoordinatorClient

    client = CoordinatorClient(find_coordinator(target, options))
    try:
        record = await client.get_run(target.rest)
    finally:
        await client.close()
    return StoredScorer(record.run, str(target), options.variant)


def find_coordinator(target: Target, options: TargetOptions) -> Connection:
    """Where the coordinator is that knows a target."""
    if not options.coordinator:
        message = f"{target} is kept by a coordinator, and none is named; give --coordinator HOST:PORT"
        raise InvalidArgument(Reason.MISSING, message, field="--coordinator")
    return connect_coordinator(
        options.coordinator,
        ca_file=options.ca_file,
        certificate_file=options.certificate_file,
        key_file=options.key_file,
        token=options.token,
    )


def connect_coordinator(
    address: str,
    *,
    ca_file: Path | None = None,
    certificate_file: Path | None = None,
    key_file: Path | None = None,
    token: str | None = None,
) -> Connection:
    """A coordinator's address, HOST:PORT or with a scheme in front, and how to be let in."""
    scheme, separator, rest = address.partition("://")
    host = rest if separator else address
    if (separator and scheme not in {"grpc", "grpcs"}) or not host:
        message = f"coordinator {address!r:.80} is not understood; write HOST:PORT or grpcs://HOST:PORT"
        raise InvalidArgument(Reason.MALFORMED, message, field="--coordinator")
    tls = bool(separator) and scheme == "grpcs"
    if not tls and (ca_file or certificate_file or key_file):
        message = "certificates are for TLS; write --coordinator grpcs://HOST:PORT"
        raise InvalidArgument(Reason.CONFLICT, message, field="--coordinator")
    return Connection(host, tls, ca_file, certificate_file, key_file, token)


def _open_engine(target: Target, options: TargetOptions) -> EngineScorer:
    load = find_engine(target.kind)
    found = find_model(target.rest)
    settings = EngineSettings(
        model=found.directory,
        model_id=found.model_id,
        revision=found.revision,
        dtype=options.dtype,
        device=options.device or "cpu",
        threads=options.threads,
        adapters=options.adapters,
    )
    tokenizer = Tokenizer.from_directory(
        options.tokenizer or found.directory
    )  # first: it is read at once, weights are not
    return EngineScorer(load(settings), tokenizer)


def _refuse_engine_options(target: Target, options: TargetOptions) -> None:
    for name in ("adapters", "dtype", "device"):
        if getattr(options, name):
            remote = target.kind in {"grpc", "grpcs"}
            remedy = "give them to `dualtrace serve`" if remote else "it has no checkpoint; leave them out"
            message = f"{name} given for {target}, which takes none here: {remedy}"
            raise InvalidArgument(Reason.CONFLICT, message, field=name)


def _tokenizer(options: TargetOptions) -> Tokenizer | None:
    return None if options.tokenizer is None else Tokenizer.from_directory(options.tokenizer)


def find_connection(target: Target, options: TargetOptions) -> Connection:
    """Where the sidecar of a grpc or grpcs target is, and how to be let in."""
    _refuse_engine_options(target, options)
    plain = Connection(target.rest, token=options.token)
    if target.kind == "grpc":
        if options.ca_file or options.certificate_file or options.key_file:
            message = "certificates are for TLS; write grpcs:// instead of grpc://"
            raise InvalidArgument(Reason.CONFLICT, message, field="target")
        return plain
    return replace(
        plain,
        tls=True,
        ca_file=options.ca_file,
        certificate_file=options.certificate_file,
        key_file=options.key_file,
    )
