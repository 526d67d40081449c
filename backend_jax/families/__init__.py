"""The model families, one declarative file each: which config keys it handles, and what its tensors are called.

A family is added by one file here, which the registry below finds by its name: the module's name is the checkpoint's
`model_type`, and it defines FAMILY. It knows the list. It must not know how a decoder computes.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from backend_jax.architecture import Activation, Architecture
from backend_jax.config import Keys, refuse_model
from dualtrace.problems import Reason, Unsupported


@dataclass(frozen=True)
class Family:
    read: Callable[[Keys], Architecture]  # asks for every key that the family has
    # role -> name in the checkpoint, without .weight or .bias; {} stands for the layer. Roles that the architecture
    # does not have (a second norm, a gate) are not looked for.
    names: dict[str, str]
    prefix: str = ""  # of all names but the head's; checkpoints saved without their head may lack it
    transposed: bool = False  # linear weights are stored [in, out]
    buffers: str = r"(.*\.)?rotary_emb\.inv_freq"  # tensors that only repeat the config, as a regular expression


ACTIVATIONS = {
    "silu": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
}


def read_activation(keys: Keys, key: str, default: str) -> Activation:
    return ACTIVATIONS[keys.one_of(key, tuple(ACTIVATIONS), default)]


def read_heads(keys: Keys, hidden: int) -> tuple[int, int, int]:
    """Query heads, key-value heads and the columns of a head, under the names most families use."""
    heads = keys.count("num_attention_heads")
    kv_heads = keys.count("num_key_value_heads", heads)
    if heads % kv_heads or (not keys.has("head_dim") and hidden % heads):
        refuse_model(f"{heads} heads do not divide into {kv_heads} key-value heads and {hidden} columns")
    return heads, kv_heads, keys.count("head_dim", hidden // heads)


def read_windows(keys: Keys, layers: int, usual: Callable[[int], bool]) -> tuple[int | None, ...]:
    """The window of each layer: by `layer_types`, else where `usual(layer)`; () when no layer has one."""
    window = keys.count("sliding_window") if keys.has("sliding_window") else None
    keys.ignore("sliding_window")
    types = keys.names("layer_types", ("full_attention", "sliding_attention"), layers)
    slides = [usual(layer) if types is None else types[layer] == "sliding_attention" for layer in range(layers)]
    if types is not None and any(slides) and window is None:
        refuse_model("config.json has sliding_attention layers and no sliding_window")
    return tuple(window if sliding else None for sliding in slides) if window is not None and any(slides) else ()


def family_names() -> tuple[str, ...]:
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def find_family(name: object) -> Family:
    if not isinstance(name, str) or name not in family_names():
        allowed = ", ".join(family_names())
        raise Unsupported(
            Reason.MODEL_UNSUPPORTED,
            f"the checkpoint is of the family {name!r}; the JAX engine implements {allowed}",
            allowed=allowed,
        )
    family: Family = importlib.import_module(f"{__name__}.{name}").FAMILY
    return family
