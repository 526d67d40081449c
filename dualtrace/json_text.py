"""JSON text of long documents, as `json.dumps` writes it and sooner: a number that stands in several is spelled once.

It knows plain JSON values. It must not know what any document means.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from types import NoneType
from typing import Any

LONG = 64
"""Entries from which on a list is looked at: below, there is nothing to save."""


MOST_KEPT = 400_000
"""Texts that are remembered, some 260 bytes each; what comes later is spelled where it stands."""


class FloatTexts(dict[float | None, str]):
    """The texts of finite floats, as JSON has them. Spelling one takes five times as long as finding it again."""

    def __init__(self) -> None:
        super().__init__({None: "null"})

    def __missing__(self, value: float | None) -> str:
        assert value is not None
        if not math.isfinite(value):
            raise ValueError(f"JSON has no number {value}")
        text = float.__repr__(value)
        if value and len(self) < MOST_KEPT:  # 0.0 and -0.0 are equal keys with two texts
            self[value] = text
            self[-value] = text[1:] if text[0] == "-" else f"-{text}"
        return text

    def learn(self, values: Iterable[float]) -> None:
        """Spell these now: a stream leaves time between its parts, and its end does not.

        What JSON has no number for is passed over here: whoever writes it says what becomes of it.
        """
        for value in values:
            if math.isfinite(value):
                self[value]


def dump_json(document: Any, texts: FloatTexts | None = None, *, compact: bool = False) -> str:
    """One line of ASCII. `texts`: of numbers that other documents hold too."""
    return _Writer(FloatTexts() if texts is None else texts, compact).write(document)


class _Writer:
    def __init__(self, texts: FloatTexts, compact: bool) -> None:
        self._texts = texts
        self._comma, self._colon = (",", ":") if compact else (", ", ": ")
        separators = (self._comma, self._colon)
        # What it is given was made a moment ago by our own code, from values that hold no cycles.
        self._plain = json.JSONEncoder(check_circular=False, allow_nan=False, separators=separators).encode

    def write(self, value: Any) -> str:
        if isinstance(value, dict):
            parts = [f"{self._plain(str(key))}{self._colon}{self.write(entry)}" for key, entry in value.items()]
            return f"{{{self._comma.join(parts)}}}"
        if not isinstance(value, list):
            return self._plain(value)
        kinds = set(map(type, value))
        if not kinds.isdisjoint({dict, list}):
            return f"[{self._comma.join(map(self.write, value))}]"
        if len(value) >= LONG and float in kinds and kinds <= {float, NoneType}:
            return f"[{self._comma.join(map(self._texts.__getitem__, value))}]"
        return self._plain(value)
