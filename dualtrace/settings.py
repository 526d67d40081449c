"""Settings: defaults < file < environment < flags, read once in `read_settings` and passed down.

It knows what each setting means, its range, and where a value came from. It must not know who uses a setting, and it
opens no file but the settings file itself: a certificate's path is only a path here.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from dualtrace.problems import InvalidArgument, NotFound, Reason

Value = str | int | float | bool | Path | None
Sources = Mapping[str, str]
"""Where each setting came from, by name: "default", "file NAME", "environment NAME" or "flag --name"."""

T = TypeVar("T")
S = TypeVar("S")

ENVIRONMENT_PREFIX = "DUALTRACE_"
COORDINATOR_PREFIX = "DUALTRACE_COORDINATOR_"
"""Apart from the sidecars', so that one environment can hold the settings of both."""
ENVIRONMENT_OF_OTHERS = frozenset({"DUALTRACE_CACHE", "DUALTRACE_COORDINATOR", "DUALTRACE_DATA"})
"""Variables with our prefix that are no setting: who reads them says so here, so that they are not refused."""

HIDDEN = "***"


def setting(
    default: T, meaning: str, *, low: float | None = None, high: float | None = None, secret: bool = False
) -> T:
    """A field of a settings class: its default, what it means, and the range that is allowed, ends included."""
    field: Any = dataclasses.field(
        default=default, metadata={"meaning": meaning, "low": low, "high": high, "secret": secret}
    )
    return field  # type: ignore[no-any-return]  # as dataclasses.field itself: a Field that stands for a T


@dataclass(frozen=True)
class SettingField:
    """One setting as flags, documents and checks need it."""

    name: str
    kind: type  # str, int, float, bool or Path
    optional: bool  # None is allowed and means "off" or "not there"
    default: Value
    meaning: str
    low: float | None
    high: float | None
    secret: bool
    prefix: str = ENVIRONMENT_PREFIX

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def environment(self) -> str:
        return self.prefix + self.name.upper()

    @property
    def allowed(self) -> str:
        """The allowed values in words, empty when every value of the kind is."""
        if self.kind is bool:
            return "true or false"
        if self.low is None and self.high is None:
            return ""
        low, high = (
            format(end, "g" if self.kind is float else ".0f") if end is not None else ""
            for end in (self.low, self.high)
        )
        span = f"{low} to {high}" if low and high else f"{low} or more" if low else f"{high} or less"
        return f"{span}, or empty for none" if self.optional else span

    def show(self, value: Value) -> str:
        if value is None:
            return "none"
        return HIDDEN if self.secret else str(value).lower() if isinstance(value, bool) else str(value)


def list_settings(cls: type) -> tuple[SettingField, ...]:
    """The settings of a class in their order."""
    hints = get_type_hints(cls)
    prefix = _prefix_of(cls)
    return tuple(_describe_field(field, hints[field.name], prefix) for field in fields(cls))


def _prefix_of(cls: type) -> str:
    """Of its environment variables; a class that is not a sidecar's says so in `environment_prefix`."""
    prefix: str = getattr(cls, "environment_prefix", ENVIRONMENT_PREFIX)
    return prefix


def _describe_field(field: dataclasses.Field[Any], hint: Any, prefix: str) -> SettingField:
    kinds = get_args(hint) if get_origin(hint) in {Union, UnionType} else (hint,)
    plain = [kind for kind in kinds if kind is not NoneType]
    if len(plain) != 1 or plain[0] not in {str, int, float, bool, Path}:
        raise TypeError(f"setting {field.name}: {hint} is not str, int, float, bool or Path, each perhaps | None")
    if field.default is MISSING or "meaning" not in field.metadata:
        raise TypeError(f"setting {field.name}: declare it with setting(default, meaning)")
    return SettingField(field.name, plain[0], len(kinds) > 1, field.default, **field.metadata, prefix=prefix)


def read_settings(
    cls: type[S], *, file: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]
) -> tuple[S, Sources]:
    """Read every source once. A flag that is None was not given; an unknown name is refused wherever it stands."""
    return settle_settings(cls, file=file, content=read_toml(file), environ=environ, flags=flags)


