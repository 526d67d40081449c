"""The engine over transformers models: strands advance pass by pass, each pass one call of the model's body.

It knows batches, passes and the model. It must not know text, the wire, or batching policy. All that a forward keeps
lives in its generator, so two forwards may be interleaved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from backend_torch.attention import ATTENTION, Work
from backend_torch.blame import HEAD, NORM, watch_layers
from backend_torch.forks import build_stages, fork_hooks
from backend_torch.lora import Wardrobe, wear
from backend_torch.readout import Ask, Head, chunk_rows, read_all
from backend_torch.requests import check_request
from backend_torch.sight import Sights
from backend_torch.strands import Piece, Strand, drop_unwanted, keeps_keys, make_strands, next_pieces, release
from backend_torch.weights import Model, linear_sizes, load_model
from dualtrace.adapters import AdapterShelf, Delta
from dualtrace.checkpoint import open_checkpoint, weights_digest
from dualtrace.engine import NOTHING, Batch, EngineSettings, Live, Readout, Reads, Shape, Step
from dualtrace.model_card import EngineCapabilities, ModelCard, ModelProvenance
from dualtrace.models.cache import cache_directory
from dualtrace.models.hub_cache import find_model
from dualtrace.problems import Exhausted, FailedPrecondition, InvalidArgument, Reason, Unsupported


class TorchEngine:
    """`Engine` over PyTorch."""

    def __init__(self, model: Model, card: ModelCard, shelf: AdapterShelf, *, threads: int, step_tokens: int) -> None:
        self._model: Model | None = model
        self._card = card
        self._shelf = shelf
        self._wardrobe = Wardrobe(model.dtype, model.device)
        self._threads = threads
        self._step_tokens = step_tokens

    @property
    def card(self) -> ModelCard:
        return self._card

    def prepare(self, shape: Shape) -> None:
        """Nothing is compiled here."""

    def forward(self, batch: Batch, reads: Reads, live: Live) -> Iterator[Step]:
        check_request(self._card, batch, reads)
        deltas = self._find_deltas(batch)
        strands = make_strands(batch, reads)
        while True:
            drop_unwanted(strands, live)
            pieces = next_pieces(strands, self._step_tokens, alone=batch.deterministic)
            if not pieces:
                return
            step = self._run(pieces, deltas)
            release(strands)
            yield step

    def close(self) -> None:
        self._model = None

    def _find_deltas(self, batch: Batch) -> dict[int, Delta]:
        found = {index: self._shelf.delta(segment.view) for index, segment in enumerate(batch.segments)}
        return {index: delta for index, delta in found.items() if delta is not None}

    def _run(self, pieces: Sequence[Piece], deltas: dict[int, Delta]) -> Step:
        if self._model is None:
            raise FailedPrecondition(Reason.NOT_READY, "the torch engine is closed; load it again.")
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                return self._pass(self._model, pieces, deltas)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            rows = sum(piece.rows for piece in pieces)
            raise Exhausted(
                Reason.OUT_OF_MEMORY, f"no memory for {rows} tokens in one pass; send a shorter text or fewer at once."
            ) from error

    def _pass(self, model: Model, pieces: Sequence[Piece], deltas: dict[int, Delta]) -> Step:
        """One call of the body. Numbers that are not finite must not spread to neighbours: then once more, apart."""
        pass_deltas = {p.strand.index: deltas[p.strand.index] for p in pieces if p.strand.index in deltas}
        broken: dict[int, str] = {}
        work, hidden, modules = self._compute(model, pieces, pass_deltas, None)
        if not bool(torch.isfinite(hidden).all()):
            work, hidden, modules = self._compute(model, pieces, pass_deltas, broken)
        rows = {m.strand.index: one.rows for one in work.stages[-1].placed for m in one.members}
        asks = _read(model, pieces, hidden, rows)
        charged = {one.piece.strand.index for one in work.stages[-1].placed}
        step: list[Readout] = []
        for piece, ask in zip(pieces, asks, strict=True):
            strand = piece.strand
            hit = tuple(sorted(modules[strand.index])) if strand.index in modules else None
            readout = _readout(piece, ask, work, hit, piece.rows if strand.index in charged else 0)
            if ask.bad_rows:
                sound = bool(torch.isfinite(hidden[rows[strand.index]]).all())
                readout = replace(readout, broken_at=broken.get(strand.index, HEAD if sound else NORM))
            step.append(readout)
            strand.done, strand.reported = piece.stop, True
        return tuple(step)

    def _compute(
        self, model: Model, pieces: Sequence[Piece], deltas: dict[int, Delta], broken: dict[int, str] | None
    ) -> tuple[Work, Tensor, dict[int, set[str]]]:
        """The final hidden states [N,D] of a pass, after the body's last norm.

        With `broken` the pieces are kept apart, and it is told where the numbers of each stop being finite.
        """
        sights = Sights(model.windows, model.query_heads, model.dtype, model.device)
        stages = build_stages(pieces, len(model.windows), sights.signature)
        work = Work(
            stages,
            sights,
            layers=len(model.windows),
            heads=model.query_heads,
            softcap=model.attention_softcap,
            isolate=broken is not None,
        )
        work.keeping = frozenset(piece.strand.index for piece in pieces if keeps_keys(piece, pieces))
        placed = stages[-1].placed
        if not stages[-1].size:
            return work, torch.empty((0, model.hidden_size), dtype=model.dtype, device=model.device), {}
        ids, positions = (
            torch.from_numpy(np.concatenate(parts).astype(np.int64))[None].to(model.device)
            for parts in ([one.piece.ids for one in placed], [one.piece.positions for one in placed])
        )
        with ExitStack() as stack:
            modules = stack.enter_context(wear(model.linears, work, deltas, self._wardrobe)) if deltas else {}
            if len(stages) > 1:
                stack.enter_context(fork_hooks(model.blocks, stages, model.device))
            if broken is not None:
                stack.enter_context(watch_layers(model.blocks, work, broken))
            result: Any = model.body(ids, position_ids=positions, use_cache=False, dualtrace_work=work)
        hidden: Tensor = result.last_hidden_state[0]
        return work, hidden, modules


def load(settings: EngineSettings) -> TorchEngine:
    """Load a safetensors checkpoint of a known family."""
    _check_settings(settings)
    torch.set_num_threads(settings.threads)
    _force_precision()
    found = find_model(settings.model, settings.revision)
    checkpoint = open_checkpoint(found.directory)
    model = load_model(checkpoint, settings.dtype or "float32", settings.device)
    shelf = AdapterShelf.open(settings.adapters, linear_sizes(model))
    digest = weights_digest(checkpoint, cache_directory())
    checkpoint.close()
    card = _card(model, settings.model_id or found.model_id, found.revision, digest, shelf)
    return TorchEngine(model, card, shelf, threads=settings.threads, step_tokens=settings.step_tokens)


def _force_precision() -> None:
    """float32 products are float32 products: no TF32, no bf16 in their place."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _check_settings(settings: EngineSettings) -> None:
    for what, number in (("threads", settings.threads), ("step_tokens", settings.step_tokens)):
        if number < 1:
            raise InvalidArgument(Reason.OUT_OF_RANGE, f"{what} {number} asked; at least 1.", allowed="1 or more")
    if settings.options:
        raise Unsupported(
            Reason.MODEL_UNSUPPORTED, f"option {min(settings.options)!r} given; the torch engine has none."
        )


