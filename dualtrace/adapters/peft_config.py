"""adapter_config.json: what is understood, and everything else refused by name.

It knows PEFT's config keys and which of them change the numbers. It must not know tensors. The file may come from a
stranger: nothing in it is run, and no pattern in it is evaluated that could take more than linear time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dualtrace.problems import InvalidArgument, Reason, Unsupported

MAX_CONFIG_BYTES = 4 * 1024 * 1024
MAX_RANK = 65_536
ALL_LINEAR = "all-linear"

# Where the adapter came from and how it was trained: none of these changes what an evaluation computes.
# fan_in_fan_out only says how the base weight is stored; the factors are [r, in] and [out, r] either way.
NO_EFFECT = frozenset(
    {
        "peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping",
        "lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size",
    }
)  # fmt: skip

READ = frozenset(
    {
        "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
        "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "init_lora_weights",
    }
)  # fmt: skip

REFUSED = {
    "use_dora": "DoRA rescales whole weights by a learned magnitude",
    "modules_to_save": "modules_to_save replaces whole modules of the model",
    "layer_replication": "layer_replication builds another model out of copied layers",
    "trainable_token_indices": "trainable_token_indices replaces rows of the embedding",
    "target_parameters": "target_parameters adapts bare parameters instead of linear modules",
    "lora_bias": "lora_bias adds a bias to the second factor",
    "alora_invocation_tokens": "an activated LoRA works only after certain tokens",
    "use_qalora": "QA-LoRA pools the inputs first",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
}

HARMLESS_STARTS: tuple[Any, ...] = (True, False, "gaussian", "orthogonal")  # others change the base weights as well
PLAIN_PATTERN = re.compile(r"\^?(?:[\w-]|\.|\\\.)+\$?")  # no quantifier, so matching it takes linear time


@dataclass(frozen=True)
class PeftConfig:
    """The part of a LoRA config that decides numbers."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: frozenset[str] | None  # None: every linear module
    excluded: frozenset[str]
    layers: frozenset[int] | None  # None: all
    layer_words: frozenset[str]  # what stands before a layer's number; empty: anything

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(_matching(self.rank_pattern, module), self.rank)

    def scaling_of(self, module: str) -> float:
        alpha, rank = self.alpha_pattern.get(_matching(self.alpha_pattern, module), self.alpha), self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def choose(self, modules: Collection[str]) -> frozenset[str]:
        """The modules of a model that this config adapts, by PEFT's rules."""
        chosen = {module for module in modules if self._is_target(module)}
        return frozenset(module for module in chosen if not self.excluded.intersection(_endings(module)))

    def unknown_targets(self, modules: Iterable[str]) -> tuple[str, ...]:
        """Targets that no module of the model answers to, sorted."""
        endings = {ending for module in modules for ending in _endings(module)}
        return tuple(sorted((self.targets or frozenset()) - endings))

    def _is_target(self, module: str) -> bool:
        if self.targets is None or module in self.targets:
            return True
        if not self.targets.intersection(_endings(module)):
            return False
        return self.layers is None or self._layer_of(module) in self.layers

    def _layer_of(self, module: str) -> int | None:
        parts = module.split(".")
        first = 1 if self.layer_words else 2
        for place in range(first, len(parts) - 1):
            if parts[place].isdecimal() and (not self.layer_words or parts[place - 1] in self.layer_words):
                return int(parts[place])
        return None


def read_peft_config(file: Path) -> PeftConfig:
    """Parse and check; a key that is not understood must stand at a value that means nothing."""
    values = _parse(file)
    kind = values.get("peft_type")
    if kind != "LORA":
        _unsupported(file, f"has peft_type = {_show(kind)}; only LORA is implemented")
    for key, value in values.items():
        if value in (None, False, "", [], {}) or key in READ or key in NO_EFFECT:
            continue
        why = REFUSED.get(key, "this key is not known here and may change the numbers, so it is not ignored")
        _unsupported(file, f"has {_show(key)} = {_show(value)}, which is not implemented: {why}")
    if (bias := values.get("bias", "none")) != "none":
        _unsupported(file, f"has bias = {_show(bias)}: trained biases are not implemented, only bias = 'none'")
    start = values.get("init_lora_weights", True)
    if not any(start is known or (isinstance(start, str) and start == known) for known in HARMLESS_STARTS):
        _unsupported(
            file,
            f"has init_lora_weights = {_show(start)}, which changes the base weights too; convert the adapter to plain "
            "LoRA (PEFT's save_pretrained with path_initial_model_for_weight_conversion does)",
        )
    return _read_numbers(file, values)