def settle_settings(
    cls: type[S],
    *,
    file: Path | None,
    content: Mapping[str, object],
    environ: Mapping[str, str],
    flags: Mapping[str, object],
) -> tuple[S, Sources]:
    """`read_settings` for a file that was read already, because it holds more than settings."""
    known = {field.name: field for field in list_settings(cls)}
    values: dict[str, Value] = {}
    sources = dict.fromkeys(known, "default")
    of_file = {name: (f"file {file}", value) for name, value in content.items()}
    layers = (of_file, _read_environment(environ, _prefix_of(cls)), _read_flags(flags))
    for layer in layers:
        for name, (origin, raw) in layer.items():
            field = known.get(name) or _refuse_unknown(name, origin, known)
            value = _convert(field, raw, origin)
            if file is not None and origin.startswith("file ") and isinstance(value, Path):
                value = file.parent / value  # a path in a file is meant from where the file stands
            _check_range(field, value, origin)
            values[name], sources[name] = value, origin
    return cls(**values), sources


def check_settings(settings: object) -> None:
    """Check the ranges of an object that was made without `read_settings`."""
    for field in list_settings(type(settings)):
        _check_range(field, getattr(settings, field.name), "set in code")


def show_settings(settings: object, sources: Sources) -> str:
    """What `--print-config` prints: `name = value  (source)`, a line each, secrets hidden."""
    pairs = [
        (f"{field.name} = {field.show(getattr(settings, field.name))}", sources[field.name])
        for field in list_settings(type(settings))
    ]
    width = max((len(left) for left, _ in pairs), default=0)
    return "\n".join(f"{left:<{width}}  ({source})" for left, source in pairs)


Layer = dict[str, tuple[str, object]]  # name -> (origin in words, raw value)


def read_toml(file: Path | None) -> dict[str, object]:
    """What a settings file holds; nothing where there is none."""
    if file is None:
        return {}
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(Reason.NOT_FOUND, f"settings file {file} does not exist; name one that does") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(Reason.MALFORMED, f"settings file {file} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(Reason.MALFORMED, f"settings file {file} is not valid TOML: {error}") from error


def _read_environment(environ: Mapping[str, str], prefix: str) -> Layer:
    names = sorted(name for name in environ if name.startswith(prefix) and not _is_of_others(name, prefix))
    return {name.removeprefix(prefix).lower(): (f"environment {name}", environ[name]) for name in names}


def _is_of_others(name: str, prefix: str) -> bool:
    return name in ENVIRONMENT_OF_OTHERS or (prefix == ENVIRONMENT_PREFIX and name.startswith(COORDINATOR_PREFIX))


def _read_flags(flags: Mapping[str, object]) -> Layer:
    given = {name: value for name, value in flags.items() if value is not None}
    return {name: (f"flag --{name.replace('_', '-')}", value) for name, value in given.items()}


def _refuse_unknown(name: str, origin: str, known: Mapping[str, SettingField]) -> SettingField:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
    raise InvalidArgument(Reason.UNKNOWN_FIELD, f"{name!r} ({origin}) is not a setting; {hint}", field=name)


def _convert(field: SettingField, raw: object, origin: str) -> Value:
    """The raw value as the field's kind. Text is parsed; anything else must be of the kind already."""
    from_text = not origin.startswith("file ")  # a file has types of its own: a quoted number is a mistake there
    if field.optional and raw == "":
        return None
    if field.kind is bool and isinstance(raw, bool):
        return raw
    if field.kind is bool and from_text and isinstance(raw, str) and raw.lower() in {"true", "false", "1", "0"}:
        return raw.lower() in {"true", "1"}
    if field.kind is Path and isinstance(raw, str | Path) and str(raw):
        return Path(raw)
    if field.kind is str and isinstance(raw, str):
        return raw
    if field.kind in {int, float} and not isinstance(raw, bool):
        if isinstance(raw, field.kind) or (field.kind is float and isinstance(raw, int)):
            return field.kind(raw)
        if from_text and isinstance(raw, str):
            return _parse_number(field, raw, origin)
    raise _malformed(field, raw, origin)


def _parse_number(field: SettingField, raw: str, origin: str) -> Value:
    try:
        return field.kind(raw)  # type: ignore[no-any-return]
    except ValueError:
        raise _malformed(field, raw, origin) from None


def _malformed(field: SettingField, raw: object, origin: str) -> InvalidArgument:
    shown = HIDDEN if field.secret else repr(raw)
    wanted = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}[field.kind]
    message = f"{field.name} = {shown} ({origin}) is not {wanted}. It is: {field.meaning}."
    return InvalidArgument(Reason.MALFORMED, message, field=field.name, allowed=field.allowed)


