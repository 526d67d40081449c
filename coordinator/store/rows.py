"""What every table does alike: texts that a column can hold, the time, pages, and documents that must be readable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from coordinator.store.pages import PageRequest
from dualtrace.library import Page
from dualtrace.problems import Internal, InvalidArgument, Problem, Reason
from dualtrace.records import MAX_CHARS

T = TypeVar("T")
R = TypeVar("R", bound=Sequence[Any])


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def check_text(text: str, field: str) -> str:
    """A text that every database can hold: no lone surrogate, no NUL."""
    try:
        text.encode()
    except UnicodeEncodeError:
        message = f"{field} holds a lone surrogate; valid Unicode is needed"
        raise InvalidArgument(Reason.INVALID_TEXT, message, field=field) from None
    if "\0" in text:
        raise InvalidArgument(Reason.INVALID_TEXT, f"{field} holds a NUL; leave it out", field=field)
    return text


def clean_text(text: str) -> str:
    """A text for people, which must not fail for a character: what cannot be kept is written out."""
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\0")


def check_document(text: str, what: str) -> str:
    """A document that can be read again later."""
    if len(text) > MAX_CHARS:
        message = f"{what} has {len(text)} characters; at most {MAX_CHARS} are kept: ask less at once"
        raise InvalidArgument(Reason.TOO_MANY, message, allowed=f"0-{MAX_CHARS}")
    return check_text(text, what)


def read_document(read: Callable[[str], T], text: str, what: str) -> T:
    """What was stored whole is read whole; if not, the store is at fault and not the caller."""
    try:
        return read(text)
    except Problem as problem:
        message = f"{what} is stored and cannot be read: {problem.detail.message}"
        raise Internal(problem.reason, message, field=problem.detail.field) from problem


def cut_page(rows: Sequence[R], page: PageRequest, make: Callable[[R], T], key: Callable[[R], str]) -> Page[T]:
    """A page of rows of which one more than its size was asked: that one says whether there is a next page."""
    entries = tuple(make(row) for row in rows[: page.size])
    more = len(rows) > page.size
    return Page(entries, page.token_after(key(rows[page.size - 1])) if more else "")
