"""The torch engine behind the whole service: faults are told with their reason, the others are answered, the server
lives on; and what an answer cost is told."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualtrace.checkpoint import open_checkpoint
from dualtrace.engine import EngineSettings
from dualtrace.engine_scorer import EngineScorer
from dualtrace.metrics import Metrics
from dualtrace.models.weight_file import write_weights
from dualtrace.problems import Exhausted, Problem, Reason
from dualtrace.questions.answers import AnswerSummary, ItemDone, ItemProblem
from dualtrace.questions.asked import PreflightQuestion, RollingQuestion
from dualtrace.scorer import ask_one
from dualtrace.tokens import Tokenizer
from dualtrace.views import finetuned
from tests.support.adapters import changed_adapter, tiny_adapter
from tests.support.answering import ids
from tests.support.processes import Processes
from tests.support.scorers import all_events, connected, only
from tests.support.tiny import made_tensor, tiny_model

pytestmark = pytest.mark.torch

HUGE, SMALL = ids(*[5] * 90), ids(1, 2, 3, 4)


def scorer_over(folder: Path, **settings: Any) -> EngineScorer:
    import backend_torch

    engine = backend_torch.load(EngineSettings(model=folder, **settings))
    return EngineScorer(engine, Tokenizer.from_directory(tiny_model()))


def changed(target: Path, tensor: str, change: Callable[[Any], None]) -> Path:
    """A copy of the tiny Llama with one tensor changed."""
    source = open_checkpoint(tiny_model())
    values = {name: source.values(name, np.float32).copy() for name in source.tensors}
    change(values[tensor])
    shutil.copytree(source.directory, target)
    write_weights(target / "model.safetensors", [made_tensor(name, part) for name, part in values.items()])
    return target


NO_MEMORY: dict[str, Callable[[], BaseException]] = {
    "on a device": lambda: import_module("torch").OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB."),
    "on the processor": lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    "as Linux says it": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9."),
    "in numpy": lambda: MemoryError("Unable to allocate 9.00 GiB for an array"),
}


@pytest.mark.parametrize("kind", NO_MEMORY)
async def test_a_text_that_does_not_fit_memory_fails_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine_module: Any = import_module("backend_torch.engine")
    true_stages = engine_module.build_stages

    def exhausted(pieces: Any, *rest: Any) -> Any:
        if sum(piece.rows for piece in pieces) > 60:
            raise NO_MEMORY[kind]()
        return true_stages(pieces, *rest)

    monkeypatch.setattr(engine_module, "build_stages", exhausted)
    async with connected(scorer_over(tiny_model())) as client:
        events = await all_events(client, RollingQuestion((HUGE, SMALL)))
        (problem,) = (event.problem for event in only(events, ItemProblem))
        assert isinstance(problem, Exhausted)
        assert (problem.reason, problem.detail.item) == (Reason.OUT_OF_MEMORY, 0)
        assert "shorter text" in problem.detail.message
        assert [done.item for done in only(events, ItemDone)] == [1]
        assert only(await all_events(client, RollingQuestion((SMALL,))), ItemDone)


async def test_a_caller_that_leaves_stops_the_forward_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    import backend_torch.engine as engine_module

    true_run = engine_module.TorchEngine._run
    running, may_go_on, steps = threading.Event(), threading.Event(), 0

    def slow_run(self: Any, pieces: Any, deltas: Any) -> Any:
        nonlocal steps
        steps += 1
        running.set()
        assert may_go_on.wait(20)
        return true_run(self, pieces, deltas)

    monkeypatch.setattr(engine_module.TorchEngine, "_run", slow_run)
    scorer = scorer_over(tiny_model(), step_tokens=8)
    asked = asyncio.create_task(all_events(scorer, RollingQuestion((HUGE,))))
    assert await asyncio.to_thread(running.wait, 20)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    may_go_on.set()
    assert only(await all_events(scorer, RollingQuestion((SMALL,))), ItemDone)
    await scorer.close()
    assert steps == 2  # the one that ran, and the next caller's


async def test_an_answer_and_the_metrics_tell_where_time_and_tokens_went() -> None:
    import backend_torch

    metrics = Metrics()

    def count() -> dict[str, float]:
        names = ("computed", "shared", "padded", "scored")
        found = {name: metrics.registry.get_sample_value(f"dualtrace_{name}_tokens_total") for name in names}
        return {name: value or 0.0 for name, value in found.items()}

    engine = backend_torch.load(EngineSettings(model=tiny_model()))
    async with connected(EngineScorer(engine, Tokenizer.from_directory(tiny_model()), metrics=metrics)) as client:
        before = count()  # the preflight has run
        texts = tuple(ids(*[5] * 40, last) for last in (1, 2, 3))
        (summary,) = only(await all_events(client, RollingQuestion(texts)), AnswerSummary)
    told = summary.execution
    assert 0 < told.compute_seconds <= told.total_seconds
    assert told.queue_seconds + told.tokenize_seconds <= told.total_seconds
    assert (told.computed_tokens, told.shared_tokens, told.padded_tokens) == (40, 2 * 40, 0)  # no last token is run
    counted = {name: value - before[name] for name, value in count().items()}
    assert counted == {"computed": 40, "shared": 80, "padded": 0, "scored": 120}


PLACES: dict[str, tuple[str, str]] = {
    "a layer": ("model.layers.1.mlp.down_proj.weight", "layer 1"),
    "the attention of a layer": ("model.layers.2.self_attn.v_proj.weight", "layer 2"),
    "the embeddings": ("model.embed_tokens.weight", "the embeddings"),
    "the last norm": ("model.norm.weight", "the final norm"),
    "the head": ("lm_head.weight", "the output head"),
}


@pytest.mark.parametrize("place", PLACES)
async def test_the_preflight_of_broken_weights_names_view_and_place(place: str, tmp_path: Path) -> None:
    tensor, told = PLACES[place]
    scorer = scorer_over(changed(tmp_path / "m", tensor, lambda values: values.fill(np.nan)))
    (result,) = (await ask_one(scorer, PreflightQuestion())).results
    await scorer.close()
    assert isinstance(result.problem, Problem)
    assert result.problem.reason is Reason.NON_FINITE_LOGITS
    assert "view base" in result.problem.detail.message
    assert result.problem.detail.message.endswith(f"the output of {told}")


async def test_the_preflight_of_a_broken_adapter_names_view_and_layer(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        name = next(name for name in tensors if ".layers.1." in name and "lora_B" in name)
        tensors[name] = np.full_like(tensors[name], np.nan)

    adapter = changed_adapter(tiny_adapter(tiny_model()), tmp_path / "a", tensors=spoil)
    scorer = scorer_over(tiny_model(), adapters=(("tuned", adapter),))
    answer = await ask_one(scorer, PreflightQuestion((finetuned("tuned"),)))
    await scorer.close()
    (result,) = answer.results
    assert result.problem is not None
    assert "tuned" in result.problem.detail.message
    assert "layer 1" in result.problem.detail.message


# ---- as a process


SERVE = [sys.executable, "-m", "backend_torch", "--port", "0", "--threads", "1"]


def test_the_module_serves_answers_and_ends_when_it_is_told(processes: Processes) -> None:
    sidecar = processes.start(
        [*SERVE, "--model", str(tiny_model())], name="sidecar", ready=r"listening on (\S+)", timeout_seconds=60
    )
    assert sidecar.ready is not None
    target = f"grpc://{sidecar.ready[1]}"
    asked = processes.start(
        [sys.executable, "-m", "dualtrace.cli", "rolling", target, "--ids", "1,2,3", "--json"], name="client"
    )
    assert asked.popen.wait(30) == 0, asked.tell()
    assert '"framework": "torch"' in asked.stdout
    sidecar.send(signal.SIGTERM)
    assert sidecar.wait(30) == 0, sidecar.tell()


@pytest.mark.slow
def test_broken_weights_never_listen(processes: Processes, tmp_path: Path) -> None:
    folder = changed(tmp_path / "m", "model.layers.1.mlp.down_proj.weight", lambda values: values.fill(np.nan))
    sidecar = processes.start([*SERVE, "--model", str(folder)], name="sidecar")
    assert sidecar.popen.wait(60) != 0
    assert sidecar.stdout == ""
    assert "view base" in sidecar.stderr
    assert "layer 1" in sidecar.stderr
