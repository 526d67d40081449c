"""Asking what a mask allows: of a target, or of the mask package itself for a model of a given shape.

It knows ExplainMask. It must not know how the answer is shown.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dualtrace.cli.inputs import STDIN_OR_FILE, Ask, one_input, parse_prefix
from dualtrace.cli.segments import SegmentsAsked, segment_options
from dualtrace.problems import InvalidArgument, Reason

if TYPE_CHECKING:
    from dualtrace.cli.mask_files import MaskFile
    from dualtrace.cli.output import Tell
    from dualtrace.questions.answers import MaskExplanation
    from dualtrace.questions.asked import ExplainMaskQuestion, Input, MaskForm, MaskWhy
    from dualtrace.questions.compose import Context
    from dualtrace.scorer import Scorer
    from dualtrace.tokens import Prefix

Function = Callable[..., Any]

NAMES = ("--text", "--ids", "--file")
MAX_LENGTH = 131_072
_SHAPE = re.compile(r"([0-9]{1,4}),([0-9]{1,4})")


@dataclass(frozen=True, eq=False)
class Place:
    """Where a mask is used: a sequence, its named segments, and a model of a target or of a shape."""

    given: Input | None  # None: nothing was said
    made_up: bool  # the ids are made up: only how many there are was said
    shape: tuple[int, int] | None  # layers, query heads
    segments: SegmentsAsked
    prefix: Prefix


@dataclass(frozen=True, eq=False)
class Detail:
    """What is wanted beside the numbers."""

    layer: int | None = None
    head: int | None = None
    why: tuple[MaskWhy, ...] = ()
    forms: tuple[MaskForm, ...] = ()
    allow_large: bool = False


def place_options(function: Function) -> Function:
    """The sequence, its segments, and --shape; the function gets one `place`."""

    @functools.wraps(function)
    def command(
        *args: Any, text: str | None, ids: str | None, file: str | None, length: int | None, shape: str | None,
        prefix: str | None, segments: SegmentsAsked, **given: Any,
    ) -> Any:  # fmt: skip
        place = _read_place((text, ids, file), length, shape, prefix, segments)
        return function(*args, place=place, **given)

    options: tuple[Callable[[Function], Function], ...] = (
        click.option("--text", help="The text that the mask is used on."),
        click.option("--ids", metavar="1,2,3", help="The same as token ids."),
        click.option("--file", type=STDIN_OR_FILE, help="The same from a file, - for standard input."),
        click.option("--length", type=click.IntRange(1, MAX_LENGTH), metavar="T", help="T tokens, whatever they are."),
        click.option("--shape", metavar="LAYERS,HEADS",
                     help="Instead of TARGET: a model of so many layers and query heads, without windows of its own."),
        click.option("--prefix", default=None, metavar="none|bos|eos|ID",
                     help="Token in front of the sequence; default: what the tokenizer adds for text, none for ids."),
        segment_options,
    )  # fmt: skip
    wrapped: Function = command
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped


def _read_place(
    given: tuple[str | None, str | None, str | None], length: int | None, shape: str | None, prefix: str | None,
    segments: SegmentsAsked,
) -> Place:  # fmt: skip
    parsed = None
    if shape is not None:
        match = _SHAPE.fullmatch(shape)
        parsed = (int(match[1]), int(match[2])) if match else (0, 0)
        if min(parsed) < 1:
            message = f"shape {shape!r:.40} asked; write LAYERS,HEADS, both at least 1, like 12,8"
            raise InvalidArgument(Reason.MALFORMED, message, field="--shape")
    nothing = all(value is None for value in given)
    if length is not None and not nothing:
        raise InvalidArgument(Reason.CONFLICT, "--length is for a sequence that is not given", field="--length")
    if length is not None:
        import numpy as np

        from dualtrace.questions.asked import Input

        made_up = Input(ids=np.zeros(length, np.int32))
        return Place(made_up, True, parsed, segments, parse_prefix(prefix))
    sequence = None if nothing else one_input(*given, names=NAMES)
    return Place(sequence, False, parsed, segments, parse_prefix(prefix))


def require_place(ask: Ask, place: Place) -> None:
    """A sequence, and exactly one of a target and a shape."""
    if ask.target and place.shape is not None:
        message = "give a TARGET or --shape, not both: a target has a shape of its own"
        raise InvalidArgument(Reason.CONFLICT, message, field="--shape")
    if not ask.target and place.shape is None:
        message = "layers, heads and tokens are those of a model; give a TARGET, or --shape LAYERS,HEADS"
        raise InvalidArgument(Reason.MISSING, message, field="target")
    if place.given is None:
        message = "no sequence; give --text, --ids, --file or --length"
        raise InvalidArgument(Reason.MISSING, message, field="--text")


def explain_all(ask: Ask, place: Place, masks: Sequence[tuple[MaskFile, Detail]]) -> list[MaskExplanation | Exception]:
    """Each mask's explanation, or what is wrong with it there. A target that cannot be asked ends the whole."""
    import asyncio

    from dualtrace.cli.asking import with_scorer

    require_place(ask, place)
    if place.shape is None:

        async def work(scorer: Scorer, deadline: float | None, _tell: Tell) -> list[MaskExplanation | Exception]:
            return [await _kept(_ask(mask, place, detail, scorer, deadline)) for mask, detail in masks]

        return with_scorer(ask, work)
    context = _context(place.shape, ask.tokenizer)
    return asyncio.run(_explain_here(context, place, masks))


