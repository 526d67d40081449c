"""The vectors of protos/vectors as test parameters. It knows files and JSON, and must not know what they mean."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "protos" / "vectors"
Case = dict[str, Any]


@cache
def load(name: str) -> dict[str, Any]:
    vectors: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return vectors


def cases(name: str, key: str = "cases") -> pytest.MarkDecorator:
    """Run the test once for each case of the file."""
    return pytest.mark.parametrize("case", load(name)[key], ids=lambda case: case["name"])


def number(value: float | str | None) -> float | None:
    """JSON has no infinities: they stand as strings. None is absent."""
    return float(value) if isinstance(value, str) else value
