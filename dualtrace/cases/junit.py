"""JUnit XML out of results: what continuous integration servers read.

A difference is a failure, a side that could not answer is an error, what was not run is skipped. It knows names, times
and texts. It must not know how a verdict was found.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from xml.etree.ElementTree import Element, SubElement, indent, tostring

# What XML 1.0 cannot hold, not even escaped.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Outcome(StrEnum):
    PASSED = "passed"
    FAILED = "failure"
    ERRED = "error"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Result:
    """One test as it ended."""

    name: str
    group: str  # the file or suite that it is of
    outcome: Outcome
    seconds: float
    kind: str = ""  # of what went wrong: a verdict or a reason
    message: str = ""  # one line
    text: str = ""  # all there is to say
    properties: tuple[tuple[str, str], ...] = ()


def write_junit(suite: str, results: Sequence[Result], started: datetime, seconds: float) -> str:
    """The whole document, ending in a newline."""
    root = Element("testsuites", _counts(results, seconds) | {"name": _clean(suite)})
    below = SubElement(root, "testsuite", _counts(results, seconds) | {"name": _clean(suite)})
    below.set("timestamp", started.replace(tzinfo=None).isoformat(timespec="seconds"))
    for result in results:
        _add_result(below, result)
    indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def _counts(results: Sequence[Result], seconds: float) -> dict[str, str]:
    def count(outcome: Outcome) -> str:
        return str(sum(result.outcome is outcome for result in results))

    return {
        "tests": str(len(results)),
        "failures": count(Outcome.FAILED),
        "errors": count(Outcome.ERRED),
        "skipped": count(Outcome.SKIPPED),
        "time": f"{seconds:.3f}",
    }


def _add_result(suite: Element, result: Result) -> None:
    test = SubElement(suite, "testcase", {"name": _clean(result.name), "classname": _clean(result.group)})
    test.set("time", f"{result.seconds:.3f}")
    if result.properties:
        properties = SubElement(test, "properties")
        for name, value in result.properties:
            SubElement(properties, "property", {"name": _clean(name), "value": _clean(value)})
    if result.outcome is Outcome.PASSED:
        if result.text:
            SubElement(test, "system-out").text = _clean(result.text)
        return
    told = SubElement(test, result.outcome.value, {"message": _clean(result.message)})
    if result.outcome is not Outcome.SKIPPED:
        told.set("type", _clean(result.kind))
        told.text = _clean(result.text or result.message)


def _clean(text: str) -> str:
    """What XML cannot hold is written as an escape."""
    return _FORBIDDEN.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
