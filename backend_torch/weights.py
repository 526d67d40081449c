"""A checkpoint becomes a transformers model whose attention is ours.

It knows directories and transformers' loading. It must not know batches. Only safetensors
are read, no code of a model is run, and nothing is fetched from a network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from backend_torch.attention import ATTENTION, register_attention
from backend_torch.families import Family, Windows, check_config, find_family, read_softcap
from dualtrace.checkpoint import Checkpoint
from dualtrace.models.harmless import BUFFERS
from dualtrace.problems import InvalidArgument, Reason, Unsupported

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True, eq=False)
class Model:
    """What the engine needs of a loaded model."""

    family: Family
    body: nn.Module  # ids -> final hidden states
    head: nn.Module  # hidden states -> logits, before the soft cap
    blocks: tuple[nn.Module, ...]  # the decoder layers in order
    linears: dict[str, nn.Module]  # name as in the checkpoint -> nn.Linear or Conv1D, the head excepted
    windows: Windows
    attention_softcap: float | None
    logit_softcap: float | None
    vocab_size: int
    max_positions: int
    query_heads: int
    kv_heads: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device


def load_model(checkpoint: Checkpoint, dtype: str, device: str) -> Model:
    if dtype not in DTYPES:
        allowed = ", ".join(DTYPES)
        raise Unsupported(
            Reason.MODEL_UNSUPPORTED, f"dtype {dtype!r} asked; the torch engine knows {allowed}.", allowed=allowed
        )
    family = find_family(checkpoint.config.get("model_type"))
    config = _read_config(checkpoint)
    check_config(family, checkpoint.config, config)
    _check_tied_head(checkpoint, config)
    whole = _load_whole(checkpoint, config, DTYPES[dtype]).to(find_device(device))
    head = whole.get_output_embeddings()
    layers = int(config.num_hidden_layers)
    blocks = max((m for m in whole.modules() if isinstance(m, nn.ModuleList) and len(m) == layers), key=len)
    return Model(
        family=family,
        body=whole.base_model,
        head=head,
        blocks=tuple(blocks),
        linears={n: m for n, m in whole.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head},
        windows=family.windows(config),
        attention_softcap=read_softcap(config, family.attention_softcap),
        logit_softcap=read_softcap(config, family.logit_softcap),
        vocab_size=int(head.weight.shape[0]),
        max_positions=int(config.max_position_embeddings),
        query_heads=int(config.num_attention_heads),
        kv_heads=int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads),
        hidden_size=int(config.hidden_size),
        dtype=DTYPES[dtype],
        device=head.weight.device,
    )


def linear_sizes(model: Model) -> dict[str, tuple[int, int]]:
    """Every linear module an adapter may name: (in, out)."""
    shapes = {name: tuple(module.weight.shape) for name, module in model.linears.items()}  # type: ignore[arg-type]
    return {
        name: (shape[0], shape[1]) if isinstance(model.linears[name], Conv1D) else (shape[1], shape[0])
        for name, shape in shapes.items()
    }


def find_device(name: str) -> torch.device:
    if name in ("", "cpu"):
        return torch.device("cpu")
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise Unsupported(
            Reason.MODEL_UNSUPPORTED,
            f"device {name!r} asked; it can be cpu, cuda or cuda:N.",
            allowed="cpu, cuda, cuda:N",
        )
    count = torch.cuda.device_count()
    index = int(name.partition(":")[2] or 0)
    if index >= count:
        raise Unsupported(Reason.MODEL_UNSUPPORTED, f"device {name!r} asked; this machine has {count} CUDA devices.")
    return torch.device("cuda", index)


def _read_config(checkpoint: Checkpoint) -> Any:
    try:
        return AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InvalidArgument(
            Reason.MODEL_INVALID, f"transformers cannot read {checkpoint.directory}/config.json: {str(error)[:200]}"
        ) from error


def _load_whole(checkpoint: Checkpoint, config: Any, dtype: torch.dtype) -> Any:
    register_attention()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.directory,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
        raise InvalidArgument(
            Reason.MODEL_INVALID, f"transformers cannot load {checkpoint.directory}: {str(error)[:300]}"
        ) from error
    whole, told = loaded
    unused = [name for name in told["unexpected_keys"] if not BUFFERS.fullmatch(name)]
    for what, names in (("lacks", told["missing_keys"]), ("holds, without use,", unused)):
        if names:
            raise InvalidArgument(
                Reason.MODEL_INVALID,
                f"{checkpoint.directory} {what} {len(names)} tensors, first {min(names)!r}; "
                "it is of another architecture than its config says.",
            )
    if told["mismatched_keys"]:
        raise InvalidArgument(
            Reason.MODEL_INVALID, f"a tensor has another shape than its config asks for: {told['mismatched_keys'][0]}"
        )
    return whole.requires_grad_(False).train(False)


def _check_tied_head(checkpoint: Checkpoint, config: Any) -> None:
    """A head that the config ties and the file stores all the same must be the embedding itself."""
    copy = checkpoint.tensors.get("lm_head.weight")
    if copy is None or not config.tie_word_embeddings:
        return
    names = [n for n in checkpoint.tensors if re.search(r"(^|\.)(embed_tokens|wte|embed_in)\.weight$", n)]
    for name in names:
        entry = checkpoint.tensors[name]
        same = (copy.dtype, copy.shape) == (entry.dtype, entry.shape)
        if not same or not bool((checkpoint.raw(copy.name) == checkpoint.raw(name)).all()):
            raise InvalidArgument(
                Reason.MODEL_INVALID,
                f"the config ties the head to the embedding, but {copy.name!r} differs from {name!r}; "
                "set tie_word_embeddings to false or remove the tensor.",
            )
