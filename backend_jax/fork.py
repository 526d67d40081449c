"""Leaves that are one computation up to some layer: whose rows stand for whose below it, and whether that pays.

Leaves of one past with equal ids, positions and view have equal states at the input of a layer when they saw the same
in every layer below it. It knows segments and their masks. It must not know calls, rows or arrays on devices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from backend_jax.shapes import pack
from dualtrace.engine import Segment

CALL_COST = 64.0  # of one call more, in tokens through one layer: some 3 ms with 135M parameters on two cores
WORTH = 0.9  # a fork must save a tenth: it needs a function more


@dataclass(frozen=True)
class Fork:
    """Below `layer`, leaf `standing[i]` is computed for leaf i as well."""

    layer: int
    standing: tuple[int, ...]


def choose_fork(leaves: Sequence[Segment], start: int, layers: int) -> Fork | None:
    """The cheapest, if one is worth it. `start`: root-to-leaf row of the leaves' first tokens."""
    forks = list_forks(leaves, start, layers)
    if not forks:
        return None
    every = range(len(leaves))
    plain = _cost(leaves, every)

    def cost(fork: Fork) -> float:
        below = _cost(leaves, dict.fromkeys(fork.standing))
        return fork.layer * below + (layers - fork.layer) * plain + CALL_COST

    best = min(forks, key=cost)
    return best if cost(best) <= WORTH * layers * plain else None


def _cost(leaves: Sequence[Segment], chosen: Sequence[int] | dict[int, None]) -> float:
    """Of one layer, in tokens. What is compiled already has no say: the same batch is always cut the same way."""
    lengths = tuple(leaves[i].ids.size for i in chosen)
    return pack(lengths, tuple(leaves[i].view.key for i in chosen), frozenset()).cost


def list_forks(leaves: Sequence[Segment], start: int, layers: int) -> tuple[Fork, ...]:
    """One for each layer above the first in which leaves part that were alike in all layers below."""
    standing = _stand([_beginning(leaf) for leaf in leaves])
    company = [standing.count(one) > 1 for one in standing]
    if not any(company):
        return ()
    sights = [
        _list_sights(leaf, start, layers) if together else None
        for leaf, together in zip(leaves, company, strict=True)
    ]  # fmt: skip
    forks: list[Fork] = []
    for layer in range(layers):
        parted = _stand([(one, sees and sees[layer]) for one, sees in zip(standing, sights, strict=True)])
        if layer and parted != standing:
            forks.append(Fork(layer, standing))
        standing = parted
    return tuple(forks)


def _stand(keys: Sequence[Hashable]) -> tuple[int, ...]:
    """For each key the place where it is seen first."""
    first: dict[Hashable, int] = {}
    return tuple(first.setdefault(key, place) for place, key in enumerate(keys))


def _beginning(leaf: Segment) -> Hashable:
    """Equal for leaves whose states are equal before the first layer, and whose rows are then treated alike."""
    return leaf.ids.tobytes(), leaf.positions.tobytes(), leaf.view.key, leaf.mask is None


def _list_sights(leaf: Segment, start: int, layers: int) -> list[bytes]:
    """[L] what the leaf's rows see in each layer: equal bytes, equal sight."""
    sights = [b""] * layers
    if leaf.mask is not None:
        stop = start + leaf.ids.size
        for group in leaf.mask.layer_groups():
            blocks = (leaf.mask.block(group[0], start, stop), leaf.mask.zero_block(group[0], start, stop))
            digest = b"".join(map(_digest, blocks))
            for layer in group:
                sights[layer] = digest
    return sights


def _digest(block: npt.NDArray[np.bool_] | None) -> bytes:
    """Of [H or 1, rows, keys]; heads that are all alike count as one."""
    if block is None or not block.any():
        return bytes(16)
    if (block == block[:1]).all():
        block = block[:1]
    shape = repr(block.shape).encode()
    return hashlib.blake2b(np.packbits(block).tobytes(), digest_size=16, person=shape[:16]).digest()
