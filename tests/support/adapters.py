"""Tiny PEFT adapters, each made once in a test session; and copies of them with something changed.

Do not write into a folder that `tiny_adapter` gave: other tests of the session are given the same one.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dualtrace.checkpoint import Checkpoint, read_safetensors_header
from dualtrace.models.tiny_adapter import write_tiny_adapter
from dualtrace.models.weight_file import write_weights
from tests.support.tiny import made_tensor

Tensors = dict[str, npt.NDArray[np.float32]]
Config = dict[str, Any]


@cache
def tiny_adapter(model: Path, **fields: Any) -> Path:
    """The folder of a tiny adapter for that model directory; `targets` must be a tuple or a name."""
    return write_tiny_adapter(Path(tempfile.mkdtemp(dir=_session_folder())) / "adapter", model, **fields)


def read_tensors(folder: Path) -> Tensors:
    """Copies of an adapter's tensors by their PEFT names."""
    opened = Checkpoint(folder, {}, read_safetensors_header(folder / "adapter_model.safetensors"))
    return {name: opened.values(name, np.float32).copy() for name in opened.tensors}


def changed_adapter(
    source: Path,
    target: Path,
    *,
    config: Callable[[Config], None] | None = None,
    tensors: Callable[[Tensors], None] | None = None,
) -> Path:
    """A copy of an adapter whose config or tensors were changed."""
    settings, values = json.loads((source / "adapter_config.json").read_text()), read_tensors(source)
    if config is not None:
        config(settings)
    if tensors is not None:
        tensors(values)
    target.mkdir(parents=True, exist_ok=True)
    (target / "adapter_config.json").write_text(json.dumps(settings))
    write_weights(target / "adapter_model.safetensors", [made_tensor(name, part) for name, part in values.items()])
    return target


def broken_adapter(source: Path, target: Path) -> Path:
    """A copy with a NaN in its first tensor."""

    def poison(tensors: Tensors) -> None:
        next(iter(tensors.values()))[0, 0] = np.nan

    return changed_adapter(source, target, tensors=poison)


@cache
def _session_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="dualtrace-adapters-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
