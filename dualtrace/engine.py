"""The lower waist: what an engine is asked and what it answers. Numpy in, numpy out, one calling thread.

An engine knows token ids. It must not know text, protobuf, asyncio, batching policy, metrics or status codes.

Coordinates are always *root-to-leaf*: row r of a segment is row r of the whole sequence that starts at the
segment's root ancestor, so how rows were shared or packed can never be seen from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from dualtrace.arrays import FloatArray, IntArray
from dualtrace.model_card import ModelCard
from dualtrace.views import BASE, View

if TYPE_CHECKING:
    from dualtrace.masks.plan import MaskPlan
    from dualtrace.masks.receipt import Counts

Live = Callable[[int], bool]
"""`live(i)`: does anyone still want segment i? Engines ask it between steps and may skip what nobody wants."""


@dataclass(frozen=True)
class Segment:
    """A run of tokens that sees its parent's tokens as its past. `ids` may be empty when there is a parent."""

    ids: IntArray  # [T] int32
    positions: IntArray  # [T] int32
    parent: int | None = None  # index of an earlier segment of the same batch; it has the same view
    view: View = BASE
    # None: the model's own attention (causal, native windows). A plan speaks of root-to-leaf rows; the segment takes
    # its own rows of it, and a plan whose `positions()` is set has already given `positions` above.
    mask: MaskPlan | None = None


@dataclass(frozen=True)
class Read:
    """What to read of one segment. Rows are root-to-leaf, so a child may read a row that its parent computed."""

    rows: IntArray  # [R] int32, ascending, may repeat none
    targets: IntArray | None = None  # [R] the id whose logprob, rank and ties are read at each row
    top_k: int = 0
    extra_ids: IntArray | None = None  # [E] ids whose logprobs are read at every row
    tail: bool = False  # the mass outside the top_k, and outside top_k and extra_ids
    against: int | None = None  # an earlier segment of the batch with the same ids: exact KL with it at every row read


NOTHING = Read(rows=np.empty(0, np.int32))

Reads = tuple[Read, ...]
"""One Read per segment of the batch, in order; `NOTHING` for a segment that is only somebody's prefix."""


@dataclass(frozen=True)
class Batch:
    """A small forest of segments; parents come before their children. Depth one is what planners build."""

    segments: tuple[Segment, ...]
    deterministic: bool = False  # fixed buckets and chunk grid, no sharing

    def lineage(self, index: int) -> tuple[int, ...]:
        """Segment indices from the root down to `index`."""
        chain = [index]
        while (parent := self.segments[chain[-1]].parent) is not None:
            chain.append(parent)
        return tuple(reversed(chain))

    def expand(self, index: int) -> tuple[IntArray, IntArray]:
        """The plain row that a segment stands for: ids and positions from root to leaf, [T] each."""
        chain = [self.segments[i] for i in self.lineage(index)]
        ids = np.concatenate([segment.ids for segment in chain])
        positions = np.concatenate([segment.positions for segment in chain])
        return ids.astype(np.int32, copy=False), positions.astype(np.int32, copy=False)


@dataclass(frozen=True)
class Readout:
    """Numbers of one segment for the rows of [start, stop) that were asked. A field that was not asked is None.

    Logprobs are nats. At a row listed in `bad_rows` every number is meaningless and must not be used.
    """

    segment: int
    start: int  # root-to-leaf, this readout covers rows [start, stop) ...
    stop: int
    rows: IntArray  # [R] ... and these of them were asked
    computed_tokens: int  # tokens the model really ran for this readout
    logprobs: FloatArray | None = None  # [R]
    ranks: IntArray | None = None  # [R] 1-based: 1 + count(logit > own)
    ties: IntArray | None = None  # [R] other ids with the very same logit
    top_ids: IntArray | None = None  # [R, k] by logprob descending, ties by lower id
    top_logprobs: FloatArray | None = None  # [R, k]
    extra_logprobs: FloatArray | None = None  # [R, E]
    tail_logprobs: FloatArray | None = None  # [R] log of the mass outside top_k; -inf when none is left
    rest_logprobs: FloatArray | None = None  # [R] the same outside top_k and extra_ids
    kl_from_against: FloatArray | None = None  # [R] KL(against || this) in nats, over the full vocabulary
    kl_to_against: FloatArray | None = None  # [R] KL(this || against)
    bad_rows: tuple[int, ...] = ()  # rows whose logits (or those of `against`) held NaN or infinity
    broken_at: str = ""  # where this segment's numbers first stopped being finite: "layer 3"; empty when not known
    # What the applied mask tensor allowed at the segment's own rows in [start, stop); None without a mask. A segment
    # that is only a prefix is reported too when it has a mask, for its children's receipts.
    counts: Counts | None = None
    delta_modules: tuple[str, ...] | None = None  # modules that got an adapter's delta; None for plain views
    padded_tokens: int = 0  # token places that ran empty; of a call for several segments, told by one readout
    bucket: str = ""  # padded shape of the call that ran it, "8x128"; empty when the engine does not pad


Step = tuple[Readout, ...]
"""What one step of a forward yields: a readout per segment that advanced."""


@dataclass(frozen=True)
class Shape:
    """A shape worth getting ready for before the first caller needs it."""

    rows: int
    tokens: int


@dataclass(frozen=True)
class EngineSettings:
    """What `load(settings)` of every backend is given. `options` holds what only one backend knows."""

    model: Path
    dtype: str = ""  # "" = the backend's default
    device: str = "cpu"
    threads: int = 1
    step_tokens: int = 256  # a long segment advances by so many tokens a step
    adapters: tuple[tuple[str, Path], ...] = ()  # (name, PEFT folder)
    model_id: str = ""  # "" = the folder's name
    revision: str = ""
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Preparation:
    """Something to get ready before a batch can run, as a rule a function to compile."""

    name: str  # for people
    run: Callable[[], None]  # thread-safe, may take long, changes no answer, does nothing the second time


@runtime_checkable
class Preparing(Protocol):
    """What an engine that compiles has besides `Engine`, so that nobody waits for what somebody else needs."""

    def list_missing(self, batch: Batch, reads: Reads) -> tuple[Preparation, ...]:
        """What `forward` of this batch would have to stop for. Quick, thread-safe, and empty most of the time. A
        forward of which nothing was missing stops for nothing, whoever leaves while it runs."""
        ...

    def list_usual(self) -> tuple[Preparation, ...]:
        """What usual batches need, for the time before the first caller; again without what is ready."""
        ...


class Engine(Protocol):
    """A model that can be run forward and read. Only one thread calls `forward`, but it may hold two at once."""

    @property
    def card(self) -> ModelCard: ...

    def prepare(self, shape: Shape) -> None:
        """Get ready for a shape (compile). Thread-safe, may take long, changes no answer."""
        ...

    def forward(self, batch: Batch, reads: Reads, live: Live) -> Iterator[Step]:
        """Run the batch, yielding after each step. Two forwards may be interleaved by the one calling thread."""
        ...

    def close(self) -> None: ...


def int_array(values: Sequence[int] | IntArray) -> IntArray:
    return np.asarray(values, dtype=np.int32)
