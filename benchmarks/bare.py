"""What transformers does by itself: the bare body, which is the limit, and the plain ways people score with it.

It knows torch and transformers, in this process. It must not know dualtrace's engines or the wire.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from benchmarks.shapes import ChunkedText, random_ids
from benchmarks.sidecars import THREADS, model_folder
from benchmarks.table import Missing
from dualtrace.arrays import IntArray


@cache
def load_bare(attention: str = "sdpa") -> Any:
    """The model as transformers has it, float32."""
    try:
        torch, transformers = import_module("torch"), import_module("transformers")
    except ImportError as error:
        raise Missing(f"transformers or torch is not installed ({error})") from error
    torch.set_num_threads(THREADS)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_folder(), attn_implementation=attention, dtype="float32"
    )
    return model.requires_grad_(False).train(False)


def load_tokenizer() -> Any:
    return import_module("transformers").AutoTokenizer.from_pretrained(model_folder())


def body_seconds(*shapes: tuple[int, int], head: bool = False) -> float:
    """The transformer's body over [rows, tokens] of each shape, one call each; with the head at all positions too."""
    import torch

    model = load_bare()
    inputs = [
        torch.from_numpy(random_ids(7, rows * tokens).astype(np.int64)).view(rows, tokens) for rows, tokens in shapes
    ]
    begun = time.perf_counter()
    with torch.inference_mode():
        for ids in inputs:
            hidden = model.model(ids, use_cache=False).last_hidden_state
            if head:
                model.lm_head(hidden)
    return time.perf_counter() - begun


def score_one_by_one(prompt: IntArray, completions: Sequence[IntArray]) -> list[float]:
    """A forward of prompt + completion for each item, log_softmax over its logits, the target gathered."""
    import torch

    model = load_bare()
    sums = []
    with torch.inference_mode():
        for completion in completions:
            ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))
            logprobs = model(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            own = logprobs.gather(1, ids[1:, None])[:, 0]
            sums.append(float(own[prompt.size - 1 :].double().sum()))
    return sums


def knock_out(text: ChunkedText, chunks: Sequence[tuple[int, int]], attention: str) -> tuple[list[float], list[float]]:
    """The answer's logprob with each chunk cut, and KL(base || masked) if asked: a full forward with a 4-D mask for
    each chunk, and one without a cut."""
    import torch

    model = load_bare(attention)
    ids = torch.from_numpy(text.ids.astype(np.int64))
    begin, end = text.answer

    def answer(mask: Any) -> Any:
        logits = model(ids[None], attention_mask=mask, use_cache=False).logits[0, begin - 1 : end - 1]
        return logits.double().log_softmax(-1)

    causal = torch.full((ids.numel(), ids.numel()), torch.finfo(torch.float32).min).triu(1)
    sums, kls = [], []
    with torch.inference_mode():
        base = answer(causal[None, None])
        for first, last in chunks:
            mask = causal.clone()
            mask[slice(*text.cut_rows), first:last] = torch.finfo(torch.float32).min
            masked = answer(mask[None, None])
            sums.append(float(masked.gather(1, ids[begin:end, None]).sum()))
            if text.kl:
                kls.append(float((base.exp() * (base - masked)).sum()))
    return sums, kls