def _card(model: Model, model_id: str, revision: str, digest: str, shelf: AdapterShelf) -> ModelCard:
    device = str(model.device)
    if model.device.type == "cuda":
        device = f"{device} {torch.cuda.get_device_name(model.device)}"
    provenance = ModelProvenance(
        model_id=model_id,
        revision=revision,
        family=model.family.name,
        weights_digest=digest,
        tokenizer_digest="",
        framework="torch",
        framework_version=f"torch {torch.__version__}, transformers {transformers.__version__}",
        dtype=str(model.dtype).removeprefix("torch."),
        matmul_precision="highest",
        device=device,
        attention_implementation=ATTENTION,
        adapter_digests=shelf.digests,
    )
    return ModelCard(
        provenance=provenance,
        capabilities=EngineCapabilities(
            steps=True, shares_prefixes=True, deterministic=True, masks=True, views=True, contrasts=True
        ),
        vocab_size=model.vocab_size,
        max_positions=model.max_positions,
        layers=len(model.windows),
        query_heads=model.query_heads,
        kv_heads=model.kv_heads,
        hidden_size=model.hidden_size,
        windows=model.windows if any(window is not None for window in model.windows) else (),
    )


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error)
    return any(words in said for words in ("can't allocate memory", "not enough memory", "out of memory"))


