"""Any function from ids to logits as an engine: what it may return, and what is said when it returns something else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualtrace.callable_engine import DEFAULT_POSITIONS, CallableEngine, load_function
from dualtrace.engine import Batch, Read, Segment, int_array
from dualtrace.engine_scorer import EngineScorer
from dualtrace.problems import Internal, InvalidArgument, Problem, Reason, Unsupported
from dualtrace.questions.asked import NextTokenQuestion, RollingQuestion
from tests.support.answering import answer_tokens, ask_logprob, fake_context, ids, next_logprobs, wanted
from tests.support.scorers import all_events

WIDTH = 12
TABLE = np.random.default_rng(3).normal(0, 2, (WIDTH, WIDTH))


def bigram(token_ids: Any) -> Any:
    """Logits that depend on the last token alone."""
    return TABLE[token_ids]


def engine(function: Callable[[Any], Any] = bigram) -> CallableEngine:
    return CallableEngine("py:test:function", function)


def log_softmax(logits: Any) -> Any:
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def failing(function: Callable[[Any], Any]) -> Problem:
    with pytest.raises(Internal) as caught:
        next_logprobs(engine(function), [1, 2, 3])
    return caught.value


def test_its_logits_become_logprobs() -> None:
    expected = [log_softmax(TABLE)[1, 2], log_softmax(TABLE)[2, 3]]
    assert next_logprobs(engine(), [1, 2, 3]) == pytest.approx(expected, abs=1e-14)


def test_the_logit_width_is_found_by_asking() -> None:
    assert engine().card.vocab_size == WIDTH


def test_the_length_of_a_text_is_the_functions_to_say() -> None:
    def short(token_ids: Any) -> Any:
        return TABLE[token_ids]

    short.max_positions = 7  # type: ignore[attr-defined]
    assert engine(short).card.max_positions == 7
    assert engine().card.max_positions == DEFAULT_POSITIONS


def test_half_precision_is_read_in_float64() -> None:
    half = TABLE.astype(np.float16)
    expected = log_softmax(half.astype(np.float64))[1, 2]
    assert next_logprobs(engine(lambda t: half[t]), [1, 2]) == pytest.approx([expected], abs=1e-14)


def test_an_array_that_carries_a_gradient_is_taken_without_it() -> None:
    class Tensor:
        def __init__(self, values: Any) -> None:
            self._values = values

        def detach(self) -> Any:
            return self._values

    assert next_logprobs(engine(lambda t: Tensor(TABLE[t])), [1, 2]) == next_logprobs(engine(), [1, 2])


def test_it_is_called_with_the_whole_row_even_where_prefixes_are_shared() -> None:
    seen: list[list[int]] = []

    def recording(token_ids: Any) -> Any:
        seen.append(token_ids.tolist())
        return TABLE[token_ids]

    made = engine(recording)
    seen.clear()
    one = Segment(int_array([1, 2]), int_array([0, 1]))
    two = Segment(int_array([3]), int_array([2]), parent=0)
    reads = (Read(int_array([])), Read(int_array([2]), targets=int_array([4])))
    list(made.forward(Batch((one, two)), reads, wanted))
    assert seen == [[1, 2, 3]]


def test_its_questions_are_the_ordinary_ones() -> None:
    context = fake_context(vocab_size=WIDTH, tokenizer=False)
    scored = answer_tokens(ask_logprob((ids(1), ids(2, 3))), context, engine())[0, 0]
    assert scored.logprobs == next_logprobs(engine(), [1, 2, 3])
    assert NextTokenQuestion((ids(1),)).kind is not None


def test_a_row_of_nan_is_reported_and_not_scored() -> None:
    def spoilt(token_ids: Any) -> Any:
        logits = TABLE[token_ids].copy()
        logits[token_ids == 5] = np.nan
        return logits

    made = engine(spoilt)
    read = Read(int_array([0, 1]), targets=int_array([5, 1]))
    batch = Batch((Segment(int_array([4, 5]), int_array([0, 1])),))
    ((answer,),) = list(made.forward(batch, (read,), wanted))
    assert answer.bad_rows == (1,)


def test_an_error_of_the_function_is_told_with_its_name_and_kind() -> None:
    calls = iter([False])

    def breaks(token_ids: Any) -> Any:
        if next(calls, True):
            raise KeyError("layer 3")
        return TABLE[token_ids]

    problem = failing(breaks)
    assert problem.reason is Reason.ENGINE_FAILED
    assert "py:test:function failed on 3 ids: KeyError" in str(problem)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda t: TABLE[t][0], r"of shape \[12\] for"),
        (lambda t: TABLE[t][None], r"of shape \[1, 1, 12\]"),
        (lambda t: TABLE[[*t, 0]], r"of shape \[2, 12\] for 1 ids"),
        (lambda t: TABLE[t].astype(np.int64), "gave int64"),
        (lambda t: TABLE[t].astype(np.complex128), "gave complex128"),
        (lambda t: TABLE[t][:, :0], "it must give floats"),
        (lambda _t: "logits", "it must give floats"),
        (lambda _t: None, "it must give floats"),
    ],
    ids=["no rows", "a batch", "a row too many", "integers", "complex", "no width", "text", "nothing"],
)
def test_something_that_is_no_matrix_of_logits_is_refused_with_what_it_was(
    wrong: Callable[[Any], Any], told: str
) -> None:
    with pytest.raises(Internal, match=told) as caught:
        engine(wrong)
    assert caught.value.reason is Reason.ENGINE_FAILED


def test_a_width_that_changes_is_refused() -> None:
    assert "10 logits a row, and 12 before" in str(failing(lambda t: TABLE[t][:, : 10 if len(t) > 1 else WIDTH]))


def test_it_promises_nothing_that_a_function_cannot() -> None:
    able = engine().card.capabilities
    assert not any((able.steps, able.shares_prefixes, able.deterministic, able.masks, able.views))


async def test_a_promise_that_it_cannot_keep_is_refused_and_never_half_kept() -> None:
    scorer = EngineScorer(engine(), None)
    with pytest.raises(Unsupported) as caught:
        await all_events(scorer, RollingQuestion((ids(1, 2),), deterministic=True))
    await scorer.close()
    assert (caught.value.reason, caught.value.detail.field) == (Reason.NOT_IMPLEMENTED, "execution.deterministic")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("port_"):
            del sys.modules[name]


def test_a_function_is_found_in_the_current_folder(folder: Path) -> None:
    (folder / "port_found.py").write_text("import numpy as np\ndef logits(ids):\n    return np.zeros((len(ids), 4))\n")
    name, function = load_function("port_found:logits")
    assert name == "py:port_found:logits"
    assert CallableEngine(name, function).card.vocab_size == 4


@pytest.mark.parametrize("path", ["", "module", "module:", ":function", ":"])
def test_a_path_that_is_none_is_malformed(path: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load_function(path)
    assert (caught.value.reason, caught.value.detail.field) == (Reason.MALFORMED, "target")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (None, "cannot import port_it"),
        ("x = 1\n", "no function logits"),
        ("logits = 3\n", "no function logits"),
        ("import nothing_of_that_name\n", "cannot import port_it"),
        ("def broken(:\n", "cannot import port_it"),
        ("raise ValueError('no weights here')\n", "no weights here"),
    ],
    ids=["no module", "no function", "not callable", "its import fails", "its syntax fails", "it raises"],
)
def test_a_function_that_is_not_there_is_not_found(folder: Path, source: str | None, told: str) -> None:
    if source is not None:
        (folder / "port_it.py").write_text(source)
    with pytest.raises(InvalidArgument, match=told) as caught:
        load_function("port_it:logits")
    assert (caught.value.reason, caught.value.detail.field) == (Reason.NOT_FOUND, "target")
