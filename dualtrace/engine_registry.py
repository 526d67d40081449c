"""Which engines are installed, by name: two of our own, and whatever other packages announce.

An engine package announces itself with an entry point in the group `dualtrace.engines` that names its
`load(settings) -> Engine`. Nothing is imported before it is asked for. It must not know what an engine does.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module, metadata
from importlib.util import find_spec

from dualtrace.engine import Engine, EngineSettings
from dualtrace.problems import InvalidArgument, Reason, Unsupported

LoadEngine = Callable[[EngineSettings], Engine]

GROUP = "dualtrace.engines"
OWN = {"reference": "dualtrace.reference:load", "fake": "dualtrace.fake:load"}
FRAMEWORKS = {"torch": ("torch", "transformers"), "jax": ("jax",)}
"""Engines that come with us, and the modules each needs; the extra that brings them has the engine's name."""


def list_engines() -> dict[str, str]:
    """Engine name -> `module:function`. Our own names cannot be taken by another package."""
    announced = {point.name: point.value for point in metadata.entry_points(group=GROUP)}
    return {**dict(sorted(announced.items())), **OWN}


def has_framework(name: str) -> bool:
    """Whether the modules that one of FRAMEWORKS needs are there; none of them is imported."""
    return all(find_spec(module) is not None for module in FRAMEWORKS[name])


def find_engine(name: str) -> LoadEngine:
    """The `load` of an engine; an unknown name is refused with the installed ones."""
    engines = list_engines()
    if name not in engines:
        installed = ", ".join(engines)
        message = f"engine {name!r} asked; installed are {installed}"
        raise InvalidArgument(Reason.NOT_FOUND, message, field="engine", allowed=installed)
    module, _, function = engines[name].partition(":")
    try:
        load: LoadEngine = getattr(import_module(module), function)
    except ImportError as error:
        remedy = f"pip install 'dualtrace[{name}]'" if name in FRAMEWORKS else "install what it needs"
        message = f"engine {name!r} is announced but cannot be imported: {error}; {remedy}"
        raise Unsupported(Reason.NOT_IMPLEMENTED, message, field="engine") from error
    return load
