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

from coordinator.artifacts import ArtifactStore, Staged
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


class RawBytes:
    """The very bytes of a side's call: on the disk when the call has ended, named when its run is kept, else dropped.

    So a side that ends first is written away while the other one still answers.
    """

    def __init__(self, artifacts: ArtifactStore, tape: Tape) -> None:
        self.tape = tape
        self._artifacts = artifacts
        self._staging: asyncio.Task[tuple[Staged | None, Staged | None]] | None = None
        self._dropping: asyncio.Task[None] | None = None
        self._is_over = False

    def begin(self) -> None:
        """The tape is full. Harmless when said before, and without effect when it is closed."""
        if self._staging is None and not self._is_over:
            self._staging = asyncio.create_task(self._stage())

    async def keep(self) -> tuple[str, str]:
        """The digests under which request and responses are kept; "" for what was cut: half a proof is none."""
        self.begin()
        assert self._staging is not None
        staged = await asyncio.shield(self._staging)
        await self._artifacts.keep([one for one in staged if one is not None])
        self._is_over = True
        request, responses = (one.digest if one is not None else "" for one in staged)
        return request, responses

    async def close(self) -> None:
        """What was not kept goes. Harmless when done before."""
        if self._is_over:
            return
        self._is_over = True
        if self._staging is not None:  # a task of its own: whoever is cancelled while it runs leaves no file behind
            self._dropping = asyncio.create_task(self._drop(self._staging))
            await asyncio.shield(self._dropping)

    async def _drop(self, staging: asyncio.Task[tuple[Staged | None, Staged | None]]) -> None:
        await asyncio.wait({staging})
        if not staging.cancelled() and staging.exception() is None:
            await self._artifacts.drop([one for one in staging.result() if one is not None])

    async def _stage(self) -> tuple[Staged | None, Staged | None]:
        tape = self.tape
        request = b"" if tape.request_cut else tape.request
        responses = b"" if tape.responses_cut else tape.responses
        staging = [self._stage_one(data) for data in (request, responses)]
        staged = await asyncio.gather(*staging, return_exceptions=True)
        for failure in (one for one in staged if isinstance(one, BaseException)):
            await self._artifacts.drop([one for one in staged if isinstance(one, Staged)])
            raise failure
        return staged[0], staged[1]  # type: ignore[return-value]

    async def _stage_one(self, data: bytes) -> Staged | None:
        return await self._artifacts.stage(data) if data else None


async def keep_tape(store: Store, tape: Tape | None) -> tuple[str, str]:
    """The digests of a call that has ended."""
    return ("", "") if tape is None else await RawBytes(store.artifacts, tape).keep()


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
