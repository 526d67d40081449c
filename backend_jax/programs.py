"""The compiled functions of one engine: each made once, counted, and safe to make from another thread.

It knows keys and compilers. It must not know what is compiled.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import jax

from backend_jax.device import house_rules
from backend_jax.mesh import Spread, named_sharding

Compiled = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Recipe:
    """A function of a key, and how to come by it: `lower` gives what `.compile()` is called on."""

    kind: str
    key: Hashable
    name: str  # for people: "forward 4x256"
    lower: Callable[[], Any]


class Programs:
    """Ahead-of-time compiled functions by (kind, key); an unforeseen shape is an error, never a silent recompile."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, Hashable], Compiled] = {}
        self._locks: dict[tuple[str, Hashable], threading.Lock] = {}
        self._guard = threading.Lock()
        self.compilations: Counter[str] = Counter()  # kind -> how many were compiled or taken from the disk cache
        self.late: Counter[str] = Counter()  # those of them for which a forward had to wait

    def has(self, recipe: Recipe) -> bool:
        return (recipe.kind, recipe.key) in self._made

    def keys(self, kind: str) -> tuple[Hashable, ...]:
        with self._guard:
            return tuple(key for known, key in self._made if known == kind)

    def find(self, recipe: Recipe) -> Compiled:
        """For a forward under way: it was made before, or the forward waits for it."""
        made = self._made.get((recipe.kind, recipe.key))
        return self._make(recipe, late=True) if made is None else made

    def prepare(self, recipe: Recipe) -> None:
        """For a forward to come, on any thread."""
        self._make(recipe, late=False)

    def _make(self, recipe: Recipe, *, late: bool) -> Compiled:
        """Compile, unless it is there already. Two threads that want the same wait for one compilation."""
        place = (recipe.kind, recipe.key)
        with self._guard:
            lock = self._locks.setdefault(place, threading.Lock())
        with lock:
            if place not in self._made:
                with house_rules():
                    compiled = recipe.lower().compile()
                with self._guard:
                    self._made[place] = compiled
                    self.compilations[recipe.kind] += 1
                    self.late[recipe.kind] += late
            return self._made[place]

    def clear(self) -> None:
        with self._guard:
            self._made.clear()


def shape_of(shape: tuple[int, ...], dtype: Any, sharding: Any = None) -> Any:
    """What stands for an array while a function is traced."""
    make: Callable[..., Any] = jax.ShapeDtypeStruct  # it has no types of its own
    return make(shape, dtype, sharding=sharding)


def outline(tree: Any, spread: Spread | None = None) -> Any:
    """Shapes and dtypes of a tree of arrays, numpy or JAX, for tracing without values. What does not lie over the
    mesh yet will be copied to all of it."""
    copied = None if spread is None else spread.copied
    return jax.tree.map(lambda leaf: shape_of(leaf.shape, leaf.dtype, named_sharding(leaf) or copied), tree)


def jit(function: Compiled, spread: Spread | None, answers: Any = None, **options: Any) -> Any:
    """`jax.jit`; over a mesh, what comes back lies as `answers` say, or else whole on every device."""
    if spread is not None:
        options["out_shardings"] = spread.copied if answers is None else answers
    return jax.jit(function, **options)