def _read_numbers(file: Path, values: dict[str, Any]) -> PeftConfig:
    if type(rslora := values.get("use_rslora") or False) is not bool:
        _malformed(file, "use_rslora", rslora, "true or false")
    targets, layers, words = _targets(file, values), values.get("layers_to_transform"), values.get("layers_pattern")
    layers = [layers] if type(layers) is int else layers or None
    words = [words] if isinstance(words, str) and words else words or []
    if layers is not None and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
        _malformed(file, "layers_to_transform", layers, "a layer's number or a list of them")
    if not isinstance(words, list) or not all(isinstance(word, str) and re.fullmatch(r"\w+", word) for word in words):
        _malformed(file, "layers_pattern", words, "a plain name or a list of them")
    if layers is not None and targets is None:
        _malformed(file, "layers_to_transform", layers, f"absent when target_modules is {ALL_LINEAR!r}")
    return PeftConfig(
        rank=_rank(file, "r", values.get("r")),
        alpha=_alpha(file, "lora_alpha", values.get("lora_alpha")),
        use_rslora=rslora,
        rank_pattern={key: _rank(file, "rank_pattern", rank) for key, rank in _pattern(file, values, "rank_pattern")},
        alpha_pattern={
            key: _alpha(file, "alpha_pattern", alpha) for key, alpha in _pattern(file, values, "alpha_pattern")
        },
        targets=targets,
        excluded=_names(file, "exclude_modules", values.get("exclude_modules") or []),
        layers=None if layers is None else frozenset(layers),
        layer_words=frozenset(words),
    )


def _targets(file: Path, values: dict[str, Any]) -> frozenset[str] | None:
    asked = values.get("target_modules")
    if isinstance(asked, str) and asked.lower() == ALL_LINEAR:
        return None
    if not asked:
        _malformed(file, "target_modules", asked, f"a list of module names, or {ALL_LINEAR!r}")
    return _names(file, "target_modules", asked)


def _names(file: Path, key: str, value: Any) -> frozenset[str]:
    if isinstance(value, str):
        _unsupported(
            file,
            f"has {key} = {_show(value)}, a regular expression; a stranger's expression may take for ever, so it is "
            "never evaluated. Write the list of module names instead",
        )
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        _malformed(file, key, value, "a list of module names")
    return frozenset(value)


def _pattern(file: Path, values: dict[str, Any], key: str) -> Iterable[tuple[str, Any]]:
    pattern = values.get(key) or {}
    if not isinstance(pattern, dict):
        _malformed(file, key, pattern, "an object of module names and numbers")
    for name in pattern:
        if not PLAIN_PATTERN.fullmatch(name):
            _unsupported(file, f"has the {key} {_show(name)}, a regular expression beyond plain module names")
    return pattern.items()


def _matching(pattern: Mapping[str, Any], module: str) -> str:
    """The first key that names the module or its end; "" when none does."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), "")


def _endings(module: str) -> tuple[str, ...]:
    """ "a.b.c" -> "a.b.c", "b.c", "c"."""
    parts = module.split(".")
    return tuple(".".join(parts[place:]) for place in range(len(parts)))


def _rank(file: Path, key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        _malformed(file, key, value, f"a whole number from 1 to {MAX_RANK}")
    return int(value)


def _alpha(file: Path, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e30:
        _malformed(file, key, value, "a finite number")
    return float(value)


def _parse(file: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) != len(pairs):
            raise ValueError("a name stands twice in one object")
        return names

    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise InvalidArgument(Reason.MODEL_INVALID, f"{file} cannot be read: {error.strerror}.") from error
    if len(raw) > MAX_CONFIG_BYTES:
        raise InvalidArgument(Reason.MODEL_INVALID, f"{file} is larger than {MAX_CONFIG_BYTES} bytes.")
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(Reason.MODEL_INVALID, f"{file} is not valid JSON ({str(error)[:120]}).") from error
    if not isinstance(parsed, dict):
        raise InvalidArgument(Reason.MODEL_INVALID, f"{file} is JSON but not an object.")
    return parsed


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _unsupported(file: Path, complaint: str) -> NoReturn:
    raise Unsupported(Reason.ADAPTER_UNSUPPORTED, f"{file} {complaint}.")


def _malformed(file: Path, key: str, value: Any, allowed: str) -> NoReturn:
    message = f"{file} has {key} = {_show(value)}; it must be {allowed}."
    raise InvalidArgument(Reason.MODEL_INVALID, message, allowed=allowed)
