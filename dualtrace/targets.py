"""The one grammar for "what to ask", and how each kind becomes a Scorer.

    grpc://HOST:PORT      a running sidecar        grpcs://HOST:PORT  the same over TLS
    reference:DIR         the float64 engine over a checkpoint folder, in this process
    fake:SPEC             the fake engine, SPEC = name=value,... (may be empty)
    py:MODULE:FUNCTION    any logits(ids[T]) -> [T, V]; text needs a tokenizer folder

It knows every kind of Scorer. It must not know questions or what is done with the answers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from dualtrace.callable_engine import CallableEngine, load_function
from dualtrace.client import Client, Connection
from dualtrace.engine import EngineSettings
from dualtrace.engine_scorer import EngineScorer
from dualtrace.fake import FakeEngine, fake_tokenizer, parse_spec
from dualtrace.problems import InvalidArgument, Reason
from dualtrace.scorer import Scorer
from dualtrace.tokens import Tokenizer

GRAMMAR = "grpc://HOST:PORT, grpcs://HOST:PORT, reference:DIR, fake:SPEC, py:MODULE:FUNCTION"


@dataclass(frozen=True)
class Target:
    """A parsed target: its kind and the rest of its text."""

    kind: str  # grpc, grpcs, reference, fake, py
    rest: str

    def __str__(self) -> str:
        return f"{self.kind}://{self.rest}" if self.kind in {"grpc", "grpcs"} else f"{self.kind}:{self.rest}"


@dataclass(frozen=True)
class TargetOptions:
    """What a target may need beside its name."""

    threads: int = 1
    tokenizer: Path | None = None  # folder with a tokenizer.json, for targets that know none
    token: str | None = None
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None


def parse_target(text: str) -> Target:
    kind, colon, rest = text.partition(":")
    if not colon or kind not in {"grpc", "grpcs", "reference", "fake", "py"}:
        message = f"target {text!r} is not understood; write one of: {GRAMMAR}"
        if os.path.isdir(text):  # unlike Path.is_dir it says no, and does not raise, to a name that is too long
            message += f". Did you mean reference:{text}?"
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
    match target.kind:
        case "grpc" | "grpcs":
            return Client(_connection(target, options))
        case "reference":
            from dualtrace.reference.engine import load

            folder = Path(target.rest)
            engine = load(EngineSettings(model=folder, threads=options.threads))
            return EngineScorer(engine, Tokenizer.from_directory(options.tokenizer or folder))
        case "fake":
            return EngineScorer(FakeEngine(parse_spec(target.rest)), _tokenizer(options) or fake_tokenizer())
        case _:
            name, function = load_function(target.rest)
            return EngineScorer(CallableEngine(name, function), _tokenizer(options))


def _tokenizer(options: TargetOptions) -> Tokenizer | None:
    return None if options.tokenizer is None else Tokenizer.from_directory(options.tokenizer)


def _connection(target: Target, options: TargetOptions) -> Connection:
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
