"""Whether the numbers of an answer can be numbers of an answer: finite, and no mass above 1.

Pure. It knows answers that come whole. It must not know who answers, nor what the numbers are wanted for.
"""

from __future__ import annotations

import math

import numpy as np

from dualtrace.problems import BadNumbers, Problem, Reason
from dualtrace.questions.answers import NextTokens, ScoreResult, Tail

ABOVE_ONE = 1e-6
"""Nats that a measured mass may be above 1 by rounding. An engine asked for no id tells a tail of 0.0: all mass."""


def find_bad_numbers(found: NextTokens | ScoreResult) -> Problem | None:
    """Why the numbers of one prompt or item are none that a model can have given; None when they can be."""
    if isinstance(found, ScoreResult):
        numbers = [*found.scores, *found.label_logprobs]
    else:
        numbers = [*found.top_logprobs.tolist(), *found.extra_logprobs.tolist()]
    if not np.isfinite(numbers).all():
        return BadNumbers(Reason.NON_FINITE_LOGITS, "the answer holds a logprob or score that is no finite number")
    if isinstance(found, ScoreResult):
        return None
    return _find_bad_tail("tail", found.tail) or _find_bad_tail("tail_beyond_extra", found.tail_beyond_extra)


def _find_bad_tail(name: str, tail: Tail | None) -> Problem | None:
    if tail is None or tail.state in {"FULL_COVERAGE", "UNDERFLOW"}:
        return None
    if tail.state != "MEASURED" or tail.logprob is None:
        said = f"is {tail.state!r:.40} with {'no' if tail.logprob is None else 'a'} logprob"
    elif not math.isfinite(tail.logprob) or tail.logprob > ABOVE_ONE:
        said = f"is measured as {tail.logprob} nats"
    else:
        return None
    message = f"the answer's {name} {said}, which no mass can be: the answer cannot be used, ask again"
    return BadNumbers(Reason.NON_FINITE_LOGITS, message)
