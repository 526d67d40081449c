"""What the torch engine does with broken numbers, callers that leave, and the memory it keeps between steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dualtrace.masks.spec as s
from dualtrace.engine import NOTHING, Batch, Engine, EngineSettings, Read, Readout, Segment, int_array
from dualtrace.masks import receipt
from dualtrace.models.weight_file import write_weights
from dualtrace.problems import Exhausted, FailedPrecondition, Internal, Problem, Reason
from dualtrace.views import BASE, View, finetuned, scaled
from tests.support.adapters import tiny_adapter
from tests.support.engines import MODELS
from tests.support.masked import IDS, TOKENS, ask, plan_for
from tests.support.tiny import made_tensor, tiny_model
from tests.support.tolerances import FLOAT32_HIGHEST

pytestmark = pytest.mark.torch

ROWS = int_array(range(TOKENS))
BAD_TOKEN = 42  # stands in IDS at rows 4 and 16
PEFT_EPSILON = 1e-5  # issue "The PyTorch sidecar", point 5
CUT = s.MaskSpec(edges=(s.Edge(s.TokenRange(12, 24), s.TokenRange(2, 9), layers=(1,), heads=(2,)),))


@cache
def engine_of(model: str = "llama mha", step_tokens: int = 256, adapted: bool = False) -> Engine:
    import backend_torch

    folder = tiny_model(**dict(MODELS[model]))
    adapters = (("a", tiny_adapter(folder, targets="all-linear")),) if adapted else ()
    return backend_torch.load(EngineSettings(model=folder, adapters=adapters, step_tokens=step_tokens))


def changed_model(target: Path, tensor: str, change: Callable[[Any], None]) -> Engine:
    """A copy of the tiny Llama with one tensor changed."""
    import backend_torch
    from dualtrace.checkpoint import open_checkpoint

    source = open_checkpoint(tiny_model())
    values = {name: source.values(name, np.float32).copy() for name in source.tensors}
    change(values[tensor])
    target.mkdir()
    (target / "config.json").write_text((source.directory / "config.json").read_text())
    write_weights(target / "model.safetensors", [made_tensor(name, part) for name, part in values.items()])
    return backend_torch.load(EngineSettings(model=target))


def break_token(embedding: Any) -> None:
    embedding[BAD_TOKEN] = np.nan


def collect(engine: Engine, segments: list[Segment], reads: list[Read]) -> dict[int, list[Readout]]:
    found: dict[int, list[Readout]] = {}
    for step in engine.forward(Batch(tuple(segments)), tuple(reads), lambda _: True):
        for readout in step:
            found.setdefault(readout.segment, []).append(readout)
    return found


# ---- numbers that are not finite


def test_a_broken_token_breaks_only_the_rows_that_see_it(tmp_path: Path) -> None:
    engine = changed_model(tmp_path / "m", "model.embed_tokens.weight", break_token)
    ((readout,),) = engine.forward(Batch((Segment(IDS, ROWS),)), (Read(ROWS, IDS),), lambda _: True)
    assert readout.bad_rows == tuple(range(4, TOKENS))


def test_a_broken_text_does_not_reach_its_neighbours_in_a_pack(tmp_path: Path) -> None:
    engine = changed_model(tmp_path / "m", "model.embed_tokens.weight", break_token)
    sound = int_array([row for row in IDS if row != BAD_TOKEN][:20])
    segments = [Segment(IDS, ROWS), Segment(sound, ROWS[:20])]
    found = collect(engine, segments, [Read(ROWS, IDS), Read(ROWS[:20], sound)])
    assert found[1][0].bad_rows == ()
    assert found[1][0].logprobs is not None
    plain = collect(engine_of(), segments[1:], [Read(ROWS[:20], sound)])[0][0].logprobs
    assert plain is not None
    assert float(np.abs(found[1][0].logprobs - plain).max()) <= FLOAT32_HIGHEST.abs_epsilon


def test_a_cut_key_that_is_broken_is_not_seen(tmp_path: Path) -> None:
    engine = changed_model(tmp_path / "m", "model.embed_tokens.weight", break_token)
    whole_key = s.MaskSpec(
        edges=tuple(s.Edge(s.TokenRange(row + 1, 24), s.TokenRange(row, row + 1)) for row in (4, 16))
    )
    answer = ask(engine, plan_for(engine.card, whole_key))
    assert answer.bad_rows == (4, 16)


def test_weights_of_nan_make_every_row_bad(tmp_path: Path) -> None:
    engine = changed_model(tmp_path / "m", "model.layers.1.mlp.down_proj.weight", lambda values: values.fill(np.nan))
    assert ask(engine).bad_rows == tuple(range(TOKENS))


# ---- receipts are counted from what was applied


def test_a_mask_that_is_not_applied_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import backend_torch.sight as sight

    true_see = sight.see

    def forgetful(piece: Any, layer: int, window: int | None) -> Any:
        allowed, zeroed = true_see(piece, layer, window)
        if layer == 1:
            allowed = np.tril(np.ones_like(allowed))
        return allowed, zeroed

    monkeypatch.setattr(sight, "see", forgetful)
    plan = plan_for(engine_of().card, CUT)
    counts = ask(engine_of(), plan).counts
    assert counts is not None
    with pytest.raises(Internal) as caught:
        receipt.check(counts, plan)
    assert caught.value.reason is Reason.MASK_NOT_APPLIED


ZEROED = s.MaskSpec(edges=(replace(CUT.edges[0], mode=s.CutMode.POST_SOFTMAX_ZERO),))


@pytest.mark.parametrize(
    ("cut", "key"), [(ZEROED, 10), (CUT, 5)], ids=["a sibling's key", "a key of the past that is cut"]
)
def test_a_key_that_one_sibling_should_not_see_is_found(
    cut: s.MaskSpec, key: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import backend_torch.sight as sight

    true_make = sight.Sights._make

    def leaky(self: Any, placed: Any, *where: Any) -> Any:
        made = true_make(self, placed, *where)
        if len(placed) > 1:
            made.bias[..., -1, key] = 0.0  # siblings behind rows 0-9: zeroed weights keep their keys in one table
        return made

    monkeypatch.setattr(sight.Sights, "_make", leaky)
    plan, other = plan_for(engine_of().card, s.MaskSpec()), plan_for(engine_of().card, cut)
    prefix = Segment(IDS[:10], ROWS[:10], mask=plan)
    leaves = [Segment(IDS[10:], ROWS[10:], 0, mask=mask) for mask in (plan, other)]
    found = collect(engine_of(), [prefix, *leaves], [NOTHING, Read(ROWS[10:], IDS[10:]), Read(ROWS[10:], IDS[10:])])
    counts = [found[index][0].counts for index in (0, 2)]
    assert counts[0] is not None
    assert counts[1] is not None
    with pytest.raises(Internal):
        receipt.check(counts[0] + counts[1], other)


# ---- views


@pytest.mark.parametrize("model", ["llama gqa", "gpt2"])
@pytest.mark.parametrize(("view", "strength"), [(BASE, 0.0), (finetuned("a"), 1.0), (scaled("a", 1.25), 1.25)])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_a_view_is_what_peft_computes(model: str, view: View, strength: float) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tiny_model(**dict(MODELS[model]))
    base: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    adapted: Any = PeftModel.from_pretrained(base, tiny_adapter(folder, targets="all-linear"))
    for module in adapted.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: value * strength for name, value in module.scaling.items()}
    with torch.no_grad():
        logits = adapted(torch.tensor([IDS.tolist()])).logits[0].double()
    engine = engine_of(model, adapted=True)
    read = Read(ROWS, extra_ids=int_array(range(engine.card.vocab_size)))
    found = collect(engine, [Segment(IDS, ROWS, view=view)], [read])[0][0].extra_logprobs
    assert found is not None
    assert float(np.abs(found - logits.log_softmax(-1).numpy()).max()) <= PEFT_EPSILON


def test_a_plain_pass_leaves_no_hook_behind() -> None:
    engine: Any = engine_of(adapted=True)
    ask(engine, view=finetuned("a"))
    assert not any(module._forward_hooks for module in engine._model.linears.values())


# ---- steps, callers that leave, memory


def test_steps_tile_the_text_and_run_each_token_once() -> None:
    readouts = collect(engine_of(step_tokens=7), [Segment(IDS, ROWS)], [Read(ROWS, IDS)])[0]
    assert [(readout.start, readout.stop) for readout in readouts] == [(0, 7), (7, 14), (14, 21), (21, 24)]
    assert sum(readout.computed_tokens for readout in readouts) == TOKENS


def test_a_text_that_nobody_wants_any_more_is_not_finished() -> None:
    asked = itertools.count()
    steps = engine_of(step_tokens=7).forward(
        Batch((Segment(IDS, ROWS),)), (Read(ROWS, IDS),), lambda _: next(asked) < 2
    )
    assert len(list(steps)) == 2


def test_a_prefix_is_computed_while_one_child_is_wanted() -> None:
    segments = (Segment(IDS[:10], ROWS[:10]), Segment(IDS[10:], ROWS[10:], 0), Segment(IDS[10:20], ROWS[10:20], 0))
    reads = (NOTHING, Read(ROWS[10:], IDS[10:]), Read(ROWS[10:20], IDS[10:20]))
    steps = engine_of().forward(Batch(segments), reads, lambda index: index == 2)
    assert [readout.segment for step in steps for readout in step] == [0, 2]


def test_a_shared_prefix_is_counted_once() -> None:
    segments = [
        Segment(IDS[:16], ROWS[:16]),
        *[Segment(IDS[16:18], ROWS[16:18] + 0, 0), Segment(IDS[18:], ROWS[16:22], 0)],
    ]
    found = collect(engine_of(), segments, [NOTHING, Read(ROWS[15:18], IDS[:3]), Read(ROWS[15:22], IDS[:7])])
    assert sum(readout.computed_tokens for parts in found.values() for readout in parts) == TOKENS


def test_out_of_memory_is_told_and_the_engine_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import backend_torch.engine as engine_module

    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "build_stages", exhausted)
        with pytest.raises(Exhausted) as caught:
            ask(engine_of())
    assert caught.value.reason is Reason.OUT_OF_MEMORY
    assert ask(engine_of()).bad_rows == ()


def test_a_closed_engine_says_so() -> None:
    import backend_torch

    engine = backend_torch.load(EngineSettings(model=tiny_model()))
    engine.close()
    with pytest.raises(FailedPrecondition):
        ask(engine)


def test_a_text_longer_than_the_positions_is_refused() -> None:
    tokens = engine_of().card.max_positions + 1
    rows = int_array(range(tokens))
    with pytest.raises(Problem) as caught:
        collect(engine_of(), [Segment(np.zeros(tokens, np.int32), rows)], [Read(rows[-1:])])
    assert caught.value.reason is Reason.INPUT_TOO_LONG
