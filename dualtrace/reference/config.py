"""Reading a model's config so that nothing in it is overlooked.

It knows that a key which nobody asked for may change the maths. It must not know any model family.
"""

from __future__ import annotations

from typing import Any, NoReturn

from dualtrace.models.harmless import INERT_VALUES, NO_EFFECT
from dualtrace.problems import InvalidArgument, Reason, Unsupported

_REQUIRED = object()


class ConfigReader:
    """Hands out config values by name and type, and remembers which were asked for."""

    def __init__(self, values: dict[str, Any], where: str = "config.json") -> None:
        self._values = values
        self._where = where
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def count(self, key: str, default: Any = _REQUIRED) -> int:
        """A positive whole number; a null in the file means the default."""
        value = self._take(key, default)
        if type(value) is not int or value < 1:
            self._refuse_value(key, value, "a whole number above 0")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A positive number."""
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self._refuse_value(key, value, "a finite number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._take(key, default)
        if not isinstance(value, bool):
            self._refuse_value(key, value, "true or false")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: Any = _REQUIRED) -> str:
        """A name of which only some are implemented."""
        value = self._take(key, default)
        if value not in allowed:
            raise Unsupported(
                Reason.MODEL_UNSUPPORTED,
                f"{self._where} has {key} = {value!r}; the reference engine implements {', '.join(allowed)}.",
                allowed=", ".join(allowed),
            )
        return str(value)

    def mapping(self, key: str) -> dict[str, Any] | None:
        value = self._take(key, None)
        if value is not None and not isinstance(value, dict):
            self._refuse_value(key, value, "an object or null")
        return value

    def refuse_true(self, key: str) -> None:
        if self.flag(key, False):
            raise Unsupported(
                Reason.MODEL_UNSUPPORTED,
                f"{self._where} has {key} = true, which the reference engine does not implement.",
            )

    def finish(self) -> None:
        """Refuse what nobody asked for, unless it is known to change nothing."""
        for key, value in self._values.items():
            if key in self._read or key in NO_EFFECT:
                continue
            if not any(value == inert and type(value) is type(inert) for inert in INERT_VALUES.get(key, ())):
                raise Unsupported(
                    Reason.MODEL_UNSUPPORTED,
                    f"{self._where} has {key} = {str(value)[:80]}, which the reference engine does not handle; "
                    "it may change the model's numbers, so it is not ignored.",
                )

    def _take(self, key: str, default: Any) -> Any:
        self._read.add(key)
        value = self._values.get(key)
        if value is None and default is _REQUIRED:
            raise InvalidArgument(Reason.MODEL_INVALID, f"{self._where} has no {key}.")
        return default if value is None else value

    def _refuse_value(self, key: str, value: Any, allowed: str) -> NoReturn:
        raise InvalidArgument(
            Reason.MODEL_INVALID,
            f"{self._where} has {key} = {str(value)[:80]!r}; it must be {allowed}.",
            allowed=allowed,
        )
