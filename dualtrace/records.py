"""Frozen dataclasses to plain JSON values and back, strictly: the field types say what a document may hold.

    str, int, float, bool    themselves; a float is finite, an int fits 64 bits
    bytes                    text where they are valid UTF-8, else {"hex": "f09f"}
    Enum                     its value
    IntArray                 a list of 32-bit ints
    tuple, dict[int, ...]    a list; an object with decimal keys
    X | None                 X or null
    A | B                    an object; of several dataclasses, the one with exactly its fields (with the most of them,
                             where a later version may have added some)
    MaskSpec                 its canonical JSON twin

It knows types. It must not know what any document means.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from dualtrace.masks import json_form
from dualtrace.masks.spec import MaskSpec
from dualtrace.problems import BadNumbers, InvalidArgument, Problem, Reason

T = TypeVar("T")

MAX_CHARS = 256 << 20
INT64 = 2**63
INT32 = 2**31
_DECIMAL = re.compile(r"0|-?[1-9][0-9]{0,18}")


def malformed(path: str, found: str, wanted: str) -> InvalidArgument:
    return InvalidArgument(Reason.MALFORMED, f"{path or 'the document'} is {found}; {wanted} is needed", field=path)


def to_json(value: object, path: str = "") -> Any:
    """A value of the types above as JSON has it. A number that JSON cannot hold is refused, never written."""
    match value:
        case None | bool() | int() | str():
            return value.value if isinstance(value, Enum) else value
        case float():
            if not math.isfinite(value):
                raise BadNumbers(Reason.NON_FINITE_LOGITS, f"{path} is {value}, which is no answer", field=path)
            return float(value)
        case bytes():
            return _bytes_to_json(value)
        case Enum():
            return value.value
        case MaskSpec():
            return json.loads(json_form.to_json(value))
        case np.ndarray():
            return value.tolist()
        case Mapping():
            return {str(key): to_json(entry, f"{path}.{key}") for key, entry in value.items()}
        case tuple() | list():
            if (column := _plain_column(value)) is not None:
                return column
            return [to_json(entry, f"{path}[{index}]") for index, entry in enumerate(value)]
    assert is_dataclass(value), f"{path}: {type(value).__name__} has no JSON form"
    below = f"{path}." if path else ""
    names, later = _hints(type(value)), _later(type(value))  # type: ignore[arg-type]
    kept = (name for name in names if name not in later or getattr(value, name) != later[name])
    return {name: to_json(getattr(value, name), below + name) for name in kept}


_PLAIN = {int, str, bool, NoneType}


def _plain_column(values: tuple[Any, ...] | list[Any]) -> list[Any] | None:
    """Values of one kind at once, for there may be thousands of tokens; None where each must be looked at."""
    kinds = set(map(type, values))
    if kinds <= _PLAIN:
        return list(values)
    if kinds == {bytes}:
        return list(map(_bytes_to_json, values))
    if len(kinds) == 1 and issubclass(next(iter(kinds)), Enum):
        return [value._value_ for value in values]
    if (kinds == {float} and all(map(math.isfinite, values))) or (
        kinds == {float, NoneType} and all(value is None or math.isfinite(value) for value in values)
    ):
        return list(values)
    return None


def _bytes_to_json(value: bytes) -> str | dict[str, str]:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"hex": value.hex()}


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Field name -> type, in order."""
    hints = get_type_hints(kind)
    assert is_dataclass(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


@cache
def _later(kind: type) -> dict[str, Any]:
    """Fields that came after documents had been written without them (metadata "later"), with their defaults.

    At its default such a field is not written: what was written before stays readable, and is written as it was.
    """
    return {field.name: field.default for field in fields(kind) if field.metadata.get("later")}


def from_json(kind: type[T], raw: object, path: str = "", *, newer: bool = False) -> T:
    """Read an object of a dataclass. `newer`: the document is of a later minor version, so unknown fields are left."""
    if not isinstance(raw, dict):
        raise malformed(path, _name(raw), "an object")
    hints = _hints(kind)  # type: ignore[arg-type]  # a class is hashable
    below = f"{path}." if path else ""
    for name in raw:
        if name not in hints and not newer:
            message = f"{below}{name} is not a field of this version"
            raise InvalidArgument(Reason.UNKNOWN_FIELD, message, field=f"{below}{name}"[:200])
    values = {}
    for name, hint in hints.items():
        if name not in raw and name in _later(kind):  # type: ignore[arg-type]
            continue
        if name not in raw:
            raise InvalidArgument(Reason.MISSING, f"{below}{name} is missing", field=f"{below}{name}")
        values[name] = read_value(hint, raw[name], below + name, newer=newer)
    return kind(**values)


def read_value(hint: Any, raw: object, path: str, *, newer: bool) -> Any:
    """Read one value of a type hint."""
    origin = get_origin(hint)
    if origin in {Union, UnionType}:
        return _read_union(get_args(hint), raw, path, newer)
    if origin is tuple:
        return _read_tuple(get_args(hint), raw, path, newer)
    if origin is dict:
        return _read_numbered(get_args(hint)[1], raw, path, newer)
    if origin is np.ndarray:
        ids = _read_tuple((int, ...), raw, path, newer)
        if any(not -INT32 <= value < INT32 for value in ids):
            raise InvalidArgument(Reason.OUT_OF_RANGE, f"{path} holds a number beyond 32 bits", field=path)
        return np.array(ids, dtype=np.int32)
    if hint is MaskSpec:
        return _read_mask(raw, path)
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return from_json(hint, raw, path, newer=newer)
    return _read_plain(hint, raw, path)


def _read_union(kinds: tuple[Any, ...], raw: object, path: str, newer: bool) -> Any:
    if raw is None and NoneType in kinds:
        return None
    real = [kind for kind in kinds if kind is not NoneType]
    if len(real) > 1:
        real = _choose_kinds(real, raw, newer) if isinstance(raw, dict) else []
        if len(real) != 1:
            names = ", ".join(kind.__name__ for kind in kinds if kind is not NoneType)
            raise malformed(path, _name(raw), f"an object with the fields of one of {names}")
    return read_value(real[0], raw, path, newer=newer)


def _choose_kinds(kinds: list[Any], raw: dict[Any, Any], newer: bool) -> list[Any]:
    """The kinds whose fields these are; in a document of a later version those that leave the fewest of them."""
    fitting = [kind for kind in kinds if set(_hints(kind)) - set(_later(kind)) <= set(raw)]
    unknown = [len(set(raw) - set(_hints(kind))) for kind in fitting]
    least = min(unknown, default=0)
    return [kind for kind, left in zip(fitting, unknown, strict=True) if left == least and (newer or not left)]


def _read_mask(raw: object, path: str) -> MaskSpec:
    """A mask has a version of its own: a field that is not known may forbid or allow, so it is refused, never left."""
    if not isinstance(raw, dict):
        raise malformed(path, _name(raw), "an object")
    try:
        return json_form.parse_json(raw)
    except Problem as problem:
        raise problem.at(under=path) from None


def _read_tuple(kinds: tuple[Any, ...], raw: object, path: str, newer: bool) -> tuple[Any, ...]:
    if not isinstance(raw, list):
        raise malformed(path, _name(raw), "a list")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple([read_value(kinds[0], entry, f"{path}[{i}]", newer=newer) for i, entry in enumerate(raw)])
    if len(raw) != len(kinds):
        raise malformed(path, f"a list of {len(raw)}", f"one of {len(kinds)}")
    pairs = zip(kinds, raw, strict=True)
    return tuple([read_value(kind, entry, f"{path}[{i}]", newer=newer) for i, (kind, entry) in enumerate(pairs)])


def _read_numbered(kind: Any, raw: object, path: str, newer: bool) -> dict[int, Any]:
    if not isinstance(raw, dict):
        raise malformed(path, _name(raw), "an object")
    for key in raw:
        if not _DECIMAL.fullmatch(key):
            raise malformed(path, f"keyed by {key!r:.40}", "a number")
    return {int(key): read_value(kind, entry, f"{path}.{key}", newer=newer) for key, entry in raw.items()}


def _read_plain(kind: Any, raw: object, path: str) -> Any:
    if isinstance(kind, type) and issubclass(kind, Enum):
        allowed = [member.value for member in kind]
        if raw not in allowed:
            wanted = ", ".join(str(value) for value in allowed)
            message = f"{path} is {raw!r:.40}; it can be {wanted}"
            raise InvalidArgument(Reason.UNKNOWN_ENUM_VALUE, message, field=path, allowed=wanted)
        return kind(raw)
    if kind is bytes:
        return _read_bytes(raw, path)
    if kind is float and type(raw) in {int, float}:
        return _read_float(raw, path)
    if type(raw) is not kind:  # not isinstance: true is no int
        raise malformed(
            path, _name(raw), {str: "text", int: "a whole number", float: "a number"}.get(kind, "a boolean")
        )
    if kind is int and not -INT64 <= raw < INT64:  # type: ignore[operator]
        raise InvalidArgument(Reason.OUT_OF_RANGE, f"{path} is beyond 64 bits", field=path)
    return raw


def _read_float(raw: Any, path: str) -> float:
    try:
        value = float(raw)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise InvalidArgument(Reason.NOT_FINITE, f"{path} is not a finite number", field=path)
    return value


def _read_bytes(raw: object, path: str) -> bytes:
    if isinstance(raw, str):
        try:
            return raw.encode()
        except UnicodeEncodeError:
            raise malformed(path, "text with a lone surrogate", "valid Unicode") from None
    if isinstance(raw, dict) and set(raw) == {"hex"} and isinstance(raw["hex"], str):
        if re.fullmatch("(?:[0-9a-f]{2})+", raw["hex"]):
            value = bytes.fromhex(raw["hex"])
            if isinstance(_bytes_to_json(value), dict):
                return value
        raise malformed(path, "not the hex form of bytes that are no text", "text, or such bytes in lower case")
    raise malformed(path, _name(raw), 'text or {"hex": "..."}')


def _name(raw: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "a boolean",
        int: "a whole number",
        float: "a number",
    }
    return "null" if raw is None else names.get(type(raw), type(raw).__name__)


def parse_json(text: str, what: str) -> Any:
    """Strict JSON: no NaN, no Infinity, no number that becomes one, no key twice, no endless nesting, no giant."""
    if len(text) > MAX_CHARS:
        message = f"{what} has {len(text)} characters; at most {MAX_CHARS} are read"
        raise InvalidArgument(Reason.TOO_MANY, message, allowed=f"0-{MAX_CHARS}")
    try:
        return json.loads(
            text, parse_constant=_refuse_constant, parse_float=_parse_float, object_pairs_hook=_unique_keys
        )
    except RecursionError:
        raise InvalidArgument(Reason.NESTED_TOO_DEEP, f"{what} is nested too deep") from None
    except ValueError as error:  # JSONDecodeError, and an int of thousands of digits
        raise InvalidArgument(Reason.MALFORMED, f"{what} is not valid JSON: {error}") from None


def _refuse_constant(name: str) -> None:
    raise InvalidArgument(Reason.NOT_FINITE, f"{name} stands where a number must; JSON has no such number")


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InvalidArgument(Reason.NOT_FINITE, f"the number {text:.40} is too large to be read")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise InvalidArgument(Reason.DUPLICATE, f"the key {twice!r:.80} stands twice in one object")
    return found
