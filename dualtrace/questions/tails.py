"""The mass outside a list of ids, and what may be said of it. Pure."""

from __future__ import annotations

import math

from dualtrace.questions.answers import Tail

UNDERFLOW_LOGPROB = -126 * math.log(2)
"""Below this (2^-126) float32 has no normal number left: the tail is said to underflow instead of being given."""


def tail_of(listed_ids: int, vocab_size: int, logprob: float) -> Tail:
    """The tail after `listed_ids` distinct ids; `logprob` is the logsumexp over the rest, in nats."""
    if listed_ids >= vocab_size:
        return Tail("FULL_COVERAGE")
    if logprob < UNDERFLOW_LOGPROB:
        return Tail("UNDERFLOW")
    return Tail("MEASURED", min(logprob, 0.0))
