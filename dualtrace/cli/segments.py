"""Named segments and reads on a command line: token ranges as written, or found by a regular expression in the text.

Expressions are run here and never on a server: one that takes for ever hurts only whoever wrote it, and Ctrl-C ends it.
It must not know masks beyond the names of their segments.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from dualtrace.cli.visible import show_line, show_piece
from dualtrace.problems import InvalidArgument, Problem, Reason

if TYPE_CHECKING:
    from dualtrace.masks.spec import SegmentName, Span
    from dualtrace.questions.asked import Input
    from dualtrace.scorer import Scorer

Function = Callable[..., Any]
Segments = tuple[tuple["SegmentName", tuple[int, int]], ...]

MAX_REGEX_CHARS = 200_000  # of a text that expressions are run over
_RANGE = re.compile(r"([0-9]{1,9}):([0-9]{1,9})")


@dataclass(frozen=True)
class SegmentsAsked:
    """As written: ranges are known, expressions still need the text and its tokens."""

    ranges: tuple[tuple[str, tuple[int, int]], ...] = ()
    expressions: tuple[tuple[str, str], ...] = ()

    async def resolve(self, given: Input, scorer: Scorer | None, deadline: float | None) -> Segments:
        """Token ranges by name. Tells on standard error what each expression came to."""
        from dualtrace.masks.spec import SegmentName

        found = list(self.ranges)
        if self.expressions:
            found += await _find_all(self.expressions, given, scorer, deadline)
        return tuple((SegmentName(name), span) for name, span in found)


def segment_options(function: Function) -> Function:
    """--segment and --segment-regex; the function gets one `segments`."""

    @functools.wraps(function)
    def command(*args: Any, segment: tuple[str, ...], segment_regex: tuple[str, ...], **given: Any) -> Any:
        return function(*args, segments=read_segments(segment, segment_regex), **given)

    wrapped: Function = click.option(
        "--segment-regex", multiple=True, metavar="NAME=REGEX",
        help="The same where a Python regular expression matches the text, which it must do exactly once.",
    )(command)  # fmt: skip
    return click.option(
        "--segment", multiple=True, metavar="NAME=START:END",
        help="Name tokens START to END-1, for masks that say query, item, prompt or completion.",
    )(wrapped)  # fmt: skip


def read_segments(ranges: Sequence[str], expressions: Sequence[str]) -> SegmentsAsked:
    named = [_split(text, "--segment") for text in ranges]
    patterns = [_split(text, "--segment-regex") for text in expressions]
    names = [name for name, _ in named + patterns]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidArgument(Reason.DUPLICATE, f"segment {twice} stands twice; name it once", field="--segment")
    for name, pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            message = f"{name}={pattern:.80} is no regular expression: {error}"
            raise InvalidArgument(Reason.MALFORMED, message, field="--segment-regex") from None
    return SegmentsAsked(tuple((name, parse_range(text, "--segment")) for name, text in named), tuple(patterns))


def _split(text: str, option: str) -> tuple[str, str]:
    from dualtrace.masks.spec import SegmentName

    allowed = ", ".join(name.value for name in SegmentName)
    name, equals, rest = text.partition("=")
    if not equals or not rest:
        raise InvalidArgument(Reason.MALFORMED, f"{text!r:.80} is not NAME=...", field=option, allowed=allowed)
    if name not in {known.value for known in SegmentName}:
        message = f"segment {name!r:.40} asked; masks know {allowed}"
        raise InvalidArgument(Reason.UNKNOWN_ENUM_VALUE, message, field=option, allowed=allowed)
    return name, rest


def parse_range(text: str, option: str) -> tuple[int, int]:
    match = _RANGE.fullmatch(text)
    if match is None:
        message = f"{text!r:.40} is no range of tokens; write START:END, the end exclusive, like 3:9"
        raise InvalidArgument(Reason.MALFORMED, message, field=option)
    return int(match[1]), int(match[2])


def parse_read(text: str) -> Span:
    """Tokens to read: START:END, or the name of a segment."""
    from dualtrace.masks.spec import Named, SegmentName, TokenRange

    if text in {name.value for name in SegmentName}:
        return Named(SegmentName(text))
    start, end = parse_range(text, "--read")
    try:
        return TokenRange(start, end)
    except Problem as problem:
        raise problem.at(under="--read") from None


async def _find_all(
    expressions: Sequence[tuple[str, str]], given: Input, scorer: Scorer | None, deadline: float | None
) -> list[tuple[str, tuple[int, int]]]:
    from dualtrace.masks.resolve import tokens_of_characters
    from dualtrace.masks.spec import Alignment, CharRange
    from dualtrace.questions.asked import TokenizeQuestion
    from dualtrace.scorer import ask_one

    if given.text is None or scorer is None:
        message = "an expression is matched in a text, with a TARGET that knows its tokens; ids have --segment"
        raise InvalidArgument(Reason.CONFLICT, message, field="--segment-regex")
    spans = [(name, find_once(pattern, given.text, name)) for name, pattern in expressions]
    tokens = (await ask_one(scorer, TokenizeQuestion((given,)), deadline=deadline)).results[0]
    if isinstance(tokens, Problem):
        raise tokens
    assert tokens.starts is not None
    assert tokens.ends is not None
    found = []
    for name, (start, end) in spans:
        characters = CharRange(start, end, Alignment.OVERLAP)
        first, last = tokens_of_characters(characters, tokens.starts, tokens.ends, len(given.text))
        pieces = show_line("".join(show_piece(piece) for piece in tokens.pieces[first:last]))
        click.echo(f"segment {name}: characters {start}-{end}, tokens {first}:{last}, {pieces}", err=True)
        found.append((name, (first, last)))
    return found


def find_once(pattern: str, text: str, name: str) -> tuple[int, int]:
    """The characters of the only match."""
    if len(text) > MAX_REGEX_CHARS:
        message = f"the text has {len(text)} characters; expressions are run over at most {MAX_REGEX_CHARS}"
        raise InvalidArgument(Reason.TOO_MANY, message, field="--segment-regex", allowed=f"0-{MAX_REGEX_CHARS}")
    matches = re.finditer(pattern, text)
    first, second = next(matches, None), next(matches, None)
    if first is None or second is not None or first.start() == first.end():
        what = "matches nowhere" if first is None else "matches more than once" if second else "matches no characters"
        message = f"{name}={pattern:.80} {what}; write one that matches a part of the text exactly once"
        raise InvalidArgument(Reason.UNALIGNABLE, message, field="--segment-regex")
    return first.start(), first.end()