def _check_range(field: SettingField, value: Value, origin: str) -> None:
    if field.kind is str and value == "":
        raise InvalidArgument(
            Reason.EMPTY, f"{field.name} ({origin}) is empty. It is: {field.meaning}.", field=field.name
        )
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    below = field.low is not None and value < field.low
    above = field.high is not None and value > field.high
    if below or above or not math.isfinite(value):
        message = f"{field.name} = {field.show(value)} ({origin}) is out of range; {field.allowed} is allowed."
        raise InvalidArgument(Reason.OUT_OF_RANGE, message, field=field.name, allowed=field.allowed)


@dataclass(frozen=True)
class SidecarSettings:
    """What one sidecar process is told. Every number is checked, also when the object is made in code."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(50051, "port to listen on; 0 takes any free one", low=0, high=65535)
    threads: int = setting(1, "threads of the engine's arithmetic", low=1, high=1024)
    step_tokens: int = setting(256, "tokens a long segment advances per step", low=1, high=1_048_576)
    batch_tokens: int = setting(4096, "token budget of one batch", low=1, high=16_777_216)
    queue_limit: int = setting(256, "calls that may wait; one more is refused", low=1, high=1_000_000)
    buffer_megabytes: int = setting(
        64, "answers kept for a call whose reader is slow, in MiB; more aborts it", low=1, high=65_536
    )
    chunk_tokens: int = setting(64, "scored tokens in one streamed chunk", low=1, high=65_536)
    chunk_milliseconds: int = setting(50, "a chunk that is not full leaves after so long", low=0, high=60_000)
    max_items: int = setting(1024, "items, prompts or completions in one request", low=1, high=1_000_000)
    max_top_k: int = setting(1000, "largest top_k of a request; the vocabulary bounds it too", low=0, high=10_000_000)
    max_request_tokens: int = setting(131_072, "tokens of one request, under all variants", low=1, high=1_000_000_000)
    max_request_chars: int = setting(
        4_000_000, "characters of one request, all texts together", low=1, high=1_000_000_000
    )
    metrics_port: int | None = setting(
        None, "port of the Prometheus metrics; 0 takes any free one, none is off", low=0, high=65535
    )
    drain_seconds: float = setting(20.0, "how long running calls may finish after the stop signal", low=0, high=86_400)
    tls_certificate: Path | None = setting(None, "PEM file of the server's certificate chain; none is plain text")
    tls_key: Path | None = setting(None, "PEM file of the certificate's private key")
    tls_client_ca: Path | None = setting(None, "PEM file of the authority that client certificates must come from")
    token_file: Path | None = setting(None, "file of accepted bearer tokens, one a line; none accepts every caller")
    preflight: bool = setting(True, "run one forward on a fixed text before saying ready")
    warm_up: bool = setting(True, "compile for usual batches before saying ready, where the engine compiles")

    def __post_init__(self) -> None:
        check_settings(self)
        if (self.tls_certificate is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_certificate"
            message = f"tls_certificate and tls_key go together; {missing} is not set. Set both or none."
            raise InvalidArgument(Reason.CONFLICT, message, field=missing)
        if self.tls_client_ca is not None and self.tls_certificate is None:
            message = "tls_client_ca asks callers for certificates, which needs tls_certificate and tls_key as well."
            raise InvalidArgument(Reason.CONFLICT, message, field="tls_client_ca")
