"""The engine over the float64 decoders: each segment is run alone, as the plain row it stands for, and read.

It knows batches, reads and the two decoders. It must not know text, the wire, or any way to be fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from threadpoolctl import ThreadpoolController

from dualtrace.adapters import AdapterShelf
from dualtrace.arrays import FloatArray, IntArray
from dualtrace.checkpoint import Checkpoint, open_checkpoint, weights_digest
from dualtrace.engine import Batch, EngineSettings, Live, Read, Readout, Reads, Shape, Step
from dualtrace.masks.receipt import Counts
from dualtrace.model_card import EngineCapabilities, ModelCard, ModelProvenance
from dualtrace.models.cache import cache_directory
from dualtrace.problems import Exhausted, FailedPrecondition, InvalidArgument, Reason, Unsupported
from dualtrace.reference.attention import CausalMask, Mask
from dualtrace.reference.deltas import AdaptedProject
from dualtrace.reference.gpt2 import Gpt2Config, load_gpt2
from dualtrace.reference.llama import LlamaConfig, load_llama
from dualtrace.reference.masking import PlannedMask, check_plan
from dualtrace.reference.readout import assemble, check_read, read_blocks, read_logits
from dualtrace.reference.weights import Linear, Project, project


class Decoder(Protocol):
    """A family's model: hidden states of a plain row, and the logits of chosen rows of them."""

    @property
    def config(self) -> LlamaConfig | Gpt2Config: ...

    @property
    def linears(self) -> tuple[Linear, ...]: ...

    def hidden(self, ids: IntArray, positions: IntArray, mask: Mask, project: Project) -> FloatArray: ...

    def logits(self, hidden: FloatArray) -> FloatArray: ...


FAMILIES: dict[str, Callable[[Checkpoint], Decoder]] = {"llama": load_llama, "gpt2": load_gpt2}


@dataclass(frozen=True)
class Pass:
    """One segment, run as the plain row that it stands for."""

    hidden: FloatArray  # [T, hidden size]
    counts: Counts | None  # of the segment's own rows; None without a mask
    delta_modules: tuple[str, ...] | None  # None for plain views


class ReferenceEngine:
    """`Engine` in float64 numpy. One segment that is read, or whose mask is counted, gives one step."""

    def __init__(self, decoder: Decoder, card: ModelCard, threads: int, shelf: AdapterShelf) -> None:
        self._decoder: Decoder | None = decoder
        self._card = card
        self._threads = threads
        self._shelf = shelf
        self._pools = ThreadpoolController()

    @property
    def card(self) -> ModelCard:
        return self._card

    def prepare(self, shape: Shape) -> None:
        """Nothing is compiled here."""

    def forward(self, batch: Batch, reads: Reads, live: Live) -> Iterator[Step]:
        check_batch(batch, reads)
        kept: dict[int, FloatArray] = {}  # hidden states of segments that a later one is measured against
        for index, read in enumerate(reads):
            if (read.rows.size or batch.segments[index].mask is not None) and live(index):
                yield (self._answer(batch, index, read, kept),)
            waited_for = {later.against for later in reads[index + 1 :]}
            kept = {base: hidden for base, hidden in kept.items() if base in waited_for}

    def close(self) -> None:
        self._decoder = None

    def _answer(self, batch: Batch, index: int, read: Read, kept: dict[int, FloatArray]) -> Readout:
        decoder, tokens = self._open_decoder(), self._expand(batch, index)[0].size
        check_rows_read(read, tokens)
        check_read(read, self._card.vocab_size)
        try:
            # limits and error states are per call: held across a yield they would leak into the caller's own work
            with self._pools.limit(limits=self._threads, user_api="blas"), np.errstate(all="ignore"):
                base = read.against
                if base is not None and base not in kept:  # nobody read it, so it did not run yet
                    kept[base] = self._run(batch, base).hidden
                run = self._run(batch, index)
                blocks = [
                    read_logits(
                        decoder.logits(run.hidden[block.rows]),
                        block,
                        None if base is None else decoder.logits(kept[base][block.rows]),
                    )
                    for block in read_blocks(read)
                ]
        except MemoryError as error:
            raise Exhausted(
                Reason.OUT_OF_MEMORY, f"no memory for {tokens} tokens in the reference engine; send a shorter text."
            ) from error
        kept[index] = run.hidden
        readout = assemble(index, 0, tokens, read, blocks, computed_tokens=tokens)
        return replace(readout, counts=run.counts, delta_modules=run.delta_modules)

    def _run(self, batch: Batch, index: int) -> Pass:
        segment = batch.segments[index]
        ids, positions = self._expand(batch, index)
        mask: PlannedMask | CausalMask = CausalMask(ids.size)
        if segment.mask is not None:
            check_plan(segment.mask, self._card, positions)
            mask = PlannedMask(segment.mask, ids.size, own=ids.size - segment.ids.size)
        delta = self._shelf.delta(segment.view)
        adapted = None if delta is None else AdaptedProject(delta)
        hidden = self._open_decoder().hidden(ids, positions, mask, project if adapted is None else adapted)
        return Pass(
            hidden,
            mask.counts() if isinstance(mask, PlannedMask) else None,
            None if adapted is None else adapted.modules(),
        )

    def _expand(self, batch: Batch, index: int) -> tuple[IntArray, IntArray]:
        ids, positions = batch.expand(index)
        check_row(self._card, ids, positions)
        return ids, positions

    def _open_decoder(self) -> Decoder:
        if self._decoder is None:
            raise FailedPrecondition(Reason.NOT_READY, "the reference engine is closed; load it again.")
        return self._decoder


