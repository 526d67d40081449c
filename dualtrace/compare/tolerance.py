"""How far two sides may part, by name: the profiles, their sources, and the choice for a pair of precisions.

It knows numbers, where they come from and how a side says that it calculates. It must not know engines or reports.
"""

from __future__ import annotations

from dataclasses import dataclass

from dualtrace.compare.pass_rule import PassRule


@dataclass(frozen=True)
class Tolerance:
    """For one per-token logprob, in nats: |l - r| <= abs_epsilon + rel_epsilon * max(|l|, |r|)."""

    name: str  # of the profile, or "request" for numbers that the caller gave
    abs_epsilon: float
    rel_epsilon: float
    source: str  # who measured it, where and when; "given by the caller" for "request"

    def __post_init__(self) -> None:
        self.rule  # noqa: B018 - refuses what is negative or not finite

    @property
    def rule(self) -> PassRule:
        return PassRule(self.abs_epsilon, self.rel_epsilon)
