"""Which model families are served, and what their configs may say.

It knows the config keys of transformers' families: what each needs of attention, and which values this engine cannot
honour. It must not know tensors. A key that nobody here has heard of may change the maths, so it is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dualtrace.models.harmless import INERT_VALUES, NO_EFFECT
from dualtrace.problems import Reason, Unsupported

Windows = tuple[int | None, ...]  # native sliding window per layer, None = full

ROPE_KINDS = ("default", "linear", "llama3", "yarn")
"""Kinds whose angles depend on the position alone. `dynamic` and `longrope` look at the longest text of the batch."""


def _no_windows(config: Any) -> Windows:
    return (None,) * int(config.num_hidden_layers)


def _windows_by_type(config: Any) -> Windows:
    known = {"full_attention": None, "sliding_attention": config.sliding_window}
    if unknown := sorted(set(config.layer_types) - set(known)):
        raise _refusal("layer_types", unknown[0], "full_attention and sliding_attention")
    return tuple(known[kind] for kind in config.layer_types)


def _windows_everywhere(config: Any) -> Windows:
    return (config.sliding_window,) * int(config.num_hidden_layers)


@dataclass(frozen=True)
class Family:
    """What this engine must know of a family beyond its transformers class."""

    name: str
    windows: Callable[[Any], Windows] = _no_windows
    legacy: frozenset[str] = frozenset()  # keys of older files, read by transformers
    refused: tuple[tuple[str, tuple[Any, ...]], ...] = ()  # key, and the only values that are honoured
    attention_softcap: str = ""  # the key that holds the soft cap on attention scores
    logit_softcap: str = ""  # the key that holds the soft cap on logits


ROPE = frozenset({"rope_theta", "rope_scaling"})
FORWARD_ONLY = ("use_bidirectional_attention", (None, False))

FAMILIES = {
    family.name: family
    for family in (
        Family("llama", legacy=ROPE),
        Family("gpt2", legacy=frozenset({"n_ctx"}), refused=(("reorder_and_upcast_attn", (False,)),)),
        Family("qwen3", _windows_by_type, legacy=ROPE),
        Family(
            "gemma3_text",
            _windows_by_type,
            legacy=ROPE | {"rope_local_base_freq", "sliding_window_pattern", "cache_implementation"},
            refused=(FORWARD_ONLY,),
            attention_softcap="attn_logit_softcapping",
            logit_softcap="final_logit_softcapping",
        ),
        Family("mistral", _windows_everywhere, legacy=ROPE),
        Family("qwen2", _windows_by_type, legacy=ROPE),
        Family("gemma", legacy=ROPE | {"hidden_activation"}, refused=(FORWARD_ONLY,)),
        Family(
            "gemma2",
            _windows_by_type,
            legacy=ROPE | {"cache_implementation"},
            refused=(FORWARD_ONLY,),
            attention_softcap="attn_logit_softcapping",
            logit_softcap="final_logit_softcapping",
        ),
        Family("gpt_neox", legacy=ROPE | {"rotary_pct", "rotary_emb_base"}),
        Family("phi3", _windows_everywhere, legacy=ROPE),
        Family("opt", legacy=frozenset({"activation_dropout"})),
    )
}


def find_family(model_type: object) -> Family:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise Unsupported(
            Reason.MODEL_UNSUPPORTED,
            f"the checkpoint is of the family {model_type!r}; the torch engine serves {known}.",
            allowed=known,
        )
    return FAMILIES[model_type]


def check_config(family: Family, written: dict[str, Any], config: Any) -> None:
    """Refuse what is not honoured: keys nobody knows, and known keys at values that this engine does not serve.

    `written` is config.json as it stands, `config` what transformers made of it.
    """
    known = set(type(config)().to_dict()) | set(config.attribute_map) | family.legacy | NO_EFFECT
    for key, value in written.items():
        inert = any(value == harmless and type(value) is type(harmless) for harmless in INERT_VALUES.get(key, ()))
        if key not in known and not inert:
            raise Unsupported(
                Reason.MODEL_UNSUPPORTED,
                f"config.json has {key} = {str(value)[:80]}, which the torch engine does not know for {family.name}; "
                "it may change the model's numbers, so it is not ignored.",
            )
    always: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("is_encoder_decoder", (False, None)),
        ("add_cross_attention", (False, None)),
        ("cross_attention_hidden_size", (None,)),
        ("pretraining_tp", (1, None)),
        ("quantization_config", (None,)),
        ("auto_map", (None,)),
        ("pruned_heads", (None, {})),
        ("chunk_size_feed_forward", (0, None)),
    )
    for key, allowed in (*always, *family.refused):
        value = written.get(key, getattr(config, key, None))
        if value not in allowed:
            raise _refusal(key, value, ", ".join(str(one) for one in allowed))
    _check_rope(getattr(config, "rope_parameters", None))


def read_softcap(config: Any, key: str) -> float | None:
    value = getattr(config, key) if key else None
    return None if value is None else float(value)


def _check_rope(parameters: dict[str, Any] | None) -> None:
    """One set of parameters, or one for each kind of layer."""
    if not parameters:
        return
    nested = all(isinstance(value, dict) or value is None for value in parameters.values())
    for one in parameters.values() if nested else (parameters,):
        kind = (one or {}).get("rope_type", "default")
        if kind not in ROPE_KINDS:
            raise _refusal("rope_type", kind, ", ".join(ROPE_KINDS))


def _refusal(key: str, value: object, allowed: str) -> Unsupported:
    return Unsupported(
        Reason.MODEL_UNSUPPORTED,
        f"config.json has {key} = {value!r}; the torch engine serves {allowed}.",
        allowed=allowed,
    )
