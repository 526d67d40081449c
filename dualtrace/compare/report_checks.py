"""What must hold in a report beyond its types: lists that count the same things, and fields that follow from others.

It knows the figures. It must not know JSON, nor how a figure is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

from dualtrace.compare.figures import DistributionReport, ItemReport, LabelReport, TokenColumns, TokenSummary
from dualtrace.compare.gates import GateName, GateResult, GateVerdict
from dualtrace.compare.pass_rule import TokenStatus
from dualtrace.problems import InvalidArgument, Reason
from dualtrace.questions.answers import Tail

_COUNTED = tuple(field.name for field in fields(TokenColumns) if not field.name.endswith("not_finite"))


def check_items(items: Iterable[ItemReport]) -> None:
    for place, item in enumerate(items):
        path = f"items[{place}]"
        _check_sizes(f"{path}.columns", {name: getattr(item.columns, name) for name in _COUNTED})
        kept = len(item.columns.statuses)
        if item.kept_tokens != kept:
            raise _conflict(f"{path}.kept_tokens", f"is {item.kept_tokens}; its columns have {kept} tokens")
        columns = item.columns
        for name, odd, values in (
            ("left_not_finite", columns.left_not_finite, columns.left_logprobs),
            ("right_not_finite", columns.right_not_finite, columns.right_logprobs),
        ):
            if any(not 0 <= one.index < kept or values[one.index] is not None for one in odd):
                raise _conflict(f"{path}.columns.{name}", "names a token that is not there or has a number")


def check_summary(tokens: TokenSummary | None, items: Sequence[ItemReport]) -> None:
    """The counts that the items' own tokens give, where none was cut."""
    if tokens is None:
        return
    region = tokens.first_divergence_region
    if (region is None) != (tokens.first_divergence_index is None) or (region is not None and region[0] >= region[1]):
        raise _conflict("tokens.first_divergence_region", "does not begin at a first divergence")
    for before, after in pairwise(tokens.position_buckets):
        if before.stop > after.start:
            raise _conflict("tokens.position_buckets", "overlap")
    if tokens.not_kept_count:
        return
    statuses = [status for item in items for status in item.columns.statuses]
    for name, counted in (
        ("token_mismatch_count", (TokenStatus.MISMATCH,)),
        ("aligned_count", (TokenStatus.MATCH, TokenStatus.MISMATCH)),
        ("unscored_count", (TokenStatus.UNSCORED,)),
        ("unavailable_count", (TokenStatus.UNAVAILABLE,)),
    ):
        found = sum(status in counted for status in statuses)
        if getattr(tokens, name) != found:
            raise _conflict(f"tokens.{name}", f"is {getattr(tokens, name)}; the items' tokens give {found}")


def check_distributions(lines: Iterable[DistributionReport]) -> None:
    for place, line in enumerate(lines):
        path = f"distributions[{place}]"
        names = ("token_ids", "tokens", "left_logprobs", "right_logprobs")
        _check_sizes(path, {name: getattr(line, name) for name in names})
        for name, tail in (("left_tail", line.left_tail), ("right_tail", line.right_tail)):
            _check_tail(f"{path}.{name}", tail)
        if line.js_lower is not None and line.js_upper is not None and line.js_lower > line.js_upper:
            raise _conflict(f"{path}.js_lower", f"is {line.js_lower}, above js_upper {line.js_upper}")


def _check_tail(path: str, tail: Tail | None) -> None:
    if tail is None:
        return
    allowed = ("FULL_COVERAGE", "MEASURED", "UNDERFLOW")
    if tail.state not in allowed:
        message = f"{path}.state is {tail.state!r:.40}; it can be {', '.join(allowed)}"
        raise InvalidArgument(Reason.UNKNOWN_ENUM_VALUE, message, field=f"{path}.state", allowed=", ".join(allowed))
    if (tail.logprob is not None) != (tail.state == "MEASURED"):
        raise _conflict(f"{path}.logprob", "stands with a state that has none, or is missing")


def check_labels(lines: Iterable[LabelReport]) -> None:
    for place, line in enumerate(lines):
        if line.status in {TokenStatus.MATCH, TokenStatus.MISMATCH}:
            names = ("label_token_ids", "left_scores", "right_scores", "left_label_logprobs", "right_label_logprobs")
            _check_sizes(f"labels[{place}]", {name: getattr(line, name) for name in names})


def check_verdict(verdict: str, gates: Sequence[GateResult]) -> None:
    """A verdict that the gates contradict: the document was changed."""
    names = [gate.gate for gate in gates]
    if sorted(names) != sorted(GateName):
        raise _conflict("gates", f"are {', '.join(names) or 'none'}; each of {', '.join(GateName)} stands once")
    failed = [gate.gate for gate in gates if gate.verdict is GateVerdict.FAIL]
    if (verdict == "PASS" and failed) or (verdict == "FAIL" and not failed):
        raise _conflict("verdict", f"is {verdict}, and the failed gates are: {', '.join(failed) or 'none'}")


@dataclass(frozen=True)
class Ground:
    """What a verdict stands on, as the rest of the report tells it."""

    failed_side: bool
    failed_items: bool  # more than may fail
    parted: bool  # the sides read different tokens
    compared: bool  # something was held against the tolerance


def check_ground(verdict: str, ground: Ground) -> None:
    """A verdict that the findings contradict: the document was changed."""
    failed = ground.failed_side or ground.failed_items
    if failed != (verdict == "ERROR"):
        raise _conflict("verdict", f"is {verdict}, and {'a side or too many items' if failed else 'no side'} failed")
    if verdict in ("PASS", "FAIL") and (ground.parted or not ground.compared):
        why = "the sides read different tokens" if ground.parted else "nothing was compared"
        raise _conflict("verdict", f"is {verdict}, and {why}")


def _check_sizes(path: str, columns: dict[str, Sequence[object] | None]) -> None:
    sizes = {name: len(column) for name, column in columns.items() if column is not None}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise InvalidArgument(Reason.CONFLICT, f"{path}: {told}; they must be equally long", field=path)


def _conflict(path: str, what: str) -> InvalidArgument:
    return InvalidArgument(Reason.CONFLICT, f"{path} {what}", field=path)
