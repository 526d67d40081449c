"""The short form of a view, as people write it on command lines and in case files: `scaled:NAME:LAMBDA`.

It knows one line of text and views. It must not know where the line stood.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dualtrace.problems import InvalidArgument, Reason
from dualtrace.views import (
    BASE,
    DEFAULT_INIT_SCALE,
    DEFAULT_RANK_SCALE,
    Face,
    Noise,
    View,
    finetuned,
    null,
    scaled,
)

VIEWS = "base, finetuned:NAME, scaled:NAME:LAMBDA, null:NAME:SEED[:init_scale=X][:rank_scale=X][:variance_faithful]"
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?(?:inf|nan)", re.IGNORECASE)
_SEED = re.compile(r"[+-]?[0-9]{1,19}")


def parse_view(text: str) -> View:
    """A view as people write it."""
    face, *parts = text.split(":")
    match face, parts:
        case "base", []:
            return BASE
        case "finetuned", [name]:
            return finetuned(name)
        case "scaled", [name, strength]:
            return scaled(name, _number(text, strength))
        case "null", [name, seed, *rest]:
            return null(name, _noise(text, seed, rest))
        case _:
            raise _refusal(text, "is not understood")


def write_view(view: View) -> str:
    """What `parse_view` reads back."""
    match view.face:
        case Face.BASE:
            return "base"
        case Face.FINETUNED:
            return f"finetuned:{view.adapter}"
        case Face.SCALED:
            return f"scaled:{view.adapter}:{view.strength!r}"
        case Face.NULL:
            noise = view.noise
            assert noise is not None
            parts = ["null", view.adapter, str(noise.seed)]
            parts += [f"init_scale={noise.init_scale!r}"] if noise.init_scale != DEFAULT_INIT_SCALE else []
            parts += [f"rank_scale={noise.rank_scale!r}"] if noise.rank_scale != DEFAULT_RANK_SCALE else []
            return ":".join([*parts, *(["variance_faithful"] if noise.variance_faithful else [])])


def _noise(text: str, seed: str, parts: Sequence[str]) -> Noise:
    if not _SEED.fullmatch(seed):
        raise _refusal(text, f"has the seed {seed!r:.40}, which is no whole number")
    given: dict[str, float | bool] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if name in given:
            raise _refusal(text, f"says {name} twice")
        if part == "variance_faithful":
            given[name] = True
        elif name in {"init_scale", "rank_scale"} and equals:
            given[name] = _number(text, value)
        else:
            raise _refusal(text, f"has {part!r:.40}, which is not known")
    scales = (float(given.get("init_scale", DEFAULT_INIT_SCALE)), float(given.get("rank_scale", DEFAULT_RANK_SCALE)))
    return Noise(int(seed), *scales, variance_faithful="variance_faithful" in given)


def _number(text: str, part: str) -> float:
    if not _NUMBER.fullmatch(part):
        raise _refusal(text, f"has {part!r:.40} where a number must stand")
    return float(part)


def _refusal(text: str, what: str) -> InvalidArgument:
    message = f"view {text!r:.80} {what}; write one of: {VIEWS}"
    return InvalidArgument(Reason.MALFORMED, message, field="--view", allowed=VIEWS)
