"""A run becomes a record: its hashes, its own figures, and the raw bytes of its call as artifacts.

It knows runs, tapes and the store. It must not know who asked, or how an answer is compared.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from coordinator.store import Store
from dualtrace.library import BenchmarkFigures, BenchmarkPlan, RunMode, RunRecord
from dualtrace.masks import json_form
from dualtrace.questions.answers import Applied
from dualtrace.questions.asked import TokenizeQuestion, Variant
from dualtrace.records import to_json
from dualtrace.runs.run import AskedQuestion, Run, ScoredItem, question_to_json
from dualtrace.tape import Tape


@dataclass(frozen=True)
class Recipe:
    """How a run was asked for, beside its question."""

    mode: RunMode = RunMode.SCORE
    token_debug: bool = False
    benchmark: BenchmarkPlan | None = None


SCORED = Recipe()


def make_record(
    run_id: str,
    run: Run,
    recipe: Recipe = SCORED,
    *,
    token_debug: Run | None = None,
    benchmark: BenchmarkFigures | None = None,
    raw: tuple[str, str] = ("", ""),
) -> RunRecord:
    """`raw`: the digests of request and responses."""
    mrr, rank1_share = measure_ranks(run if token_debug is None else token_debug)
    mask = find_mask(run)
    return RunRecord(
        run_id=run_id,
        mode=recipe.mode,
        target=run.target,
        run=run,
        token_debug=token_debug,
        benchmark=benchmark,
        config_hash=hash_config(recipe, run.provenance.digest()),
        input_hash=hash_input(run.question),
        mask_hash=mask,
        mask_shape=find_mask_shape(run) if mask else "",
        mrr=mrr,
        rank1_share=rank1_share,
        raw_request_ref=raw[0],
        raw_response_ref=raw[1],
        synthetic=run.provenance.synthetic or (benchmark is not None and benchmark.source != "real"),
    )


async def keep_tape(store: Store, tape: Tape | None) -> tuple[str, str]:
    """The digests under which request and responses are kept; "" for what was cut: half a proof is none."""
    if tape is None:
        return "", ""
    request = b"" if tape.request_cut else tape.request
    responses = b"" if tape.responses_cut else tape.responses
    kept = await asyncio.gather(*(_put(store, data) for data in (request, responses)))
    return kept[0], kept[1]


async def _put(store: Store, data: bytes) -> str:
    return await store.artifacts.put(data) if data else ""


def measure_ranks(run: Run) -> tuple[float | None, float | None]:
    """MRR and rank-1 share over every scored token of all items together."""
    items = (entry for entry in run.entries if isinstance(entry, ScoredItem))
    ranks = [rank for item in items for rank in item.token_ranks if rank is not None]
    if not ranks:
        return None, None
    return sum(1 / rank for rank in ranks) / len(ranks), ranks.count(1) / len(ranks)


def hash_config(recipe: Recipe, provenance_digest: str) -> str:
    options = {"token_debug": recipe.token_debug, "benchmark": to_json(recipe.benchmark)}
    return _hash({"mode": recipe.mode.value, "options": options, "provenance": provenance_digest})


def hash_input(question: AskedQuestion) -> str:
    """Of the question without its variants: equal for two masks or views of one input."""
    document = question_to_json(question)
    document.pop("variants", None)
    return _hash(document)


def find_mask(run: Run) -> str:
    """The digest of the mask as asked; "" without one. A run is made of one variant."""
    masks = [] if isinstance(run.question, TokenizeQuestion) else [one.mask for one in run.question.variants]
    return next((json_form.digest(mask) for mask in masks if mask is not None), "")


def find_mask_shape(run: Run) -> str:
    """As the engine applied it to the first item that was answered."""
    applied: Sequence[Applied | None] = [getattr(entry, "applied", None) for entry in run.entries]
    return next((one.metadata.shape for one in applied if one is not None), "")


def under(question: AskedQuestion, variant: Variant) -> AskedQuestion:
    """The question under one view and mask; Tokenize knows neither."""
    return question if isinstance(question, TokenizeQuestion) else replace(question, variants=(variant,))


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _hash(value: Any) -> str:
    return "sha256:" + hashlib.sha256(canonical(value).encode()).hexdigest()
