"""The reference engine answers a batch as its segments stand for, and refuses what it cannot compute."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from dualtrace.arrays import FloatArray
from dualtrace.checkpoint import open_checkpoint
from dualtrace.engine import NOTHING, Batch, EngineSettings, Read, Readout, Segment, int_array
from dualtrace.models.weight_file import write_weights
from dualtrace.problems import Problem, Reason
from dualtrace.reference.attention import CausalMask
from dualtrace.reference.engine import ReferenceEngine, load
from tests.support.tiny import made_tensor, tiny_model, tiny_reference

IDS = [5, 300, 17, 17, 42, 260, 7, 99, 311, 20, 64, 5]
FAMILIES: list[dict[str, Any]] = [{"attention": "gqa"}, {"family": "gpt2"}]

Tensors = dict[str, FloatArray]


def segment(ids: list[int], start: int = 0, parent: int | None = None) -> Segment:
    return Segment(int_array(ids), int_array(range(start, start + len(ids))), parent)


def read_row(engine: ReferenceEngine, ids: list[int], start: int = 0) -> Readout:
    """Every row of a text read for the token after it, and for the last row the token 0."""
    read = Read(int_array(range(len(ids))), int_array([*ids[1:], 0]), top_k=2, tail=True)
    ((readout,),) = engine.forward(Batch((segment(ids, start),)), (read,), lambda _: True)
    return readout


def logprobs(engine: ReferenceEngine, ids: list[int], start: int = 0) -> list[float]:
    values = read_row(engine, ids, start).logprobs
    assert values is not None
    return [float(value) for value in values]


def rewritten(directory: Path, target: Path, change: Callable[[Tensors], None]) -> EngineSettings:
    """A copy of a tiny model whose tensors were changed."""
    opened = open_checkpoint(directory)
    tensors: Tensors = {name: opened.values(name, np.float64).copy() for name in opened.tensors}
    change(tensors)
    target.mkdir(exist_ok=True)
    (target / "config.json").write_bytes((directory / "config.json").read_bytes())
    write_weights(
        target / "model.safetensors",
        [made_tensor(name, values) for name, values in tensors.items()],
    )
    return EngineSettings(model=target)


@pytest.mark.parametrize("fields", FAMILIES)
def test_a_head_of_zeros_finds_every_token_equally_likely(fields: dict[str, Any], tmp_path: Path) -> None:
    def clear(tensors: Tensors) -> None:
        for name in tensors:
            if name in ("lm_head.weight", "transformer.wte.weight"):
                tensors[name][:] = 0.0

    engine = load(rewritten(tiny_model(**fields), tmp_path, clear))
    assert logprobs(engine, IDS) == pytest.approx([-math.log(engine.card.vocab_size)] * len(IDS), abs=1e-14)


def test_a_model_made_by_hand_gives_the_logprobs_worked_out_by_hand(tmp_path: Path) -> None:
    # one layer that attends evenly (q = k = 0), copies its values (v = o = 1) and feeds nothing forward
    identity, zero = np.eye(2), np.zeros((2, 2))
    layer = {"q_proj": zero, "k_proj": zero, "v_proj": identity, "o_proj": identity}
    tensors: Tensors = {
        "model.embed_tokens.weight": np.array([[3.0, 4.0], [4.0, -3.0]]),
        "lm_head.weight": np.array([[1.0, 0.0], [0.0, 1.0]]),
        "model.norm.weight": np.ones(2),
        "model.layers.0.input_layernorm.weight": np.ones(2),
        "model.layers.0.post_attention_layernorm.weight": np.ones(2),
        **{f"model.layers.0.self_attn.{name}.weight": values for name, values in layer.items()},
        **{f"model.layers.0.mlp.{name}.weight": zero for name in ("gate_proj", "up_proj", "down_proj")},
    }
    settings = write_by_hand(tmp_path, tensors)
    # both embeddings have the root mean square sqrt(12.5), so row 1 sees the mean of (3, 4) and (4, -3) over it,
    # added to its own (4, -3)
    rms = math.sqrt(12.5)
    state = np.array([4 + 3.5 / rms, -3 + 0.5 / rms])
    logits = state / math.sqrt((state**2).mean())
    expected = logits[0] - math.log(math.exp(logits[0]) + math.exp(logits[1]))
    assert logprobs(load(settings), [0, 1])[1] == pytest.approx(expected, abs=1e-9)  # rms_norm_eps is 1e-12


def write_by_hand(folder: Path, tensors: Tensors) -> EngineSettings:
    (folder / "config.json").write_text(
        '{"model_type": "llama", "vocab_size": 2, "hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1,'
        ' "num_attention_heads": 1, "max_position_embeddings": 8, "rms_norm_eps": 1e-12}'
    )
    parts = [made_tensor(name, values) for name, values in tensors.items()]
    write_weights(folder / "model.safetensors", parts)
    return EngineSettings(model=folder)


@pytest.mark.parametrize("fields", FAMILIES)
def test_a_later_token_changes_no_earlier_row(fields: dict[str, Any]) -> None:
    engine = tiny_reference(**fields)
    left, right = logprobs(engine, [*IDS, 1]), logprobs(engine, [*IDS, 2])
    assert left[: len(IDS) - 1] == right[: len(IDS) - 1]
    assert left[-1] != right[-1]


def test_rotary_positions_are_relative() -> None:
    engine = tiny_reference(attention="gqa")
    assert logprobs(engine, IDS, start=100) == pytest.approx(logprobs(engine, IDS), abs=1e-12)


def test_learned_positions_are_not() -> None:
    engine = tiny_reference(family="gpt2")
    assert logprobs(engine, IDS, start=100) != pytest.approx(logprobs(engine, IDS), abs=1e-3)


@pytest.mark.parametrize("fields", FAMILIES)
def test_a_tree_of_segments_answers_as_the_plain_rows_do(fields: dict[str, Any]) -> None:
    engine = tiny_reference(**fields)
    plain = read_row(engine, IDS)
    batch = Batch((segment(IDS[:4]), segment([9, 9], 4, parent=0), segment(IDS[4:], 4, parent=0)))
    read = Read(int_array(range(len(IDS))), int_array([*IDS[1:], 0]), top_k=2, tail=True)
    ((shared,),) = engine.forward(batch, (NOTHING, NOTHING, read), lambda _: True)
    assert (shared.segment, shared.start, shared.stop) == (2, 0, len(IDS))
    for name in ("logprobs", "ranks", "top_ids", "top_logprobs", "tail_logprobs"):
        assert np.array_equal(getattr(shared, name), getattr(plain, name)), name


def test_only_rows_that_are_read_are_answered() -> None:
    engine = tiny_reference(attention="gqa")
    read = Read(int_array([2, 7]), int_array([IDS[3], IDS[8]]))
    ((readout,),) = engine.forward(Batch((segment(IDS),)), (read,), lambda _: True)
    assert readout.logprobs is not None
    assert readout.logprobs == pytest.approx(np.array(logprobs(engine, IDS))[[2, 7]], abs=1e-13)


def test_each_segment_that_is_read_is_a_step_of_its_own() -> None:
    engine = tiny_reference()
    read = Read(int_array([0]), int_array([1]))
    batch = Batch((segment([1, 2]), segment([3, 4]), segment([5])))
    steps = list(engine.forward(batch, (read, NOTHING, read), lambda _: True))
    assert [[readout.segment for readout in step] for step in steps] == [[0], [2]]


def test_a_segment_that_nobody_wants_any_more_is_skipped() -> None:
    engine = tiny_reference()
    read = Read(int_array([0]), int_array([1]))
    batch = Batch((segment([1, 2]), segment([3, 4])))
    steps = list(engine.forward(batch, (read, read), lambda index: index != 0))
    assert [step[0].segment for step in steps] == [1]


def test_two_forwards_may_be_interleaved() -> None:
    engine = tiny_reference()
    read = Read(int_array([1]), int_array([1]))
    batch = Batch((segment([1, 2]), segment([3, 4])))
    first, second = (engine.forward(batch, (read, read), lambda _: True) for _ in range(2))
    woven = [next(first), next(second), next(second), next(first)]
    assert woven[0][0].logprobs == woven[1][0].logprobs
    assert woven[2][0].logprobs == woven[3][0].logprobs


def test_a_broken_embedding_spoils_the_rows_from_its_token_on_and_no_other(tmp_path: Path) -> None:
    def poison(tensors: Tensors) -> None:
        tensors["model.embed_tokens.weight"][IDS[4]] = np.nan

    engine = load(rewritten(tiny_model(attention="gqa"), tmp_path, poison))
    readout = read_row(engine, IDS)
    assert readout.bad_rows == tuple(range(4, len(IDS)))
    assert readout.logprobs is not None
    assert np.isnan(readout.logprobs[4:]).all()
    assert readout.logprobs[:4] == pytest.approx(logprobs(tiny_reference(attention="gqa"), IDS)[:4], abs=1e-13)


def test_a_forward_runs_on_the_threads_that_were_set_and_gives_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(EngineSettings(model=tiny_model(), threads=1))
    seen: list[int] = []

    def count_threads() -> None:
        seen.append(max(pool["num_threads"] for pool in threadpool_info()))

    def watch(tokens: int) -> CausalMask:
        count_threads()
        return CausalMask(tokens)

    monkeypatch.setattr("dualtrace.reference.engine.CausalMask", watch)
    read = Read(int_array([0]), int_array([1]))
    with threadpool_limits(limits=2, user_api="blas"):
        for _ in engine.forward(Batch((segment([1, 2]),)), (read,), lambda _: True):
            count_threads()  # at the yield: what the caller has between two steps
    assert seen == [1, 2]


def test_the_card_says_what_the_model_is() -> None:
    card = tiny_reference(attention="gqa").card
    assert (card.layers, card.query_heads, card.kv_heads, card.hidden_size, card.max_positions) == (3, 4, 2, 32, 512)
    assert card.provenance.dtype == "float64"
    assert card.capabilities.deterministic
    assert not card.capabilities.steps


@pytest.mark.parametrize(
    ("ids", "start", "reason"),
    [
        ([1, 100_000], 0, Reason.TOKEN_OUT_OF_RANGE),
        ([1, -1], 0, Reason.TOKEN_OUT_OF_RANGE),
        ([1, 2], 511, Reason.INPUT_TOO_LONG),
        ([1, 2], -1, Reason.INPUT_TOO_LONG),
        ([], 0, Reason.EMPTY),
    ],
)
@pytest.mark.parametrize("fields", FAMILIES)
def test_ids_and_positions_that_the_model_lacks_are_refused(
    fields: dict[str, Any], ids: list[int], start: int, reason: Reason
) -> None:
    read = Read(int_array([0]), int_array([1]))
    with pytest.raises(Problem) as caught:
        list(tiny_reference(**fields).forward(Batch((segment(ids, start),)), (read,), lambda _: True))
    assert caught.value.reason is reason


@pytest.mark.parametrize("rows", [[2], [-1], [1, 0], [0, 0]])
def test_rows_outside_the_segment_or_out_of_order_are_refused(rows: list[int]) -> None:
    with pytest.raises(Problem) as caught:
        list(tiny_reference().forward(Batch((segment([1, 2]),)), (Read(int_array(rows)),), lambda _: True))
    assert caught.value.reason is Reason.OUT_OF_RANGE


def test_a_closed_engine_says_so() -> None:
    engine = load(EngineSettings(model=tiny_model()))
    engine.close()
    with pytest.raises(Problem) as caught:
        read_row(engine, [1, 2])
    assert caught.value.reason is Reason.NOT_READY


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"dtype": "float32"}, Reason.MODEL_UNSUPPORTED),
        ({"device": "cuda"}, Reason.MODEL_UNSUPPORTED),
        ({"options": {"x": "y"}}, Reason.MODEL_UNSUPPORTED),
        ({"threads": 0}, Reason.OUT_OF_RANGE),
    ],
)
def test_settings_that_cannot_be_obeyed_are_refused(settings: dict[str, Any], reason: Reason) -> None:
    with pytest.raises(Problem) as caught:
        load(EngineSettings(model=tiny_model(), **settings))
    assert caught.value.reason is reason
