"""Where in the model numbers first stopped being finite, for the message that says so.

It watches one call of the body, only after one went wrong. It knows layers and flat rows. It must not know why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from backend_torch.attention import Work

EMBEDDINGS, NORM, HEAD = "the embeddings", "the final norm", "the output head"


@contextmanager
def watch_layers(blocks: Sequence[nn.Module], work: Work, broken: dict[int, str]) -> Iterator[None]:
    """For the time of the block: fill `broken`, strand -> the first place whose output was not finite."""

    def judge(layer: int, hidden: Tensor, place: str) -> None:
        bad = ~torch.isfinite(hidden[0]).all(dim=1)  # [N]
        for one in work.stages[work.stage_at(layer)].placed:
            if bool(bad[one.rows].any()):
                for member in one.members:
                    broken.setdefault(member.strand.index, place)

    def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        judge(0, arguments[0] if arguments else named["hidden_states"], EMBEDDINGS)

    def after(layer: int) -> Callable[..., None]:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            judge(layer, output[0] if isinstance(output, tuple) else output, f"layer {layer}")

        return look

    handles = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [block.register_forward_hook(after(layer)) for layer, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