def _read(model: Model, pieces: Sequence[Piece], hidden: Tensor, rows: dict[int, slice]) -> list[Ask]:
    """Keep the hidden states that others will read, then read what these pieces were asked."""
    shelf = _HiddenShelf(hidden)
    for piece in pieces:
        _keep_hidden(piece, hidden, rows[piece.strand.index])
    asks = []
    for piece in pieces:
        strand, read = piece.strand, piece.strand.read
        first = piece.start if strand.reported else 0
        chosen = np.flatnonzero((read.rows >= first) & (read.rows < piece.stop))
        part = slice(int(chosen[0]), int(chosen[-1]) + 1) if chosen.size else slice(0, 0)
        own = _part_of(read, part)
        places = shelf.place(strand, own.rows, rows[strand.index].start - piece.start, piece.start)
        against = None if strand.against is None else shelf.place(strand.against, own.rows, None, 0)
        asks.append(Ask(own, places, against))
    if any(ask.places.size for ask in asks):
        read_all(_head(model), shelf.source(), asks, chunk_rows(model.vocab_size))
    return asks


def _part_of(read: Any, part: slice) -> Any:
    if part.stop == 0:
        return replace(NOTHING, against=read.against)
    return replace(read, rows=read.rows[part], targets=None if read.targets is None else read.targets[part])


def _keep_hidden(piece: Piece, hidden: Tensor, rows: slice) -> None:
    strand = piece.strand
    here = np.flatnonzero((strand.later_rows >= piece.start) & (strand.later_rows < piece.stop))
    if not here.size:
        return
    if strand.later_hidden is None:
        strand.later_hidden = hidden.new_empty((strand.later_rows.size, hidden.shape[1]))
    source = torch.from_numpy(strand.later_rows[here].astype(np.int64) - piece.start + rows.start)
    strand.later_hidden[int(here[0]) : int(here[-1]) + 1] = hidden[source.to(hidden.device)]


class _HiddenShelf:
    """Hidden states of this pass, and those kept of earlier rows, as one source to gather from."""

    def __init__(self, hidden: Tensor) -> None:
        self._parts = [hidden]
        self._size = int(hidden.shape[0])
        self._begins: dict[int, int] = {}  # strand -> where its kept rows begin in the source

    def place(self, strand: Strand, rows: Any, shift: int | None, first: int) -> Any:
        """[R] where the rows of a strand's text lie; rows from `first` on are of this pass, `shift` away."""
        places = np.empty(rows.size, np.int64)
        for i, row in enumerate(rows.tolist()):
            if shift is not None and row >= first:
                places[i] = row + shift
                continue
            owner = strand.owner(row)
            places[i] = self._begin(owner) + int(np.searchsorted(owner.later_rows, row))
        return places

    def source(self) -> Tensor:
        return self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)

    def _begin(self, strand: Strand) -> int:
        if strand.index not in self._begins:
            assert strand.later_hidden is not None
            self._begins[strand.index] = self._size
            self._parts.append(strand.later_hidden)
            self._size += int(strand.later_hidden.shape[0])
        return self._begins[strand.index]


def _head(model: Model) -> Head:
    weight: Tensor = model.head.weight  # type: ignore[assignment]
    bias: Tensor | None = model.head.bias  # type: ignore[assignment]

    def logits(hidden: Tensor, out: Tensor | None) -> Tensor:
        if out is not None and out.dtype == weight.dtype:
            values = torch.mm(hidden, weight.T, out=out)
            values = values if bias is None else values.add_(bias)
        else:
            values = model.head(hidden)
            values = values.to(torch.promote_types(values.dtype, torch.float32))
        if model.logit_softcap is not None:
            values = values.div_(model.logit_softcap).tanh_().mul_(model.logit_softcap)
        return values

    return logits


def _readout(
    piece: Piece, ask: Ask, work: Work, delta_modules: tuple[str, ...] | None, computed_tokens: int
) -> Readout:
    names = (
        "logprobs", "ranks", "ties", "top_ids", "top_logprobs", "extra_logprobs", "tail_logprobs", "rest_logprobs",
        "kl_from_against", "kl_to_against",
    )  # fmt: skip
    return Readout(
        segment=piece.strand.index,
        start=piece.start if piece.strand.reported else 0,
        stop=piece.stop,
        rows=ask.read.rows,
        computed_tokens=computed_tokens,
        bad_rows=tuple(sorted(ask.bad_rows)),
        counts=work.counts(piece),
        delta_modules=delta_modules,
        **{name: ask.column(name) for name in names},
    )
