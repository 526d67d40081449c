"""Tiny random LoRA adapters in PEFT's own form, for a model directory of a known family.

It knows what a PEFT folder looks like and which tensors of a checkpoint belong to linear modules. It must not know
engines. The same arguments give the same bytes on every machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from dualtrace.checkpoint import open_checkpoint
from dualtrace.models.tiny import Values, standard_normal
from dualtrace.models.weight_file import FloatTensor, write_weights
from dualtrace.problems import FailedPrecondition, InvalidArgument, Reason, Unsupported

FILES = ("adapter_config.json", "adapter_model.safetensors")
DEFAULT_TARGETS = {"llama": ("q_proj", "v_proj"), "gpt2": ("c_attn",)}
LINEARS = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
}

Targets = Sequence[str] | Literal["all-linear"] | None


def write_tiny_adapter(
    directory: Path,
    model_directory: Path,
    *,
    rank: int = 4,
    alpha: int = 8,
    seed: int = 0,
    targets: Targets = None,
    rslora: bool = False,
) -> Path:
    """Write a random adapter that moves a tiny model's logits visibly. `targets` None: the family's usual ones.

    A directory that is not empty is refused.
    """
    checkpoint = open_checkpoint(model_directory)
    family = _family(checkpoint.config.get("model_type"))
    ends = _choose(family, targets)
    if rank < 1 or seed < 0:
        raise InvalidArgument(Reason.OUT_OF_RANGE, f"rank {rank}, seed {seed} asked; at least 1 and 0.")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FailedPrecondition(Reason.ALREADY_EXISTS, f"{directory} is not empty; choose another folder.")
    tensors: list[FloatTensor] = []
    for name, entry in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if module == name or len(entry.shape) != 2 or module.rsplit(".", 1)[-1] not in ends:
            continue
        inputs, outputs = entry.shape if family == "gpt2" else entry.shape[::-1]  # Conv1D keeps [in, out]
        module = f"transformer.{module}" if module.startswith("h.") else module  # saved without its head
        # a delta of a good part of the weight: strength 1 / sqrt(in) for unit inputs, whatever rank and alpha are
        size = (math.sqrt(rank) if rslora else rank) / (alpha or 1)
        tensors.append(_factor(seed, f"{module}.lora_A", (rank, inputs), 1 / math.sqrt(inputs)))
        tensors.append(_factor(seed, f"{module}.lora_B", (outputs, rank), 0.5 * size / math.sqrt(rank)))
    directory.mkdir(parents=True, exist_ok=True)
    write_weights(directory / "adapter_model.safetensors", tensors)
    config = _config(family, model_directory, rank, alpha, ends if targets != "all-linear" else targets, rslora)
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return directory


def _family(name: object) -> str:
    if name not in LINEARS:
        known = ", ".join(LINEARS)
        raise Unsupported(
            Reason.MODEL_UNSUPPORTED, f"the model is of the family {name!r}; known: {known}.", allowed=known
        )
    return str(name)


def _choose(family: str, targets: Targets) -> tuple[str, ...]:
    if targets is None:
        return DEFAULT_TARGETS[family]
    if targets == "all-linear":
        return LINEARS[family]
    if isinstance(targets, str) or not targets or (unknown := sorted(set(targets) - set(LINEARS[family]))):
        allowed = ", ".join(LINEARS[family])
        asked = targets if isinstance(targets, str) or not targets else unknown[0]
        raise InvalidArgument(
            Reason.OUT_OF_RANGE,
            f"target {asked!r} asked; {family} has {allowed}, or say all-linear.",
            field="targets",
            allowed=allowed,
        )
    return tuple(targets)


def _factor(seed: int, name: str, shape: tuple[int, int], deviation: float) -> FloatTensor:
    def pieces() -> list[Values]:
        normal = standard_normal(f"{seed}:{name}", math.prod(shape)).reshape(shape)
        return [(deviation * normal).astype(np.float32)]

    return FloatTensor(f"base_model.model.{name}.weight", shape, pieces)


def _config(
    family: str, model: Path, rank: int, alpha: int, targets: Sequence[str] | str, rslora: bool
) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.resolve().name,  # a name, not a place: places differ between machines
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": rslora,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "bias": "none",
        "fan_in_fan_out": family == "gpt2",
        "inference_mode": True,
    }
