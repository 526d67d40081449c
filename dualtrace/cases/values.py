"""Typed values out of marked ones: each reader takes a value and its path, and refuses by line what it must not be.

It knows the shapes that any document has. It must not know what a document is about.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from typing import Any, TypeVar

import numpy as np

from dualtrace.arrays import IntArray
from dualtrace.cases.documents import Marked, name_kind, place
from dualtrace.problems import Problem, Reason

T = TypeVar("T")
Word = TypeVar("Word", bound=Enum)
INT32 = 2**31


@dataclass(frozen=True)
class Part:
    """One field of an object: how it is read and how it is written."""

    read: Callable[[Marked, str], Any]
    write: Callable[[Any], Any]


def read_object(node: Marked, path: str, known: Collection[str], needed: Collection[str] = ()) -> dict[str, Marked]:
    if not isinstance(node.value, dict):
        node.refuse(Reason.MALFORMED, f"{path} is {name_kind(node.value)}; an object is needed", ", ".join(known))
    for key, entry in node.value.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            entry.refuse(Reason.UNKNOWN_FIELD, f"{path} has no field {key!r:.60}{hint}", ", ".join(known))
    for name in needed:
        if name not in node.value:
            node.refuse(Reason.MISSING, f"{path} lacks {name}, which it needs")
    return node.value


def read_list(node: Marked, path: str) -> list[Marked]:
    if not isinstance(node.value, list):
        node.refuse(Reason.MALFORMED, f"{path} is {name_kind(node.value)}; a list is needed")
    return node.value


def read_text(node: Marked, path: str) -> str:
    if not isinstance(node.value, str):
        hint = "; put it in quotes" if isinstance(node.value, int | float) else ""
        node.refuse(Reason.MALFORMED, f"{path} is {name_kind(node.value)}; text is needed{hint}")
    try:
        node.value.encode()
    except UnicodeEncodeError:
        node.refuse(Reason.INVALID_TEXT, f"{path} holds half of a surrogate pair, which is no character")
    return node.value


def read_flag(node: Marked, path: str) -> bool:
    if not isinstance(node.value, bool):
        node.refuse(Reason.MALFORMED, f"{path} is {name_kind(node.value)}; true or false is needed")
    return node.value


def read_whole(node: Marked, path: str) -> int:
    if not isinstance(node.value, int) or isinstance(node.value, bool):
        node.refuse(Reason.MALFORMED, f"{path} is {name_kind(node.value)}; a whole number is needed")
    if not -INT32 <= node.value < INT32:
        node.refuse(Reason.OUT_OF_RANGE, f"{path} is {node.value}, beyond 32 bits")
    return node.value


def read_number(node: Marked, path: str) -> float:
    if isinstance(node.value, bool) or not isinstance(node.value, int | float):
        node.refuse(Reason.MALFORMED, f"{path} is {name_kind(node.value)}; a number is needed")
    return float(node.value)


def read_ids(node: Marked, path: str) -> tuple[int, ...]:
    return tuple(read_whole(entry, f"{path}[{index}]") for index, entry in enumerate(read_list(node, path)))


def read_array(node: Marked, path: str) -> IntArray:
    return np.array(read_ids(node, path), dtype=np.int32)  # [T] int32


def same(value: T) -> T:
    return value


TEXT = Part(read_text, same)
FLAG = Part(read_flag, same)
WHOLE = Part(read_whole, same)
NUMBER = Part(read_number, same)
IDS = Part(read_ids, list)


def word_of(kind: type[Word]) -> Part:
    """An enum's value, written in lower case; read in any."""
    words = {str(word.value).lower(): word for word in kind}

    def read(node: Marked, path: str) -> Word:
        text = read_text(node, path)
        if text.lower() not in words:
            node.refuse(Reason.UNKNOWN_ENUM_VALUE, f"{path} is {text!r:.60}", ", ".join(words))
        return words[text.lower()]

    return Part(read, lambda word: str(word.value).lower())


def list_of(part: Part) -> Part:
    """A tuple of the same thing."""

    def read(node: Marked, path: str) -> tuple[Any, ...]:
        return tuple(part.read(entry, f"{path}[{index}]") for index, entry in enumerate(read_list(node, path)))

    return Part(read, lambda values: [part.write(value) for value in values])


def object_of(
    kind: type[T],
    parts: Mapping[str, Part],
    *,
    given: Mapping[str, Any] | None = None,
    fields_of: Mapping[str, str] | None = None,
) -> Part:
    """A dataclass by its fields. Fields with a default may be left out, and are left out when they hold it.

    `given` are fields that do not stand in the document, `fields_of` those that have another name there.
    """
    names = {name: (fields_of or {}).get(name, name) for name in parts}
    of_field = {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]  # a dataclass
    defaults = {name: of_field[names[name]] for name in parts}
    needed = [name for name, default in defaults.items() if default is MISSING]

    def read(node: Marked, path: str) -> T:
        found = read_object(node, path, parts, needed)
        values = {names[name]: parts[name].read(entry, f"{path}.{name}") for name, entry in found.items()}
        return build(node, path, lambda: kind(**values, **(given or {})))

    def write(value: T) -> dict[str, Any]:
        held = {name: getattr(value, names[name]) for name in parts}
        told = {name: one for name, one in held.items() if defaults[name] is MISSING or one != defaults[name]}
        return {name: parts[name].write(one) for name, one in told.items()}

    return Part(read, write)


def build(node: Marked, path: str, work: Callable[[], T]) -> T:
    """What the value's own type refuses is told with the place in the file."""
    try:
        return work()
    except Problem as problem:
        raise place(problem, node, path) from None