async def _explain_here(
    context: Context, place: Place, masks: Sequence[tuple[MaskFile, Detail]]
) -> list[MaskExplanation | Exception]:
    return [await _kept(_answer_here(mask, place, detail, context)) for mask, detail in masks]


async def _kept(work: Any) -> MaskExplanation | Exception:
    """The answer, or the caller's own mistake; everything else is no fact about the mask and is raised."""
    from dualtrace.problems import NotFound, Unsupported

    try:
        found: MaskExplanation = await work
    except (InvalidArgument, NotFound, Unsupported) as problem:
        return problem
    return found


async def _ask(mask: MaskFile, place: Place, detail: Detail, scorer: Scorer, deadline: float | None) -> MaskExplanation:
    from dualtrace.cli.sights import inline_room, send_ahead
    from dualtrace.scorer import ask_one

    fits = not mask.arrays or mask.array_bytes <= await inline_room(scorer)
    spec = mask.inline() if fits else await send_ahead(mask, scorer, deadline)
    question = await _question(spec, place, detail, scorer, deadline)
    return await ask_one(scorer, question, deadline=deadline)


async def _answer_here(mask: MaskFile, place: Place, detail: Detail, context: Context) -> MaskExplanation:
    from dataclasses import replace

    from dualtrace.questions.explain import answer_explain

    question = await _question(mask.usual(), place, detail, None, None)
    return answer_explain(question, replace(context, fetch_array=mask.fetch))


async def _question(
    spec: Any, place: Place, detail: Detail, scorer: Scorer | None, deadline: float | None
) -> ExplainMaskQuestion:
    from dualtrace.questions.asked import ExplainMaskQuestion

    assert place.given is not None
    return ExplainMaskQuestion(
        place.given,
        spec,
        await place.segments.resolve(place.given, scorer, deadline),
        place.prefix,
        detail.layer,
        detail.head,
        detail.forms,
        detail.allow_large,
        detail.why,
    )


def _context(shape: tuple[int, int], tokenizer: Path | None) -> Context:
    """A model of which only the shape is known: any id will do, and texts are as long as masks can be."""
    from dualtrace.card import Limits
    from dualtrace.masks.resolve import Geometry
    from dualtrace.questions.compose import Context
    from dualtrace.tokens import Tokenizer

    words = None if tokenizer is None else Tokenizer.from_directory(tokenizer)
    return Context(2**31 - 1, Limits(MAX_LENGTH), words, geometry=Geometry(*shape), masks=True)
