"""The adapters of one engine, and the delta of each view.

It knows names, views and factors. It must not know how an engine multiplies them.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from dualtrace import noise as null_noise
from dualtrace.adapters.factors import Delta, Factors, read_only
from dualtrace.adapters.peft_folder import Adapter, Linears, open_adapter
from dualtrace.problems import InvalidArgument, NotFound, Reason
from dualtrace.views import Noise, View

KEPT_NULLS = 4  # null adapters kept in memory: the size of an adapter each, and quickly made again


class AdapterShelf:
    """What an engine asks for the delta of a view. It is read by several threads."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        self._adapters = dict(sorted(adapters.items()))
        self._nulls: OrderedDict[str, Mapping[str, Factors]] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, adapters: Sequence[tuple[str, Path]], linears: Linears) -> AdapterShelf:
        """Read the PEFT folders of (name, folder) pairs for a model whose linear modules are `linears`."""
        opened: dict[str, Adapter] = {}
        for name, folder in adapters:
            if not name:
                raise InvalidArgument(Reason.MISSING, f"the adapter in {folder} has no name; write NAME=FOLDER.")
            if name in opened:
                raise InvalidArgument(Reason.DUPLICATE, f"two adapters are named {name!r}; give each its own name.")
            opened[name] = open_adapter(folder, linears)
        return cls(opened)

    @property
    def names(self) -> tuple[str, ...]:
        """Sorted."""
        return tuple(self._adapters)

    @property
    def digests(self) -> tuple[tuple[str, str], ...]:
        """(name, digest), sorted by name: what `ModelProvenance.adapter_digests` wants."""
        return tuple((name, adapter.digest) for name, adapter in self._adapters.items())

    def delta(self, view: View) -> Delta | None:
        """None for plain views: their rows skip the term. A name that is not on the shelf is refused in any case."""
        if view.adapter and view.adapter not in self._adapters:
            known = ", ".join(self._adapters) or "none"
            message = f"adapter {view.adapter!r} asked; this engine has {known}."
            raise NotFound(Reason.NOT_FOUND, message, field="adapter", allowed=known)
        if view.is_plain:
            return None
        adapter = self._adapters[view.adapter]
        key = _key(adapter, view.noise)
        factors = adapter.factors if view.noise is None else self._null(key, adapter, view.noise)
        return Delta(key, factors, view.strength)

    def _null(self, key: str, adapter: Adapter, noise: Noise) -> Mapping[str, Factors]:
        with self._lock:
            if key not in self._nulls:
                self._nulls[key] = _draw_all(adapter.factors, noise)
            self._nulls.move_to_end(key)
            while len(self._nulls) > KEPT_NULLS:
                self._nulls.popitem(last=False)
            return self._nulls[key]


def _draw_all(factors: Mapping[str, Factors], noise: Noise) -> Mapping[str, Factors]:
    """The same modules, shapes and scalings with every number drawn anew."""
    return {
        module: Factors(
            read_only(null_noise.draw(noise, f"{module}.lora_A.weight", own.a.shape)),
            read_only(null_noise.draw(noise, f"{module}.lora_B.weight", own.b.shape)),
            own.scaling,
        )
        for module, own in factors.items()
    }


def _key(adapter: Adapter, noise: Noise | None) -> str:
    canonical = json.dumps([adapter.digest, None if noise is None else asdict(noise)], sort_keys=True)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
