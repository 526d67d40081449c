"""The mask language entry by entry: slow, plain, and the oracle of the compiler. Also the answer to "why".

It reads the definitions one (layer, head, q, k) at a time. It must share no evaluation code with `rules`, `runs` or
`plan`, or the tests that compare the two would prove nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from dualtrace.masks import spec as s
from dualtrace.masks.resolve import ResolvedMask
from dualtrace.problems import InvalidArgument, Reason


@dataclass(frozen=True)
class Decision:
    """May row q see key k at this layer and head, and the rule that decided."""

    allowed: bool  # pre-softmax
    zeroed: bool  # allowed, and the weight is set to zero after the softmax
    rule: str


@dataclass(frozen=True)
class _Verdict:
    allows: bool
    rule: str


def may_see(resolved: ResolvedMask, layer: int, head: int, q: int, k: int) -> Decision:
    _require_inside(resolved, layer, head, q, k)
    verdict = _before_empty_row(resolved, layer, head, q, k)
    if not verdict.allows and sees_nothing(resolved, layer, head, q):
        empty_row = resolved.spec.empty_row
        if empty_row is s.EmptyRow.SELF and q == k:
            verdict = _Verdict(True, f"empty_row SELF: row {q} may see nothing else, so it sees itself")
        else:
            verdict = _Verdict(False, f"{verdict.rule}; the row may see nothing (empty_row {empty_row.value})")
    if not verdict.allows:
        return Decision(False, False, verdict.rule)
    for i, cut in enumerate(resolved.cuts):
        if cut.mode is s.CutMode.POST_SOFTMAX_ZERO and _covers(resolved, i, layer, head, q, k):
            return Decision(True, True, f"edges[{i}] sets its weight to zero after the softmax at {_at(layer, head)}")
    return Decision(True, False, verdict.rule)


def sees_nothing(resolved: ResolvedMask, layer: int, head: int, q: int) -> bool:
    """Before empty_row is applied."""
    return not any(_before_empty_row(resolved, layer, head, q, k).allows for k in range(resolved.context.length))


def _require_inside(resolved: ResolvedMask, layer: int, head: int, q: int, k: int) -> None:
    geometry, length = resolved.context.geometry, resolved.context.length
    asked = (("layer", layer, geometry.layers), ("head", head, geometry.heads), ("q", q, length), ("k", k, length))
    for name, value, extent in asked:
        if not 0 <= value < extent:
            raise InvalidArgument(
                Reason.OUT_OF_RANGE,
                f"{name} {value} asked; there are {extent} (0-{extent - 1})",
                field=name,
                allowed=f"0-{extent - 1}",
            )


def _before_empty_row(resolved: ResolvedMask, layer: int, head: int, q: int, k: int) -> _Verdict:
    base = _expression(resolved, resolved.base, "base", layer, head, q, k)
    if not base.allows:
        return base
    for i, cut in enumerate(resolved.cuts):
        if cut.mode is s.CutMode.PRE_SOFTMAX and _covers(resolved, i, layer, head, q, k):
            return _Verdict(False, f"edges[{i}] cuts it at {_at(layer, head)}")
    window = resolved.context.geometry.window(layer)
    if window is not None and not resolved.spec.replace_native:
        distance = abs(int(resolved.positions[q]) - int(resolved.positions[k]))
        if distance >= window:
            return _Verdict(
                False, f"the native window of layer {layer} is {window}; the positions are {distance} apart"
            )
    return base


def _at(layer: int, head: int) -> str:
    return f"layer {layer} head {head}"


def _covers(resolved: ResolvedMask, index: int, layer: int, head: int, q: int, k: int) -> bool:
    cut = resolved.cuts[index]
    if cut.layers is not None and layer not in cut.layers:
        return False
    if cut.heads is not None and head not in cut.heads:
        return False
    return cut.q0 <= q < cut.q1 and cut.k0 <= k < cut.k1


def _expression(
    resolved: ResolvedMask, node: s.Expression, path: str, layer: int, head: int, q: int, k: int
) -> _Verdict:
    def ask(term: s.Expression, step: str) -> _Verdict:
        return _expression(resolved, term, f"{path}.{step}", layer, head, q, k)

    match node:
        case s.All(terms):
            verdicts = [ask(term, f"all[{i}]") for i, term in enumerate(terms)]
            return next((verdict for verdict in verdicts if not verdict.allows), verdicts[-1])
        case s.AnyOf(terms):
            verdicts = [ask(term, f"any[{i}]") for i, term in enumerate(terms)]
            return next((verdict for verdict in verdicts if verdict.allows), verdicts[-1])
        case s.Not(term):
            verdict = ask(term, "not")
            return _Verdict(not verdict.allows, f"not: {verdict.rule}")
        case s.Minus(source, take):
            allowed, taken = ask(source, "minus.from"), ask(take, "minus.take")
            if allowed.allows and taken.allows:
                return _Verdict(False, f"minus takes it: {taken.rule}")
            return allowed
        case _:
            allows, words = _leaf(resolved, node, layer, head, q, k)
            return _Verdict(allows, f"{path}.{words} {'allows' if allows else 'does not allow'} it")


def _leaf(resolved: ResolvedMask, node: s.Leaf, layer: int, head: int, q: int, k: int) -> tuple[bool, str]:
    prefix = resolved.context.prefix
    match node:
        case s.Causal():
            return k <= q, "causal"
        case s.Full():
            return True, "full"
        case s.BidirectionalPrefix(n):
            assert n is not None
            return k <= q or k - prefix < n, f"bidirectional_prefix(n={n})"
        case s.Sliding(back, ahead):
            return q - back < k <= q + ahead, f"sliding(keys_back={back}, keys_ahead={ahead})"
        case s.Chunked(size):
            return k <= q and _token(q, prefix) // size == _token(k, prefix) // size, f"chunked(size={size})"
        case s.DocIsolation():
            mine, other = _document(node, _token(q, prefix)), _document(node, _token(k, prefix))
            return k <= q and mine == other, f"doc_isolation(row in document {mine}, key in document {other})"
        case s.Array(content):
            assert content is not None
            values = content.values
            if values.ndim == 2:
                return bool(values[q, k]), "array"
            return bool(values[head, q, k] if values.ndim == 3 else values[layer, head, q, k]), "array"


def _token(row: int, prefix: int) -> int:
    """Prefix rows count as the first token."""
    return max(row - prefix, 0)


def _document(node: s.DocIsolation, token: int) -> int:
    if node.segment_ids is not None:
        return node.segment_ids[token]
    return sum(1 for start in node.boundaries or () if start <= token)
