"""One model over several devices: which axis of each weight is cut over a mesh of one axis, and what every device has.

Weights are cut where they are put; the compiler then divides the work and adds the exchanges. It knows roles, shapes
and devices. It must not know how a forward is made, nor checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from backend_jax.architecture import Architecture, Joint
from dualtrace.problems import InvalidArgument, Reason, Unsupported

AXIS = "model"
OPTION = "mesh"


@dataclass(frozen=True, eq=False)
class Spread:
    """How the arrays of one engine lie over its devices."""

    architecture: Architecture
    mesh: Mesh

    @property
    def size(self) -> int:
        return self.mesh.size

    @property
    def copied(self) -> NamedSharding:
        """The whole array on every device: inputs, norms, places, answers."""
        return _lay(self.mesh)

    @property
    def kept(self) -> NamedSharding:
        """Of keys and values [L,N,G,P,D] that outlive a call."""
        return self._cut(2 if self._divides(self.architecture.kv_heads) else None)

    def weight(self, role: str, part: str) -> NamedSharding:
        """Of one stack [L, ...], or of a weight outside the layers."""
        if role in {"embedding", "head"}:
            return self._cut(0 if self._divides(self.architecture.vocab_size) else None)
        outputs, inputs = self._sides(role)
        if outputs:
            return self._cut(1)  # rows of a weight [L, out, in], entries of its bias [L, out]
        return self._cut(2 if inputs and part == "weight" else None)

    def _sides(self, role: str) -> tuple[bool, bool]:
        """Whether the outputs, or the inputs, of a linear layer are cut. Of a role that is none, neither."""
        a = self.architecture
        match role:
            case "query":
                return True, False  # `open_spread` has seen to it
            case "key" | "value":
                return self._divides(a.kv_heads), False
            case "joint":
                return a.joint is Joint.PER_HEAD or self._divides(a.kv_heads), False
            case "output":
                return False, True
            case "gate" | "up" | "gate_up":
                return self._divides(a.inner_size), False
            case "down":
                return False, self._divides(a.inner_size)
            case _:
                return False, False

    def _divides(self, count: int) -> bool:
        return count % self.size == 0

    def _cut(self, axis: int | None) -> NamedSharding:
        if axis is None:
            return self.copied
        return _lay(self.mesh, *[None] * axis, AXIS)


def _lay(mesh: Mesh, *axes: str | None) -> NamedSharding:
    specify: Callable[..., PartitionSpec] = PartitionSpec  # it has no types of its own
    return NamedSharding(mesh, specify(*axes))


def open_spread(asked: str | None, device: jax.Device, named: str, architecture: Architecture) -> Spread | None:
    """The mesh that the option asks for; None without it. `named` is the device as the settings call it."""
    if asked is None:
        return None
    found = jax.devices(device.platform)
    allowed = f"1-{len(found)}"
    if not (asked.isascii() and asked.isdecimal()):
        message = f"mesh {asked!r} asked; it is a number of devices, {allowed} here"
        raise InvalidArgument(Reason.MALFORMED, message, field=OPTION, allowed=allowed)
    size = int(asked) if len(asked) < 10 else len(found) + 1
    if not 1 <= size <= len(found):
        message = f"a mesh of {asked} devices asked; JAX finds {len(found)} of the kind {device.platform}"
        raise InvalidArgument(Reason.OUT_OF_RANGE, message, field=OPTION, allowed=allowed)
    if ":" in named:
        message = f"device {named!r} and a mesh asked; a mesh takes the first devices of a kind, so name the kind only"
        raise InvalidArgument(Reason.CONFLICT, message, field=OPTION)
    heads = architecture.query_heads
    if heads % size:
        fits = ", ".join(str(count) for count in range(1, len(found) + 1) if heads % count == 0)
        message = f"a mesh of {size} devices asked; it must divide the model's {heads} query heads: {fits}"
        raise Unsupported(Reason.MODEL_UNSUPPORTED, message, field=OPTION, allowed=fits)
    return Spread(architecture, Mesh(np.array(found[:size]), (AXIS,)))


def named_sharding(leaf: Any) -> NamedSharding | None:
    """Of an array that lies over a mesh."""
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None
