"""A PEFT folder: adapter_config.json and adapter_model.safetensors, fitted to the linear modules of one model.

It knows PEFT's tensor names. It must not know views or engines. Every byte may come from a stranger: names, dtypes and
shapes are checked against the model before one value is read, and pickles are never opened.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from dualtrace.adapters.factors import Factors, read_only
from dualtrace.adapters.peft_config import PeftConfig, read_peft_config
from dualtrace.checkpoint import Checkpoint, TensorEntry, read_safetensors_header, weights_digest
from dualtrace.problems import InvalidArgument, NotFound, Problem, Reason, Unsupported

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FACTOR_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
DTYPES = ("F32", "F16", "BF16")  # all that a float32 holds exactly

Linears = Mapping[str, tuple[int, int]]
"""Every linear module of a model that can carry a delta, the output head not among them: name -> (in, out)."""

ODD_NAMES = (
    # (what stands in the name, what that means)
    ("lora_embedding_", "LoRA on embeddings is not implemented"),
    ("lora_magnitude_vector", "DoRA is not implemented"),
    ("modules_to_save", "modules_to_save is not implemented"),
    (".lora_B.bias", "a bias in the second factor is not implemented"),
    (".lora_B.default.bias", "a bias in the second factor is not implemented"),
    ("trainable_tokens", "trainable_token_indices is not implemented"),
)


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter, fitted to a model."""

    digest: str  # "sha256:..." over the tensors and the scaling of each module
    factors: Mapping[str, Factors]  # by module name, sorted


def open_adapter(directory: Path, linears: Linears) -> Adapter:
    """Read a PEFT folder for a model with these linear modules, whole or not at all."""
    _check_files(directory)
    config = read_peft_config(directory / CONFIG)
    entries = read_safetensors_header(directory / WEIGHTS)
    pairs = _pair(directory / WEIGHTS, entries)
    _check_modules(directory, config, set(pairs), linears)
    for module, (a, b) in pairs.items():
        _check_shapes(directory / WEIGHTS, config.rank_of(module), linears[module], a, b)
    weights = Checkpoint(directory, {}, entries)
    factors = {
        module: Factors(_values(weights, a), _values(weights, b), config.scaling_of(module))
        for module, (a, b) in sorted(pairs.items())
    }
    digest = _digest(weights, factors)
    weights.close()
    return Adapter(digest, factors)


def _check_files(directory: Path) -> None:
    if not directory.is_dir():
        raise NotFound(Reason.NOT_FOUND, f"{directory} is not a directory; give the folder that holds {CONFIG}.")
    if not (directory / CONFIG).is_file():
        raise NotFound(Reason.NOT_FOUND, f"{directory} holds no {CONFIG}, so it is no PEFT adapter.")
    if (directory / WEIGHTS).is_file():
        return
    if (directory / PICKLE).exists():
        raise Unsupported(
            Reason.ADAPTER_UNSUPPORTED,
            f"{directory} holds pickle weights only ({PICKLE}); loading a pickle can run any code it contains, so it "
            "is never opened. Save the adapter as safetensors (save_pretrained of a current peft does).",
        )
    raise NotFound(Reason.NOT_FOUND, f"{directory} holds no {WEIGHTS}.")


def _pair(file: Path, entries: Mapping[str, TensorEntry]) -> dict[str, tuple[TensorEntry, TensorEntry]]:
    """Both factors of each module, by module name."""
    found: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        match = FACTOR_NAME.fullmatch(name)
        if match is None:
            _refuse_name(file, name)
        if entry.dtype not in DTYPES:
            allowed = ", ".join(DTYPES)
            message = f"{file}: tensor {name!r} is {entry.dtype}; factors must be {allowed}."
            raise Unsupported(Reason.ADAPTER_UNSUPPORTED, message, allowed=allowed)
        if found.setdefault(match[1], {}).setdefault(match[2], entry) is not entry:
            _mismatch(file, f"holds lora_{match[2]} of {match[1]} twice, with and without the adapter's name")
    if not found:
        _mismatch(file, "holds no tensors at all")
    for module, pair in found.items():
        if len(pair) != 2:
            [(present, _)] = pair.items()
            _mismatch(file, f"has lora_{present} of {module} without its lora_{'B' if present == 'A' else 'A'}")
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}


def _refuse_name(file: Path, name: str) -> NoReturn:
    for part, meaning in ODD_NAMES:
        if part in name:
            raise Unsupported(Reason.ADAPTER_UNSUPPORTED, f"{file} holds the tensor {name!r}: {meaning}.")
    _mismatch(
        file,
        f"holds the tensor {name!r}, which is not used; factors are named base_model.model.MODULE.lora_A.weight and "
        "lora_B.weight",
    )


def _check_modules(directory: Path, config: PeftConfig, found: set[str], linears: Linears) -> None:
    """The config, the tensors and the model must speak of the same modules."""
    if unknown := config.unknown_targets(linears):
        _mismatch(
            directory,
            f"adapts {unknown[0]!r}, and the model has no such linear module (it has {_some(linears)}); "
            "it was made for another model",
        )
    if strange := sorted(found - set(linears)):
        _mismatch(
            directory,
            f"holds factors for {strange[0]!r}, and the model has no such linear module (it has {_some(linears)}); "
            "it was made for another model",
        )
    chosen = config.choose(linears)
    if unused := sorted(found - chosen):
        _mismatch(directory, f"holds factors for {unused[0]!r}, which its config does not adapt: they are not used")
    if absent := sorted(chosen - found):
        _mismatch(
            directory,
            f"has no factors for {absent[0]!r}, which its config adapts ({len(absent)} modules lack theirs)",
        )


def _check_shapes(file: Path, rank: int, size: tuple[int, int], a: TensorEntry, b: TensorEntry) -> None:
    inputs, outputs = size
    for entry, wanted in ((a, (rank, inputs)), (b, (outputs, rank))):
        if entry.shape != wanted:
            _mismatch(
                file,
                f"has {entry.name!r} with the shape {list(entry.shape)}; the model and rank {rank} ask for "
                f"{list(wanted)}",
            )


def _values(weights: Checkpoint, entry: TensorEntry) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return read_only(np.array(weights.values(entry.name, np.float32)))  # a copy: the file may change or go


def _digest(weights: Checkpoint, factors: Mapping[str, Factors]) -> str:
    """SHA-256 over compact JSON: [digest of the tensors, [[module, scaling], ...] sorted by module]."""
    scalings = [[module, factors[module].scaling] for module in sorted(factors)]
    canonical = json.dumps([weights_digest(weights), scalings], separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def _some(linears: Linears) -> str:
    kinds = sorted({name.rsplit(".", 1)[-1] for name in linears})
    return ", ".join(kinds[:12])


def _mismatch(path: Path, complaint: str) -> NoReturn:
    problem: Problem = InvalidArgument(Reason.ADAPTER_MISMATCH, f"{path} {complaint}.")
    raise problem
