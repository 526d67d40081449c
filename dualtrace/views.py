"""Views: one set of weights, several faces. What a face is, never how an engine wears it.

It knows names and numbers. It must not know files, tensors, engines or the wire.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from enum import StrEnum

from dualtrace.problems import InvalidArgument, Reason

DEFAULT_INIT_SCALE = 0.02
DEFAULT_RANK_SCALE = 1.0
SEED_RANGE = (-(2**63), 2**63 - 1)


class Face(StrEnum):
    BASE = "base"  # the weights as they are
    FINETUNED = "finetuned"  # an adapter fully on
    SCALED = "scaled"  # an adapter's delta times lambda
    NULL = "null"  # an adapter's factors replaced by seeded noise


@dataclass(frozen=True)
class Noise:
    """What the factors of a null view are drawn from."""

    seed: int
    init_scale: float = DEFAULT_INIT_SCALE
    rank_scale: float = DEFAULT_RANK_SCALE
    variance_faithful: bool = False  # scale both factors by the fourth root of rank_scale instead of the square root

    def __post_init__(self) -> None:
        low, high = SEED_RANGE
        if not low <= self.seed <= high:
            raise InvalidArgument(
                Reason.OUT_OF_RANGE, f"seed {self.seed} asked; it must fit 64 bits", field="null.seed"
            )
        for name in ("init_scale", "rank_scale"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise InvalidArgument(
                    Reason.NOT_FINITE, f"{name} {value} asked; it must be finite", field=f"null.{name}"
                )
        if self.init_scale < 0:
            message = f"init_scale {self.init_scale} asked; a standard deviation is 0 or more"
            raise InvalidArgument(Reason.OUT_OF_RANGE, message, field="null.init_scale", allowed=">= 0")
        if self.rank_scale <= 0:
            message = f"rank_scale {self.rank_scale} asked; it must be above 0"
            raise InvalidArgument(Reason.OUT_OF_RANGE, message, field="null.rank_scale", allowed="> 0")


@dataclass(frozen=True)
class View:
    """One face. Equal views may share rows, keys and values; their key says so at full precision."""

    face: Face = Face.BASE
    adapter: str = ""
    strength: float = 1.0  # lambda; 1 for finetuned and null
    noise: Noise | None = None  # only for null

    def __post_init__(self) -> None:
        if (self.face is Face.NULL) != (self.noise is not None):
            message = "a null view needs its noise, and no other view has any"
            raise InvalidArgument(Reason.CONFLICT, message, field="null")
        if self.face is Face.BASE and self.adapter:
            message = f"a base view has no adapter, and {self.adapter!r} was given"
            raise InvalidArgument(Reason.CONFLICT, message, field="adapter")
        if self.face is not Face.SCALED and self.strength != 1.0:
            message = f"lambda {self.strength} asked of a {self.face} view; only scaled views have one"
            raise InvalidArgument(Reason.CONFLICT, message, field="scaled.lambda_value")
        if self.face is not Face.BASE and not self.adapter:
            raise InvalidArgument(Reason.MISSING, f"a {self.face} view needs the name of an adapter", field="adapter")
        if not math.isfinite(self.strength):
            message = f"lambda {self.strength} asked; it must be finite"
            raise InvalidArgument(Reason.NOT_FINITE, message, field="scaled.lambda_value")

    @property
    def is_plain(self) -> bool:
        """No delta is added at all: base, and lambda = 0, which skips the term instead of multiplying by zero."""
        return self.face is Face.BASE or self.strength == 0.0

    @property
    def key(self) -> str:
        """Equal keys give equal numbers on one engine; all plain views are one."""
        if self.is_plain:
            return "base"
        noise = self.noise
        drawn = None if noise is None else [noise.seed, float(noise.init_scale), float(noise.rank_scale)]
        faithful = noise is not None and noise.variance_faithful
        canonical = json.dumps([self.adapter, float(self.strength), drawn, faithful])
        return hashlib.sha256(canonical.encode()).hexdigest()

    def __str__(self) -> str:
        match self.face:
            case Face.BASE:
                return "base"
            case Face.FINETUNED:
                return f"finetuned({self.adapter})"
            case Face.SCALED:
                return f"scaled({self.adapter}, {self.strength!r})"
            case Face.NULL:
                seed = self.noise.seed if self.noise else 0
                return f"null({self.adapter}, seed {seed})"


BASE = View()


def finetuned(adapter: str) -> View:
    return View(Face.FINETUNED, adapter)


def scaled(adapter: str, strength: float) -> View:
    return View(Face.SCALED, adapter, strength)


def null(adapter: str, noise: Noise) -> View:
    return View(Face.NULL, adapter, noise=noise)
