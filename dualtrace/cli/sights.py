"""Masks and views on a command line: their options, the grammar of a view, and the variants that they make.

It knows how people write them. It must not know what is asked under them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from dualtrace.cli.inputs import STDIN_OR_FILE
from dualtrace.problems import InvalidArgument, Reason
from dualtrace.view_form import VIEWS, parse_view, write_view
from dualtrace.views import BASE, View

if TYPE_CHECKING:
    from dualtrace.cli.mask_files import MaskFile
    from dualtrace.masks.spec import MaskSpec
    from dualtrace.questions.asked import Variant
    from dualtrace.scorer import Scorer

Function = Callable[..., Any]

__all__ = ["VIEWS", "Sights", "inline_room", "parse_view", "read_sights", "send_ahead", "sight_options", "write_view"]


@dataclass(frozen=True, eq=False)
class Sights:
    """The faces and masks a question is asked under."""

    masks: tuple[MaskFile, ...] = ()
    views: tuple[View, ...] = ()
    allow_leak: bool = False
    with_base: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each variant, in order."""
        found = [_label(mask, view) for mask, view in self._pairs()]
        return tuple(["base", *found] if self._adds_base() else found)

    async def variants(self, scorer: Scorer, deadline: float | None) -> tuple[Variant, ...]:
        """Every mask under every view; arrays that are too large to stand in a request are sent ahead now."""
        from dualtrace.questions.asked import Variant

        specs: dict[int, MaskSpec] = {}
        times = len(self.views) or 1  # each view repeats the mask, and all of a request share its message
        room = await inline_room(scorer) if any(mask.arrays for mask in self.masks) else 0
        for mask in self.masks:
            fits = mask.array_bytes * times <= room
            room -= mask.array_bytes * times if fits else 0
            specs[id(mask)] = mask.inline() if fits else await send_ahead(mask, scorer, deadline)
        variants = [
            Variant(view, None if mask is None else specs[id(mask)], self.allow_leak and mask is not None)
            for mask, view in self._pairs()
        ]
        return tuple([Variant(), *variants] if self._adds_base() else variants)

    def _pairs(self) -> list[tuple[MaskFile | None, View]]:
        masks: Sequence[MaskFile | None] = self.masks or (None,)
        return [(mask, view) for mask in masks for view in self.views or (BASE,)]

    def _adds_base(self) -> bool:
        return self.with_base and (None, BASE) not in self._pairs()


def _label(mask: MaskFile | None, view: View) -> str:
    if mask is None:
        return str(view)
    return mask.label if view == BASE else f"{mask.label} · {view}"


async def inline_room(scorer: Scorer) -> int:
    """How many bytes of arrays may stand in one request to this scorer."""
    from dualtrace.masks.limits import DEFAULT_LIMITS

    return min((await scorer.describe()).limits.max_inline_array_bytes, DEFAULT_LIMITS.inline_bytes)


async def send_ahead(mask: MaskFile, scorer: Scorer, deadline: float | None) -> MaskSpec:
    """Send the mask's arrays, which its spec names by their digests."""
    from dualtrace.questions.asked import ArtifactQuestion
    from dualtrace.scorer import ask_one

    for digest, data in mask.arrays.items():
        await ask_one(scorer, ArtifactQuestion(data, digest), deadline=deadline)
    return mask.spec


def sight_options(function: Function) -> Function:
    """--mask, --view and what goes with them; the function gets one `sights`."""

    @functools.wraps(function)
    def command(
        *args: Any, mask: tuple[str, ...], view: tuple[str, ...], allow_leak: bool, with_base: bool, **given: Any
    ) -> Any:
        return function(*args, sights=read_sights(mask, view, allow_leak, with_base), **given)

    options: tuple[Callable[[Function], Function], ...] = (
        click.option("--mask", multiple=True, type=STDIN_OR_FILE, metavar="FILE.json",
                     help="Who may see whom, as docs/masks.md says; repeat it for several variants."),
        click.option("--view", multiple=True, metavar="VIEW",
                     help=f"Whose weights: {VIEWS}; repeat it for several variants."),
        click.option("--allow-leak", is_flag=True, help="Read rows that see the token they predict."),
        click.option("--with-base", is_flag=True, help="Also the model as it is, first, to compare with."),
    )  # fmt: skip
    wrapped: Function = command
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped


def read_sights(masks: Sequence[str], views: Sequence[str], allow_leak: bool, with_base: bool) -> Sights:
    from dualtrace.cli.mask_files import read_mask

    if list(masks).count("-") > 1:
        raise InvalidArgument(Reason.DUPLICATE, "standard input can be read once", field="--mask")
    if allow_leak and not masks:
        message = "--allow-leak is about masks, and none was given; leave it out"
        raise InvalidArgument(Reason.CONFLICT, message, field="--allow-leak")
    read = {path: read_mask(path) for path in masks}
    return Sights(tuple(read[path] for path in masks), tuple(map(parse_view, views)), allow_leak, with_base)
