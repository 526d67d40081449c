"""The reference engine equals transformers in float64, on every option it implements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualtrace.arrays import FloatArray
from dualtrace.engine import Batch, Read, Segment, int_array
from tests.support.tiny import tiny_model, tiny_reference
from tests.support.tolerances import FLOAT64

pytestmark = pytest.mark.torch

LLAMA3_ROPE = (
    ("rope_type", "llama3"),
    ("factor", 8.0),
    ("low_freq_factor", 1.0),
    ("high_freq_factor", 4.0),
    ("original_max_position_embeddings", 64),
)
MODELS: dict[str, dict[str, Any]] = {
    "llama mha": {},
    "llama mqa": {"attention": "mqa"},
    "llama gqa": {"attention": "gqa"},
    "llama tied": {"attention": "gqa", "tied": True},
    "llama biases": {"attention": "gqa", "bias": True},
    "llama wide heads": {"attention": "mqa", "head_dim": 12},
    "llama rope theta": {"rope_parameters": (("rope_theta", 500.0),)},
    "llama rope linear": {"rope_parameters": (("rope_type", "linear"), ("factor", 4.0))},
    "llama rope llama3": {"rope_parameters": LLAMA3_ROPE},
    "gpt2": {"family": "gpt2"},
    "gpt2 untied": {"family": "gpt2", "tied": False},
}
TOKENS = 160


def random_ids(vocab_size: int) -> list[int]:
    return [int(number) for number in np.random.default_rng(11).integers(0, vocab_size, TOKENS)]


def widen_float32_islands(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes norms, softmax and rotary angles in float32 even in a float64 model: here it may not."""
    import torch

    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def transformers_logprobs(directory: Path, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> FloatArray:
    """[T-1, V] log-softmax rows."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").double()
    model.requires_grad_(False).train(False)
    widen_float32_islands(monkeypatch)
    if hasattr(model.model if hasattr(model, "model") else model, "rotary_emb"):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its frequencies again, in float64
    with torch.no_grad():
        rows: FloatArray = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1).numpy()
    return rows


@pytest.mark.parametrize("name", MODELS)
def test_every_logprob_equals_that_of_transformers_in_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = MODELS[name]
    engine = tiny_reference(**fields)
    ids = random_ids(engine.card.vocab_size)
    rows = int_array(range(TOKENS - 1))
    everything = int_array(range(engine.card.vocab_size))
    batch = Batch((Segment(int_array(ids), int_array(range(TOKENS))),))
    ((readout,),) = engine.forward(batch, (Read(rows, extra_ids=everything),), lambda _: True)
    assert readout.extra_logprobs is not None
    expected = transformers_logprobs(tiny_model(**fields), ids, monkeypatch)
    assert float(np.abs(readout.extra_logprobs - expected).max()) <= FLOAT64.abs_epsilon


@pytest.mark.parametrize("tokenizer", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_transformers_reads_the_tiny_tokenizers_alike(family: str, tokenizer: str) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    directory = tiny_model(family=family, tokenizer=tokenizer)
    theirs: Any = AutoTokenizer.from_pretrained(directory)
    ours = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in ("the capital of France", "naïve 👍 日本語\n x", ""):
        assert theirs(text)["input_ids"] == ours.encode(text).ids
