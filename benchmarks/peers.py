"""Other tools that score completions, from their own packages, each over the same ids.

It knows how each tool is called. It must not know dualtrace's engines or the wire. A tool that is not installed is
`Missing`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bare import load_bare, load_tokenizer
from benchmarks.sidecars import THREADS, model_folder
from benchmarks.table import Missing
from dualtrace.arrays import IntArray

Score = Callable[[IntArray, Sequence[IntArray]], list[float]]
"""Sums of logprobs of completions on one prompt."""

BATCH = 8


def find_tool(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise Missing(f"{package} is not installed; `make bench` installs it ({error})") from error


def open_lm_eval() -> Score:
    """lm-evaluation-harness, `HFLM`, by the ids that its own `loglikelihood` makes of texts."""
    huggingface = find_tool("lm_eval.models.huggingface", "lm-eval")
    harness = huggingface.HFLM(pretrained=load_bare(), tokenizer=load_tokenizer(), batch_size=BATCH)

    def score(prompt: IntArray, completions: Sequence[IntArray]) -> list[float]:
        requests = [(("", str(n)), prompt.tolist(), ids.tolist()) for n, ids in enumerate(completions)]
        return [total for total, _greedy in harness._loglikelihood_tokens(requests, disable_tqdm=True)]

    return score


def open_minicons() -> Score:
    """minicons, `IncrementalLMScorer`, by the batches that its own `prime_text` makes."""
    scorer_module = find_tool("minicons.scorer", "minicons")
    transformers = import_module("transformers")
    torch = import_module("torch")
    scorer = scorer_module.IncrementalLMScorer(load_bare(), "cpu", tokenizer=load_tokenizer())

    def score(prompt: IntArray, completions: Sequence[IntArray]) -> list[float]:
        sums: list[float] = []
        for begin in range(0, len(completions), BATCH):
            rows = [np.concatenate([prompt, ids]) for ids in completions[begin : begin + BATCH]]
            longest = max(row.size for row in rows)
            ids = np.full((len(rows), longest), scorer.pad_token_id, np.int64)
            seen = np.zeros((len(rows), longest), np.int64)
            for number, row in enumerate(rows):
                ids[number, : row.size], seen[number, : row.size] = row, 1
            encoded = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(seen)}
            batch = (transformers.BatchEncoding(encoded), [prompt.size - 1] * len(rows))
            sums += [float(np.sum(tokens, dtype=np.float64)) for tokens in scorer.compute_stats(batch)]
        return sums

    return score


@contextmanager
def open_ctranslate2() -> Iterator[Score]:
    """CTranslate2, `Generator.score_batch`, over the model converted to its own form, float32."""
    library = find_tool("ctranslate2", "ctranslate2")
    tokenizer = load_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "model"
        library.converters.TransformersConverter(str(model_folder())).convert(str(converted))
        generator = library.Generator(str(converted), "cpu", compute_type="float32", intra_threads=THREADS)

    def score(prompt: IntArray, completions: Sequence[IntArray]) -> list[float]:
        rows = [tokenizer.convert_ids_to_tokens(np.concatenate([prompt, ids]).tolist()) for ids in completions]
        results = generator.score_batch(rows, max_batch_size=BATCH)
        return [float(np.sum(result.log_probs[prompt.size - 1 :], dtype=np.float64)) for result in results]

    yield score
