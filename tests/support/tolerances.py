"""The tolerance table as data: how far two careful answers may part, and who measured it.

It knows numbers and where they come from. It must not know any engine, and no test keeps a number of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date


@dataclass(frozen=True)
class Tolerance:
    """For one per-token logprob: |l - r| <= abs_epsilon + rel_epsilon * max(|l|, |r|), in nats."""

    name: str
    abs_epsilon: float
    rel_epsilon: float
    source: str
    date: date

    def allows(self, left: float, right: float) -> bool:
        """Whether two finite values agree. NaN agrees with nothing."""
        return abs(left - right) <= self.abs_epsilon + self.rel_epsilon * max(abs(left), abs(right))


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


@dataclass(frozen=True)
class Precision:
    """How a side calculates, in the words of its ModelProvenance."""

    dtype: str  # "float64", "float32", "bfloat16"
    matmul_precision: str  # "float64", "highest", "tf32", "default"


DESIGN_DATE = date(2026, 11, 21)

FLOAT64 = Tolerance(
    "float64",
    abs_epsilon=1e-10,
    rel_epsilon=1e-12,
    source="measured on CPU, random 6-layer GPT-2, vocabulary 512, 400 tokens, 5 seeds: transformers eager alone v "
    "sdpa in a batch of three, float64, 1.2e-13 max. Its Llama does not qualify: parts run in float32 (2.1e-5 max)",
    date=date(2026, 11, 21),
)
FLOAT32_HIGHEST = Tolerance(
    "float32-highest",
    abs_epsilon=1e-4,
    rel_epsilon=1e-5,
    source="semantics section 7, starting profile; seen on a 135M model on CPU: transformers v float64 3.4e-5 max, "
    "an independent JAX decoder 4.1e-5 max, CTranslate2 1.7e-5 max",
    date=DESIGN_DATE,
)
FLOAT32_FAST = Tolerance(
    "float32-fast",
    abs_epsilon=2e-2,
    rel_epsilon=1e-3,
    source="semantics section 7, starting profile for float32 storage with TF32 or default matmul; not yet measured",
    date=DESIGN_DATE,
)
BFLOAT16 = Tolerance(
    "bfloat16",
    abs_epsilon=0.5,
    rel_epsilon=1.6e-2,
    source="semantics section 7, starting profile for bf16; not yet measured",
    date=DESIGN_DATE,
)

LOG_SOFTMAX_LARGE = SumTolerance(
    "log-softmax-large",
    abs_epsilon=1e-4,
    per_token_epsilon=4e-5,
    source="semantics section 7: torch's float32 log_softmax is biased by +2e-5 a token at a vocabulary of 49,152",
    date=DESIGN_DATE,
)
LOG_SOFTMAX_TINY = SumTolerance(
    "log-softmax-tiny",
    abs_epsilon=0.0,
    per_token_epsilon=1e-5,
    source="semantics section 7: sums of tools built on log_softmax, tiny vocabularies",
    date=DESIGN_DATE,
)

TOLERANCES: tuple[Tolerance, ...] = (FLOAT64, FLOAT32_HIGHEST, FLOAT32_FAST, BFLOAT16)
"""From strict to loose."""

SUM_TOLERANCES: tuple[SumTolerance, ...] = (LOG_SOFTMAX_LARGE, LOG_SOFTMAX_TINY)

BY_PRECISION: dict[Precision, Tolerance] = {
    Precision("float64", "float64"): FLOAT64,
    Precision("float64", "highest"): FLOAT64,
    Precision("float32", "highest"): FLOAT32_HIGHEST,
    Precision("float32", "tf32"): FLOAT32_FAST,
    Precision("float32", "default"): FLOAT32_FAST,
    Precision("bfloat16", "highest"): BFLOAT16,
    Precision("bfloat16", "default"): BFLOAT16,
}


def find_tolerance(left: Precision, right: Precision) -> Tolerance:
    """The tolerance of a pair of sides: the looser one of the two. A precision nobody measured is refused."""
    for side in (left, right):
        if side not in BY_PRECISION:
            raise LookupError(f"no tolerance for {side}; measure one and enter it with its source")
    return max(BY_PRECISION[left], BY_PRECISION[right], key=TOLERANCES.index)
