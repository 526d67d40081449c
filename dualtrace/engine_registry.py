"""Which engines are installed, by name: two of our own, and whatever other packages announce.

An engine package announces itself with an entry point in the group `dualtrace.engines` that names its
`load(settings) -> Engine`. Nothing is imported before it is asked for. It must not know what an engine does.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module, metadata

from dualtrace.engine import Engine, EngineSettings
from dualtrace.problems import InvalidArgument, Reason, Unsupported

LoadEngine = Callable[[EngineSettings], Engine]

GROUP = "dualtrace.engines"
OWN = {"reference": "dualtrace.reference:load", "fake": "dualtrace.fake:load"}
EXTRAS = ("torch", "jax")  # engines that come with us and need a framework: the extra has the engine's name


def list_engines() -> dict[str, str]:
    """Engine name -> `module:function`. Our own names cannot be taken by another package."""
    announced = {point.name: point.value for point in metadata.entry_points(group=GROUP)}
    return {**dict(sorted(announced.items())), **OWN}


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
        remedy = f"pip install 'dualtrace[{name}]'" if name in EXTRAS else "install what it needs"
        message = f"engine {name!r} is announced but cannot be imported: {error}; {remedy}"
        raise Unsupported(Reason.NOT_IMPLEMENTED, message, field="engine") from error
    return load
