"""How far two sides may part, by name: the profiles, their sources, and the choice for a pair of precisions.

It knows numbers, where they come from and how a side says that it calculates. It must not know engines or reports.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

from dualtrace.compare.pass_rule import PassRule
from dualtrace.model_card import ModelProvenance
from dualtrace.problems import InvalidArgument, Reason


@dataclass(frozen=True)
class Tolerance:
    """For one per-token logprob, in nats: |l - r| <= abs_epsilon + rel_epsilon * max(|l|, |r|)."""

    name: str  # of the profile, or "request" for numbers that the caller gave
    abs_epsilon: float
    rel_epsilon: float
    source: str  # who measured it, where and when; "given by the caller" for "request"

    def __post_init__(self) -> None:
        self.rule  # noqa: B018 - refuses what is negative or not finite
        for name in ("abs_epsilon", "rel_epsilon"):
            object.__setattr__(self, name, float(getattr(self, name)))  # 0 and 0.0 are written alike

    @property
    def rule(self) -> PassRule:
        return PassRule(self.abs_epsilon, self.rel_epsilon)

    def allows(self, left: float, right: float) -> bool:
        """Whether two values agree, by the pass rule."""
        return self.rule.agrees(left, right)


def request_tolerance(abs_epsilon: float, rel_epsilon: float) -> Tolerance:
    """Numbers that the caller gave."""
    return Tolerance("request", abs_epsilon, rel_epsilon, "given by the caller")


@dataclass(frozen=True)
class Profile:
    """A tolerance that somebody measured, or says plainly that nobody has."""

    tolerance: Tolerance
    measured: date  # when the numbers were entered


@dataclass(frozen=True)
class Precision:
    """How a side calculates, in the words of its ModelProvenance."""

    dtype: str  # "float64", "float32", "float16", "bfloat16"
    matmul_precision: str  # "float64", "highest", "tf32", "default"


ENTERED = date(2026, 11, 21)

FLOAT64 = Profile(
    Tolerance(
        "float64",
        abs_epsilon=1e-10,
        rel_epsilon=1e-12,
        source="measured on CPU, random 6-layer GPT-2, vocabulary 512, 400 tokens, 5 seeds: transformers eager alone v "
        "sdpa in a batch of three, float64, 1.2e-13 max. Its Llama does not qualify: parts run in float32 (2.1e-5 max)",
    ),
    ENTERED,
)
FLOAT32_HIGHEST = Profile(
    Tolerance(
        "float32-highest",
        abs_epsilon=1e-4,
        rel_epsilon=1e-5,
        source="semantics section 7, starting profile; seen on a 135M model on CPU: transformers v float64 3.4e-5 max, "
        "an independent JAX decoder 4.1e-5 max, CTranslate2 1.7e-5 max",
    ),
    ENTERED,
)
FLOAT32_FAST = Profile(
    Tolerance(
        "float32-fast",
        abs_epsilon=2e-2,
        rel_epsilon=1e-3,
        source="semantics section 7, starting profile for float32 storage with TF32 or default matmul; "
        "not yet measured",
    ),
    ENTERED,
)
BFLOAT16 = Profile(
    Tolerance(
        "bfloat16",
        abs_epsilon=0.5,
        rel_epsilon=1.6e-2,
        source="semantics section 7, starting profile; measured on CPU, torch engine in bfloat16 v float64, tiny "
        "models of 11 families and 3 kinds of shared keys, 40 tokens, packed behind a prefix or not: 0.19 max, "
        "0.036 mean",
    ),
    ENTERED,
)
FLOAT16 = Profile(
    Tolerance(
        "float16",
        abs_epsilon=5e-2,
        rel_epsilon=2e-3,
        source="measured on CPU, torch engine in float16 v float64, tiny models of 11 families and 3 kinds of "
        "shared keys, 40 tokens, packed behind a prefix or not: 0.023 max, 0.006 mean",
    ),
    ENTERED,
)

PROFILES: tuple[Profile, ...] = (FLOAT64, FLOAT32_HIGHEST, FLOAT32_FAST, FLOAT16, BFLOAT16)
"""From strict to loose."""

BY_PRECISION: dict[Precision, Profile] = {
    Precision("float64", "float64"): FLOAT64,
    Precision("float64", "highest"): FLOAT64,
    Precision("float32", "highest"): FLOAT32_HIGHEST,
    Precision("float32", "tf32"): FLOAT32_FAST,
    Precision("float32", "default"): FLOAT32_FAST,
    Precision("float16", "highest"): FLOAT16,
    Precision("bfloat16", "highest"): BFLOAT16,
    Precision("bfloat16", "default"): BFLOAT16,
}


def find_profile(left: Precision, right: Precision) -> Profile | None:
    """The looser profile of the two; None when nobody entered one of the precisions."""
    found = [BY_PRECISION.get(side) for side in (left, right)]
    known = [profile for profile in found if profile is not None]
    return max(known, key=PROFILES.index) if len(known) == 2 else None


def choose_tolerance(left: ModelProvenance, right: ModelProvenance) -> Tolerance:
    """The profile for how the two sides say that they calculate. A precision without one is refused, never guessed."""
    sides = [Precision(side.dtype, side.matmul_precision) for side in (left, right)]
    profile = find_profile(*sides)
    if profile is not None:
        return profile.tolerance
    unknown = next(side for side in sides if side not in BY_PRECISION)
    known = ", ".join(f"{one.dtype}/{one.matmul_precision}" for one in BY_PRECISION)
    message = (
        f"there is no tolerance profile for dtype {unknown.dtype!r:.40} with matmul precision "
        f"{unknown.matmul_precision!r:.40}; give abs_epsilon and rel_epsilon with the request"
    )
    raise InvalidArgument(Reason.MISSING, message, field="tolerance", allowed=f"a tolerance, or sides of {known}")
