"""YAML and JSON read as plain values that still know their line, so that a mistake can be shown where it stands.

YAML is read by the core rules of version 1.2: `no` is text, `1e-4` is a number. Tags, anchors and aliases are refused,
and no key stands twice. It knows text. It must not know what a document means.
"""

from __future__ import annotations

import bisect
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import yaml

from dualtrace.problems import InvalidArgument, Problem, Reason
from dualtrace.records import parse_json

MAX_DEPTH = 64
INT64 = 2**63
_INT = re.compile(r"[-+]?[0-9]{1,19}")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip
_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_JSON = json.JSONDecoder()

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Marked:
    """A value and where it stands."""

    value: Scalar | list[Marked] | dict[str, Marked]
    file: str
    line: int  # 1-based; an entry of an object stands where its key does

    def plain(self) -> object:
        """The value without its marks."""
        match self.value:
            case dict():
                return {key: entry.plain() for key, entry in self.value.items()}
            case list():
                return [entry.plain() for entry in self.value]
            case scalar:
                return scalar

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"

    def refuse(self, reason: Reason, message: str, allowed: str = "") -> NoReturn:
        told = f"{message}; it can be {allowed}" if allowed else message
        raise InvalidArgument(reason, told, field=self.where, allowed=allowed)


def name_kind(value: object) -> str:
    """What people call it."""
    names: dict[type, str] = {
        dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a whole number", float: "a number"
    }  # fmt: skip
    return "nothing" if value is None else names[type(value)]


def read_documents(text: str, file: str, *, is_json: bool) -> tuple[Marked, ...]:
    """The documents of a text: one of JSON, or those that `---` parts in YAML. Empty ones are left out."""
    return (_read_json(text, file),) if is_json else tuple(_read_yaml(text, file))


def place(problem: Problem, at: Marked, path: str) -> InvalidArgument:
    """The problem of a part that was read by somebody else, told with the place in the file."""
    detail = problem.detail
    path = f"{path}.{detail.field}" if detail.field and path else path or detail.field
    message = f"{path}: {detail.message}" if path else detail.message
    return InvalidArgument(detail.reason, message, field=at.where, allowed=detail.allowed)


def _add(found: dict[str, Marked], key: str, value: Marked) -> None:
    if key in found:
        first = found[key].line
        value.refuse(Reason.DUPLICATE, f"the key {key!r:.80} stands twice in one object, first in line {first}")
    found[key] = value


# ---- YAML


def _read_yaml(text: str, file: str) -> Iterator[Marked]:
    try:
        # Composed and never constructed: no object of any kind can come out of a file.
        for node in yaml.compose_all(text, _PlainLoader):
            marked = _mark(node, file, MAX_DEPTH)
            if marked.value is not None:
                yield marked
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if mark else file
        message = f"it is not valid YAML: {error.problem or error.context}"
        raise InvalidArgument(Reason.MALFORMED, message, field=where) from None
    except yaml.YAMLError as error:
        message = f"it is not valid YAML: {str(error).splitlines()[0]:.200}"
        raise InvalidArgument(Reason.MALFORMED, message, field=file) from None
    except RecursionError:
        raise InvalidArgument(Reason.NESTED_TOO_DEEP, "it is nested too deep to be read", field=file) from None


