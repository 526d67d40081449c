"""An engine whose logits, delays and faults are chosen: for tests, load and the `mock` mode. No model stands behind it.

Its logits depend on the whole past of a token and on a seed, so that a scheduling fault (wrong row, wrong prefix)
shows in the numbers. It must never be taken for a model: its provenance says synthetic.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dualtrace.arrays import FloatArray, IntArray
from dualtrace.engine import Batch, EngineSettings, Live, Read, Readout, Reads, Shape, Step
from dualtrace.model_card import EngineCapabilities, ModelCard, ModelProvenance
from dualtrace.models.tokenizers import byte_level_tokenizer
from dualtrace.problems import InvalidArgument, Reason
from dualtrace.reference.readout import assemble, read_blocks, read_logits
from dualtrace.tokens import Tokenizer

STATES = 61  # pasts that are told apart; a prime, so that simple patterns in ids do not fall together


@dataclass(frozen=True)
class FakeSpec:
    """What `fake:SPEC` may say, as `name=value` joined by commas."""

    vocab: int = 0  # logit width; 0 = what the tokenizer needs
    positions: int = 1_048_576
    seed: int = 0
    step: int = 256  # tokens a step
    step_ms: float = 0.0  # a pause per step
    token_ms: float = 0.0  # a pause per computed token
    share: int = 1  # 1: prefixes are shared, 0: not
    nan_at: int = -1  # row whose logits are NaN, in every segment that has it
    fail_at: int = -1  # row at which the forward raises
    oom_tokens: int = 0  # a segment longer than this runs out of memory; 0 = never
    plant_at: int = -1  # row at which a difference is planted ...
    plant: float = 1.0  # ... of so many nats on the logit of id 0

    def __post_init__(self) -> None:
        for name, low in (("positions", 1), ("step", 1), ("vocab", 0), ("seed", 0), ("step_ms", 0), ("token_ms", 0)):
            value = getattr(self, name)
            if not value >= low:
                message = f"{name}={value} asked; at least {low}"
                raise InvalidArgument(Reason.OUT_OF_RANGE, message, field=f"fake:{name}", allowed=f">= {low}")


def parse_spec(text: str) -> FakeSpec:
    """`vocab=64,seed=1,step_ms=5` as a FakeSpec; an unknown name is refused."""
    known = {field.name: field.type for field in dataclasses.fields(FakeSpec)}
    values: dict[str, int | float] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if name not in known or not equals:
            allowed = ", ".join(known)
            message = f"{part!r} is not a setting of the fake engine; write name=value with one of: {allowed}"
            raise InvalidArgument(Reason.MALFORMED, message, field="target", allowed=allowed)
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or (known[name] == "int" and number != int(number)):
            message = f"{name}={value} asked; it must be a {'whole ' if known[name] == 'int' else ''}number"
            raise InvalidArgument(Reason.MALFORMED, message, field="target") from None
        values[name] = int(number) if known[name] == "int" else number
    return FakeSpec(**values)  # type: ignore[arg-type]


def fake_tokenizer() -> Tokenizer:
    """The byte-level tokenizer that the fake engine's texts are encoded with."""
    return Tokenizer.from_json(byte_level_tokenizer().to_str(), bos="<|bos|>", eos="<|eos|>")


