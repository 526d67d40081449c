"""The verdict and its reasons, in plain words. It knows what was found; it must not compute any figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dualtrace.compare.gates import GateName, GateResult, GateVerdict
from dualtrace.compare.report import Verdict
from dualtrace.compare.sides import SideName
from dualtrace.problems import Problem

MAX_TOLD = 5
"""Reasons of one kind that are spelled out; the rest is counted."""


@dataclass(frozen=True)
class Evidence:
    """What a verdict is made of."""

    side_problems: tuple[tuple[SideName, str, Problem], ...]  # side, target, why it failed
    item_problems: tuple[tuple[SideName, int, Problem], ...]
    conflicts: tuple[str, ...]  # why something cannot be compared
    compared: int  # pairs of numbers that were judged
    gates: tuple[GateResult, ...]
    divergence: str | None  # where the sides part first, in words
    notes: tuple[str, ...]  # to know although nothing fails


def decide(evidence: Evidence) -> tuple[Verdict, tuple[str, ...]]:
    """ERROR over INCOMPARABLE over FAIL over PASS. Every reason is told, the gravest first."""
    errors = _tell_errors(evidence)
    conflicts = list(evidence.conflicts)
    if not evidence.compared and not evidence.side_problems and not conflicts:
        conflicts.append(
            "NOTHING_COMPARED: no token, label or distribution has a number on both sides; "
            "ask about a longer text, or with a prefix token"
        )
    failures = _tell_failures(evidence)
    reasons = (*errors, *_some(conflicts, "more that cannot be compared"), *failures, *evidence.notes)
    if evidence.side_problems or _failed(evidence.gates, GateName.FAILURE_RATE):
        return Verdict.ERROR, reasons
    if conflicts:
        return Verdict.INCOMPARABLE, reasons
    if any(gate.verdict is GateVerdict.FAIL for gate in evidence.gates):
        return Verdict.FAIL, reasons
    return Verdict.PASS, reasons


def _failed(gates: Sequence[GateResult], name: GateName) -> bool:
    return any(gate.gate is name and gate.verdict is GateVerdict.FAIL for gate in gates)


def _tell_errors(evidence: Evidence) -> list[str]:
    sides = [
        f"the {side.lower()} side ({target}) failed: {problem}" for side, target, problem in evidence.side_problems
    ]
    items = [
        f"item {item} failed on the {side.lower()} side: {problem}" for side, item, problem in evidence.item_problems
    ]
    return [*sides, *_some(items, "more failed items")]


def _tell_failures(evidence: Evidence) -> list[str]:
    told = []
    for gate in evidence.gates:
        if gate.verdict is GateVerdict.FAIL:
            told.append(f"{gate.gate.value} fails: {gate.reason}")
        elif gate.verdict is GateVerdict.INCONCLUSIVE:
            told.append(f"{gate.gate.value} is inconclusive: {gate.reason}")
    return told if evidence.divergence is None else [*told, evidence.divergence]


def _some(reasons: list[str], more: str) -> list[str]:
    """No report is flooded by a thousand like reasons."""
    rest = len(reasons) - MAX_TOLD
    return [*reasons[:MAX_TOLD], f"and {rest} {more}"] if rest > 0 else reasons
