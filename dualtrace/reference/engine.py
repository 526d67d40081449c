"""The engine over the float64 decoders: each segment is run alone, as the plain row it stands for, and read.

It knows batches, reads and the two decoders. It must not know text, the wire, or any way to be fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from threadpoolctl import ThreadpoolController

from ..checkpoint import Checkpoint, open_checkpoint, weights_digest
from ..engine import (
    Batch,
    EngineCapabilities,
    EngineSettings,
    FloatArray,
    IntArray,
    Live,
    ModelCard,
    ModelProvenance,
    Read,
    Readout,
    Reads,
    Shape,
    Step,
)
from ..models.cache import cache_directory
from ..problems import Exhausted, FailedPrecondition, InvalidArgument, Reason, Unsupported
from .attention import MaskProvider, causal_mask
from .gpt2 import Gpt2Config, load_gpt2
from .llama import LlamaConfig, load_llama
from .readout import assemble, check_read, read_blocks, read_logits
from .weights import Project, project


class Decoder(Protocol):
    """A family's model: hidden states of a plain row, and the logits of chosen rows of them."""

    @property
    def config(self) -> LlamaConfig | Gpt2Config: ...

    def hidden(self, ids: IntArray, positions: IntArray, mask: MaskProvider, project: Project) -> FloatArray: ...

    def logits(self, hidden: FloatArray) -> FloatArray: ...


FAMILIES: dict[str, Callable[[Checkpoint], Decoder]] = {"llama": load_llama, "gpt2": load_gpt2}


class ReferenceEngine:
    """`Engine` in float64 numpy. One segment that is read gives one step."""

    def __init__(self, decoder: Decoder, card: ModelCard, threads: int) -> None:
        self._decoder: Decoder | None = decoder
        self._card = card
        self._threads = threads
        self._pools = ThreadpoolController()

    @property
    def card(self) -> ModelCard:
        return self._card

    def prepare(self, shape: Shape) -> None:
        """Nothing is compiled here."""

    def forward(self, batch: Batch, reads: Reads, live: Live) -> Iterator[Step]:
        if len(reads) != len(batch.segments):
            raise InvalidArgument(
                Reason.CONFLICT, f"{len(reads)} reads for {len(batch.segments)} segments; one for each is needed."
            )
        for index, read in enumerate(reads):
            if read.rows.size and live(index):
                yield (self._answer(batch, index, read),)

    def close(self) -> None:
        self._decoder = None

    def _answer(self, batch: Batch, index: int, read: Read) -> Readout:
        if self._decoder is None:
            raise FailedPrecondition(Reason.NOT_READY, "the reference engine is closed; load it again.")
        ids, positions = batch.expand(index)
        check_row(self._card, ids, positions)
        check_rows_read(read, ids.size)
        check_read(read, self._card.vocab_size)
        try:
            # limits and error states are per call: held across a yield they would leak into the caller's own work
            with self._pools.limit(limits=self._threads, user_api="blas"), np.errstate(all="ignore"):
                hidden = self._decoder.hidden(ids, positions, causal_mask(ids.size), project)
                blocks = [read_logits(self._decoder.logits(hidden[block.rows]), block) for block in read_blocks(read)]
        except MemoryError as error:
            raise Exhausted(
                Reason.OUT_OF_MEMORY, f"no memory for {ids.size} tokens in the reference engine; send a shorter text."
            ) from error
        return assemble(index, 0, ids.size, read, blocks, computed_tokens=ids.size)


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
    card = _card(settings, checkpoint, family, decoder)
    checkpoint.close()
    return ReferenceEngine(decoder, card, settings.threads)


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


def _card(settings: EngineSettings, checkpoint: Checkpoint, family: str, decoder: Decoder) -> ModelCard:
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
    )
    return ModelCard(
        provenance=provenance,
        capabilities=EngineCapabilities(deterministic=True),
        vocab_size=config.vocab_size,
        max_positions=config.max_positions,
        layers=config.layers,
        query_heads=config.query_heads,
        kv_heads=config.kv_heads,
        hidden_size=config.hidden_size,
    )