class FakeEngine:
    """`Engine` without a model. `runs` counts what was asked of it, for tests."""

    def __init__(self, spec: FakeSpec | None = None) -> None:
        self.spec = spec or FakeSpec()
        width = self.spec.vocab or fake_tokenizer().size
        self._logits = np.random.default_rng(self.spec.seed).normal(0.0, 2.0, (STATES, width))  # [S, V] nats
        self.steps = 0
        self.computed_tokens = 0
        self._card = _card(self.spec, width)

    @property
    def card(self) -> ModelCard:
        return self._card

    def prepare(self, shape: Shape) -> None:
        """Nothing is compiled here."""

    def close(self) -> None:
        """Nothing is held."""

    def forward(self, batch: Batch, reads: Reads, live: Live) -> Iterator[Step]:
        for index, segment in enumerate(batch.segments):
            ids, _positions = batch.expand(index)
            own_start = int(ids.size - segment.ids.size)
            states = past_states(ids)
            is_prefix = not reads[index].rows.size
            # A segment's first step also reads the rows that its parent computed.
            edges = [*range(own_start, int(ids.size), self.spec.step), int(ids.size)]
            for number, (start, stop) in enumerate(itertools.pairwise(edges)):
                if not live(index):
                    break
                self._compute(start, stop, ids.size)
                first = 0 if number == 0 else start
                yield (self._read(index, first, stop, stop - start, reads[index], states),)
            if len(edges) == 1 and not is_prefix and live(index):  # no tokens of its own: all rows are the parent's
                yield (self._read(index, 0, own_start, 0, reads[index], states),)

    def _compute(self, start: int, stop: int, length: int) -> None:
        spec = self.spec
        if spec.oom_tokens and length > spec.oom_tokens:
            raise MemoryError
        if start <= spec.fail_at < stop:
            raise RuntimeError(f"planted failure at row {spec.fail_at}")
        self.steps += 1
        self.computed_tokens += stop - start
        pause = spec.step_ms / 1e3 + spec.token_ms / 1e3 * (stop - start)
        if pause:
            time.sleep(pause)

    def _read(self, segment: int, start: int, stop: int, computed: int, read: Read, states: IntArray) -> Readout:
        inside = (read.rows >= start) & (read.rows < stop)
        targets = None if read.targets is None else read.targets[inside]
        part = dataclasses.replace(read, rows=read.rows[inside], targets=targets)
        blocks = [read_logits(self._logits_at(block.rows, states), block) for block in read_blocks(part)]
        return assemble(segment, start, stop, part, blocks, computed_tokens=computed)

    def _logits_at(self, rows: IntArray, states: IntArray) -> FloatArray:
        logits = self._logits[states[rows]]  # a copy: [R, V]
        logits[rows == self.spec.nan_at] = np.nan
        logits[rows == self.spec.plant_at, 0] += self.spec.plant
        return logits


def load(settings: EngineSettings) -> FakeEngine:
    """The fake engine of `settings.options["spec"]`; the settings' own step is used where the spec names none."""
    if unknown := sorted(set(settings.options) - {"spec"}):
        message = f"option {unknown[0]!r} given; the fake engine has only spec"
        raise InvalidArgument(Reason.UNKNOWN_FIELD, message, field=unknown[0], allowed="spec")
    return FakeEngine(parse_spec(f"step={settings.step_tokens},{settings.options.get('spec', '')}"))


def past_states(ids: IntArray) -> IntArray:
    """A number below STATES for each row that depends on all ids up to and including it. [T] -> [T]"""
    states = np.empty(ids.size, np.int32)
    state = 0
    for row, token_id in enumerate(ids.tolist()):
        state = (state * 31 + token_id + 1) % STATES
        states[row] = state
    return states


def _card(spec: FakeSpec, width: int) -> ModelCard:
    # What changes the numbers is the identity; pauses and steps are not.
    numbers = (spec.seed, width, spec.plant_at, spec.plant)
    digest = "sha256:" + hashlib.sha256(repr(numbers).encode()).hexdigest()
    provenance = ModelProvenance(
        model_id=f"fake-{spec.seed}",
        revision="",
        family="fake",
        weights_digest=digest,
        tokenizer_digest="",
        framework="fake",
        framework_version="1",
        dtype="float64",
        matmul_precision="float64",
        device="cpu",
        attention_implementation="none",
        synthetic=True,
    )
    capabilities = EngineCapabilities(steps=True, shares_prefixes=bool(spec.share), deterministic=True)
    return ModelCard(
        provenance, capabilities, vocab_size=width, max_positions=spec.positions, layers=1, query_heads=1, kv_heads=1,
        hidden_size=1,
    )  # fmt: skip
