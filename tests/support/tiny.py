"""Tiny model directories, each made once in a test session and gone with it.

Call `tiny_model(family=..., attention=..., seed=...)` anywhere; the fields are those of `TinyModel`. Do not write into
the directory: other tests of the session are given the same one.
"""

from __future__ import annotations

import atexit
import hashlib
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy.typing as npt

from dualtrace.engine import EngineSettings
from dualtrace.models.tiny import TinyModel, write_tiny_model
from dualtrace.models.weight_file import FloatTensor
from dualtrace.reference.engine import ReferenceEngine, load


def tiny_model(**fields: Any) -> Path:
    """The directory of a tiny model, written on first use."""
    return _written(TinyModel(**fields))


@cache
def tiny_reference(**fields: Any) -> ReferenceEngine:
    """The reference engine over that model. It is shared: do not close it."""
    return load(EngineSettings(model=tiny_model(**fields)))


def made_tensor(name: str, values: npt.NDArray[Any]) -> FloatTensor:
    """Values that exist already, as the writer of safetensors files wants them."""
    return FloatTensor(name, values.shape, lambda: [values])


@cache
def _session_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="dualtrace-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _written(model: TinyModel) -> Path:
    # the folder's name becomes the model's id, so it must not change from session to session
    digest = hashlib.sha256(repr(model).encode()).hexdigest()[:8]
    folder = _session_folder() / f"{model.family}-{model.attention}-{digest}"
    return write_tiny_model(folder, model)