class _PlainLoader(yaml.SafeLoader):
    """Refuses anchors, since with aliases a small file can stand for an endless one, and tags, which nothing needs."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            self._refuse(event, "anchors and aliases (& and *) are not taken here; write the value out")
        if event.tag is not None:
            self._refuse(event, f"the tag {event.tag:.60} is not taken here; leave it out")
        return super().compose_node(parent, index)

    def _refuse(self, event: yaml.Event, problem: str) -> NoReturn:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)  # type: ignore[arg-type]  # C's or ours


def _mark(node: yaml.Node, file: str, levels: int) -> Marked:
    shell = Marked(None, file, node.start_mark.line + 1)
    if levels == 0:
        shell.refuse(Reason.NESTED_TOO_DEEP, f"it is nested deeper than {MAX_DEPTH} levels")
    match node:
        case yaml.MappingNode():
            return Marked(_mark_entries(node, file, levels), file, shell.line)
        case yaml.SequenceNode():
            return Marked([_mark(entry, file, levels - 1) for entry in node.value], file, shell.line)
    assert isinstance(node, yaml.ScalarNode)
    # A style is set where it is quoted or a block: then it is text, whatever it looks like.
    return Marked(_read_plain(str(node.value), shell) if node.style is None else str(node.value), file, shell.line)


def _mark_entries(node: yaml.MappingNode, file: str, levels: int) -> dict[str, Marked]:
    found: dict[str, Marked] = {}
    for key_node, value_node in node.value:
        key = _mark(key_node, file, levels - 1)
        if not isinstance(key.value, str):
            key.refuse(Reason.MALFORMED, f"{name_kind(key.value)} stands where a key must; keys are text")
        value = _mark(value_node, file, levels - 1)
        _add(found, key.value, Marked(value.value, file, key.line))
    return found


def _read_plain(text: str, shell: Marked) -> Scalar:
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        value = int(text)
        if not -INT64 <= value < INT64:
            shell.refuse(Reason.OUT_OF_RANGE, f"the number {text} does not fit 64 bits")
        return value
    if _NOT_FINITE.fullmatch(text):
        shell.refuse(Reason.NOT_FINITE, f"{text} stands where a number must")
    if _FLOAT.fullmatch(text):
        number = float(text)
        if not math.isfinite(number):
            shell.refuse(Reason.NOT_FINITE, f"the number {text:.40} is too large to be read")
        return number
    return text


# ---- JSON


def _read_json(text: str, file: str) -> Marked:
    try:
        parse_json(text, "it")  # all that is strict about JSON but the lines
    except Problem as problem:
        detail = problem.detail
        if detail.reason is not Reason.DUPLICATE:  # that one is found again below, with its line
            raise InvalidArgument(detail.reason, detail.message, field=file, allowed=detail.allowed) from None
    return _JsonMarks(text, file).read()


class _JsonMarks:
    """Reads valid JSON once more, for the places."""

    def __init__(self, text: str, file: str) -> None:
        self._text, self._file = text, file
        self._ends = [match.start() for match in re.finditer("\n", text)]
        self._at = 0

    def read(self, levels: int = MAX_DEPTH) -> Marked:
        start = self._skip()
        shell = Marked(None, self._file, self._line(start))
        if levels == 0:
            shell.refuse(Reason.NESTED_TOO_DEEP, f"it is nested deeper than {MAX_DEPTH} levels")
        match self._text[start]:
            case "{":
                return Marked(self._object(levels), self._file, shell.line)
            case "[":
                return Marked([value for _, value in self._entries("]", levels)], self._file, shell.line)
        value: Scalar
        value, self._at = _JSON.raw_decode(self._text, start)
        if isinstance(value, int) and not -INT64 <= value < INT64:
            shell.refuse(Reason.OUT_OF_RANGE, "the number does not fit 64 bits")
        return Marked(value, self._file, shell.line)

    def _object(self, levels: int) -> dict[str, Marked]:
        found: dict[str, Marked] = {}
        for key, value in self._entries("}", levels):
            _add(found, key, value)
        return found

    def _entries(self, end: str, levels: int) -> Iterator[tuple[str, Marked]]:
        self._at += 1
        while self._text[self._skip()] != end:
            line, key = self._line(self._at), ""
            if end == "}":
                key, self._at = _JSON.raw_decode(self._text, self._at)
                self._at = self._skip() + 1  # the colon
            value = self.read(levels - 1)
            yield key, Marked(value.value, self._file, line if end == "}" else value.line)
            if self._text[self._skip()] == ",":
                self._at += 1
        self._at += 1

    def _skip(self) -> int:
        found = _JSON_SPACE.match(self._text, self._at)
        self._at = found.end() if found else self._at
        return self._at

    def _line(self, index: int) -> int:
        return bisect.bisect_left(self._ends, index) + 1
