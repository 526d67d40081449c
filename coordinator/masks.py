"""What a coordinator takes of masks: everything but an array that lies elsewhere. It must not know who is asked."""

from __future__ import annotations

from collections.abc import Iterator

from dualtrace.library import SideSpec
from dualtrace.masks.limits import DEFAULT_LIMITS
from dualtrace.masks.spec import All, AnyOf, Array, Expression, Minus, Not
from dualtrace.problems import InvalidArgument, Reason


def check_mask(side: SideSpec, field: str) -> None:
    """Refuse an array that was sent ahead: it was sent to one sidecar, and a backend's replicas do not share it."""
    mask = side.variant.mask
    named = None if mask is None else next(_named_arrays(mask.base), None)
    if named is None:
        return
    most = DEFAULT_LIMITS.inline_bytes
    message = (
        f"the mask of {side.target} names the array {named[:19]}..., and a coordinator has no place for arrays: put one"
        f" of up to {most} bytes into the mask, or ask the sidecar without the coordinator (grpc://HOST:PORT), which"
        " takes larger ones"
    )
    raise InvalidArgument(Reason.MASK_TOO_LARGE, message, field=f"{field}.mask", allowed=f"0-{most} bytes")


def _named_arrays(node: Expression) -> Iterator[str]:
    """Digests of arrays that do not stand in the mask."""
    match node:
        case Array(artifact_digest=str(digest)):
            yield digest
        case All(terms=terms) | AnyOf(terms=terms):
            for term in terms:
                yield from _named_arrays(term)
        case Not(term=term):
            yield from _named_arrays(term)
        case Minus(source=source, take=take):
            yield from _named_arrays(source)
            yield from _named_arrays(take)
        case _:
            return