def load(settings: EngineSettings) -> ReferenceEngine:
    """Load a Llama-family or GPT-2-family checkpoint in float64 on the CPU."""
    _check_settings(settings)
    checkpoint = open_checkpoint(settings.model)
    family = checkpoint.config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise Unsupported(
            Reason.MODEL_UNSUPPORTED,
            f"{settings.model} is of the family {family!r}; the reference engine implements {', '.join(FAMILIES)}.",
            allowed=", ".join(FAMILIES),
        )
    decoder = FAMILIES[family](checkpoint)
    sizes = {linear.name: (linear.weight.shape[1], linear.weight.shape[0]) for linear in decoder.linears}
    shelf = AdapterShelf.open(settings.adapters, sizes)
    card = _card(settings, checkpoint, family, decoder, shelf)
    checkpoint.close()
    return ReferenceEngine(decoder, card, settings.threads, shelf)


def check_batch(batch: Batch, reads: Reads) -> None:
    """Refuse what contradicts itself before anything runs."""
    segments = batch.segments
    if len(reads) != len(segments):
        raise InvalidArgument(Reason.CONFLICT, f"{len(reads)} reads for {len(segments)} segments; one each is needed.")
    for index, (segment, read) in enumerate(zip(segments, reads, strict=True)):
        if segment.parent is not None and segments[segment.parent].view.key != segment.view.key:
            raise InvalidArgument(
                Reason.CONFLICT, f"segment {index} has another view than its parent; shared rows have one view."
            )
        if read.against is None:
            continue
        if not 0 <= read.against < index:
            raise InvalidArgument(
                Reason.OUT_OF_RANGE,
                f"segment {index} is measured against {read.against}; it must be an earlier one.",
                allowed=f"0-{index - 1}",
            )
        if not np.array_equal(batch.expand(index)[0], batch.expand(read.against)[0]):
            raise InvalidArgument(
                Reason.CONFLICT, f"segments {index} and {read.against} have different ids; KL needs the same text."
            )


def check_row(card: ModelCard, ids: IntArray, positions: IntArray) -> None:
    """Refuse a row that the model has no embedding or no position for."""
    if ids.size == 0 or ids.size != positions.size:
        raise InvalidArgument(Reason.EMPTY, f"a row of {ids.size} ids and {positions.size} positions; give one each.")
    if int(ids.min()) < 0 or int(ids.max()) >= card.vocab_size:
        wrong = int(ids[(ids < 0) | (ids >= card.vocab_size)][0])
        allowed = f"0-{card.vocab_size - 1}"
        raise InvalidArgument(
            Reason.TOKEN_OUT_OF_RANGE, f"token id {wrong} sent; the model has the ids {allowed}.", allowed=allowed
        )
    if int(positions.min()) < 0 or int(positions.max()) >= card.max_positions:
        wrong = int(positions[(positions < 0) | (positions >= card.max_positions)][0])
        raise InvalidArgument(
            Reason.INPUT_TOO_LONG,
            f"position {wrong} asked; the model has {card.max_positions} (0-{card.max_positions - 1}).",
            allowed=f"0-{card.max_positions - 1}",
        )


def check_rows_read(read: Read, tokens: int) -> None:
    rows = read.rows
    if rows.size == 0:
        return
    if int(rows.min()) < 0 or int(rows.max()) >= tokens or bool((np.diff(rows) <= 0).any()):
        raise InvalidArgument(
            Reason.OUT_OF_RANGE, f"rows must ascend and lie in 0-{tokens - 1}.", allowed=f"0-{tokens - 1}"
        )
    if read.targets is not None and read.targets.shape != rows.shape:
        raise InvalidArgument(Reason.CONFLICT, f"{read.targets.size} targets for {rows.size} rows; give one a row.")


def _check_settings(settings: EngineSettings) -> None:
    for what, asked, allowed in (("dtype", settings.dtype, ("", "float64")), ("device", settings.device, ("", "cpu"))):
        if asked not in allowed:
            raise Unsupported(
                Reason.MODEL_UNSUPPORTED,
                f"{what} {asked!r} asked; the reference engine knows only {allowed[1]}.",
                allowed=allowed[1],
            )
    if settings.threads < 1:
        raise InvalidArgument(
            Reason.OUT_OF_RANGE, f"{settings.threads} threads asked; at least 1.", allowed="1 or more"
        )
    if settings.options:
        raise Unsupported(
            Reason.MODEL_UNSUPPORTED, f"option {min(settings.options)!r} given; the reference engine has none."
        )


def _card(
    settings: EngineSettings, checkpoint: Checkpoint, family: str, decoder: Decoder, shelf: AdapterShelf
) -> ModelCard:
    config = decoder.config
    provenance = ModelProvenance(
        model_id=settings.model_id or settings.model.resolve().name,
        revision=settings.revision,
        family=family,
        weights_digest=weights_digest(checkpoint, cache_directory()),
        tokenizer_digest="",
        framework="reference",
        framework_version=f"numpy {np.__version__}",
        dtype="float64",
        matmul_precision="float64",
        device="cpu",
        attention_implementation="dense",
        adapter_digests=shelf.digests,
    )
    return ModelCard(
        provenance=provenance,
        capabilities=EngineCapabilities(deterministic=True, masks=True, views=True, contrasts=True),
        vocab_size=config.vocab_size,
        max_positions=config.max_positions,
        layers=config.layers,
        query_heads=config.query_heads,
        kv_heads=config.kv_heads,
        hidden_size=config.hidden_size,
    )
