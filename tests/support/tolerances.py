"""The tolerance profiles of `dualtrace.compare.tolerance` for tests, and what tests alone need: sums of other tools.

It knows numbers and where they come from. It must not know any engine, and no test keeps a number of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

from dualtrace.compare import tolerance as profiles
from dualtrace.compare.tolerance import ENTERED, Precision, Profile, Tolerance, find_profile

__all__ = [
    "BFLOAT16", "BY_PRECISION", "FLOAT16", "FLOAT32_FAST", "FLOAT32_HIGHEST", "FLOAT64", "LOGSUMEXP_FLOAT32",
    "LOG_SOFTMAX_LARGE", "LOG_SOFTMAX_TINY", "SUM_TOLERANCES", "TOLERANCES", "Precision", "SumTolerance", "Tolerance",
    "find_tolerance",
]  # fmt: skip


@dataclass(frozen=True)
class SumTolerance:
    """For a sum of logprobs made by somebody else's tool: abs_epsilon + per_token_epsilon * tokens, in nats."""

    name: str
    abs_epsilon: float
    per_token_epsilon: float
    source: str
    date: date

    def epsilon(self, tokens: int) -> float:
        return self.abs_epsilon + self.per_token_epsilon * tokens


FLOAT64 = profiles.FLOAT64.tolerance
FLOAT32_HIGHEST = profiles.FLOAT32_HIGHEST.tolerance
FLOAT32_FAST = profiles.FLOAT32_FAST.tolerance
FLOAT16 = profiles.FLOAT16.tolerance
BFLOAT16 = profiles.BFLOAT16.tolerance
LOGSUMEXP_FLOAT32 = Tolerance(
    "logsumexp-float32",
    abs_epsilon=5e-8,
    rel_epsilon=1e-7,
    source="measured on CPU, float32 logits of seeded rows, vocabulary 49,229, float64 sums against all in float64: "
    "logsumexp 2.1e-8 max (200 rows), KL of 3e-7 nats 1.6e-8 max, of 13 nats 9.3e-7 max (40 rows)",
)
"""Of what the torch engine makes of given logits: normalisers, and exact KL between two rows."""

TOLERANCES: tuple[Tolerance, ...] = tuple(profile.tolerance for profile in profiles.PROFILES)
"""From strict to loose."""

BY_PRECISION: dict[Precision, Tolerance] = {
    precision: profile.tolerance for precision, profile in profiles.BY_PRECISION.items()
}

LOG_SOFTMAX_LARGE = SumTolerance(
    "log-softmax-large",
    abs_epsilon=1e-4,
    per_token_epsilon=4e-5,
    source="semantics section 7: torch's float32 log_softmax is biased by +2e-5 a token at a vocabulary of 49,152",
    date=ENTERED,
)
LOG_SOFTMAX_TINY = SumTolerance(
    "log-softmax-tiny",
    abs_epsilon=0.0,
    per_token_epsilon=1e-5,
    source="semantics section 7: sums of tools built on log_softmax, tiny vocabularies",
    date=ENTERED,
)
SUM_TOLERANCES: tuple[SumTolerance, ...] = (LOG_SOFTMAX_LARGE, LOG_SOFTMAX_TINY)


def find_tolerance(left: Precision, right: Precision) -> Tolerance:
    """The tolerance of a pair of sides: the looser one of the two. A precision nobody measured is refused."""
    found: Profile | None = find_profile(left, right)
    if found is None:
        unknown = next(side for side in (left, right) if side not in BY_PRECISION)
        raise LookupError(f"no tolerance for {unknown}; measure one and enter it with its source")
    return found.tolerance
