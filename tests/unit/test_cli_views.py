"""Views on the command line and in code: how they are written, worn, preflighted, and refused when stale."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

import dualtrace.cli as cli
from dualtrace.cli.inputs import parse_adapters
from dualtrace.cli.sights import parse_view, write_view
from dualtrace.client import Connection, open_channel
from dualtrace.engine import EngineSettings, int_array
from dualtrace.engine_scorer import EngineScorer
from dualtrace.metrics import Metrics
from dualtrace.model_views import AsyncView, BlockingView, Model
from dualtrace.problems import BadNumbers, FailedPrecondition, InvalidArgument, NotFound, Problem, Reason
from dualtrace.questions.answers import NextTokens, TokenChunk
from dualtrace.questions.asked import Input, NextTokenQuestion, RollingQuestion, Variant
from dualtrace.reference import load
from dualtrace.runs.run import read_run, run_to_text
from dualtrace.server import SidecarServer
from dualtrace.settings import SidecarSettings
from dualtrace.tokens import Tokenizer
from dualtrace.views import BASE, Noise, View, finetuned, null, scaled
from tests.support.adapters import broken_adapter, tiny_adapter
from tests.support.tiny import tiny_model

IDS = ["--ids", "5,6,7,8"]
QUESTION = NextTokenQuestion((Input(ids=int_array([5, 6, 7])),), top_k=2)
ROLLING = RollingQuestion((Input(ids=int_array([5, 6, 7])),))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, [str(one) for one in arguments])


@pytest.fixture
def tuned() -> list[str]:
    """A target with an adapter."""
    return [f"reference:{tiny_model()}", "--adapter", f"a={tiny_adapter(tiny_model())}"]


def logprobs(*arguments: str) -> list[list[float]]:
    result = run("rolling", *arguments, *IDS, "--json")
    assert result.exit_code == 0, result.output
    return [item["token_logprobs"][1:] for item in json.loads(result.stdout)["items"]]


# ---- the grammar


@pytest.mark.parametrize(
    ("text", "view"),
    [
        ("base", BASE),
        ("finetuned:a b", finetuned("a b")),
        ("scaled:a:1.25", scaled("a", 1.25)),
        ("scaled:a:-1e-3", scaled("a", -0.001)),
        ("null:a:7", null("a", Noise(7))),
        ("null:a:-7:rank_scale=2", null("a", Noise(-7, rank_scale=2.0))),
        ("null:a:7:variance_faithful:init_scale=.5", null("a", Noise(7, 0.5, variance_faithful=True))),
    ],
)
def test_a_view_is_read_as_it_is_written(text: str, view: View) -> None:
    assert parse_view(text) == view


NAMES = st.text(min_size=1).filter(lambda name: ":" not in name)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
NOISES = st.builds(
    Noise, st.integers(-(2**63), 2**63 - 1), FINITE.map(abs), FINITE.map(abs).filter(bool), st.booleans()
)


@given(st.just(BASE) | st.builds(finetuned, NAMES) | st.builds(scaled, NAMES, FINITE) | st.builds(null, NAMES, NOISES))
def test_a_view_written_out_reads_back_at_full_precision(view: View) -> None:
    assert parse_view(write_view(view)) == view


@pytest.mark.parametrize(
    "text",
    ["", "Base", "base:", "base:a", "finetuned", "finetuned:a:b", "scaled:a", "scaled:a:x", "scaled:a:1_0",
     "scaled:a: 1", "null:a", "null:a:x", "null:a:1.5", "null:a:1:mood=2", "null:a:1:init_scale",
     "null:a:1:rank_scale=1:rank_scale=1", "null:a:1:variance_faithful=1"],
)  # fmt: skip
def test_what_is_no_view_is_told_the_grammar(text: str) -> None:
    with pytest.raises(InvalidArgument, match="write one of: base, finetuned:NAME") as caught:
        parse_view(text)
    assert caught.value.reason is Reason.MALFORMED


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("finetuned:", Reason.MISSING), ("scaled:a:nan", Reason.NOT_FINITE), ("scaled:a:1e999", Reason.NOT_FINITE),
        ("null:a:1:rank_scale=0", Reason.OUT_OF_RANGE), ("null:a:9999999999999999999", Reason.OUT_OF_RANGE),
    ],
)  # fmt: skip
def test_a_view_that_cannot_be_is_refused_with_its_reason(text: str, reason: Reason) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_view(text)
    assert caught.value.reason is reason


def test_adapters_are_names_and_folders() -> None:
    assert parse_adapters(("a=x", "b=y=z")) == (("a", Path("x")), ("b", Path("y=z")))


@pytest.mark.parametrize("given", [("a",), ("=x",), ("a=",), ("a:b=x",), ("a=x", "a=y")], ids=" ".join)
def test_an_adapter_that_no_view_could_name_is_refused(given: tuple[str, ...]) -> None:
    with pytest.raises(InvalidArgument):
        parse_adapters(given)


# ---- asking under views


def test_scaling_goes_from_the_base_exactly_to_finetuned_exactly(tuned: list[str]) -> None:
    views = [part for view in ("base", "scaled:a:0", "scaled:a:1", "finetuned:a") for part in ("--view", view)]
    base, zero, one, full = logprobs(*tuned, *views)
    assert (zero, one) == (base, full)
    assert base != full


def test_noise_of_another_seed_gives_other_numbers(tuned: list[str]) -> None:
    same, again, other = logprobs(*tuned, "--view", "null:a:7", "--view", "null:a:7", "--view", "null:a:8")
    assert (same == again, same == other) == (True, False)


def test_every_mask_is_asked_under_every_view_and_the_base_comes_first(tuned: list[str], tmp_path: Path) -> None:
    mask = tmp_path / "window.json"
    mask.write_text('{"base": {"sliding": {"keys_back": 2}}}')
    views = ["--view", "base", "--view", "finetuned:a"]
    shown = run("rolling", *tuned, *IDS, "--mask", mask, *views, "--with-base").stdout
    assert "v0  base\nv1  window.json\nv2  window.json · finetuned(a)\n" in shown
    assert "v2 window.json · finetuned(a): a delta was added to 6 modules (q_proj, v_proj)" in shown


def test_a_run_under_views_survives_reading_and_writing(tuned: list[str]) -> None:
    views = ["--view", "scaled:a:0.1", "--view", "null:a:7:init_scale=0.3"]
    text = run("masked", *tuned, *IDS, *views, "--kl", "--json").stdout.rstrip("\n")
    assert run_to_text(read_run(text)) == text


def test_an_adapter_that_is_not_there_is_refused_with_those_that_are(tuned: list[str]) -> None:
    result = run("rolling", *tuned, *IDS, "--view", "finetuned:b")
    assert (result.exit_code, "this scorer has: a" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["describe", "grpc://localhost:1", "--adapter", "a=x"], "dualtrace serve"),
        (["describe", "grpc://localhost:1", "--dtype", "float32"], "dualtrace serve"),
        (["health", "grpc://localhost:1", "--adapter", "a=x"], "dualtrace serve"),
        (["describe", "fake:", "--device", "cuda"], "no checkpoint"),
        (["describe", "py:m:f", "--adapter", "a=x"], "no checkpoint"),
        (["serve", "fake", "--adapter", "a=x"], "no weights"),
        (["serve", "fake", "--adapter", "a"], "no weights"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_options_of_an_engine_are_never_ignored(arguments: list[str], word: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, word in result.stderr) == (2, True), result.output


# ---- adapters and preflight


def test_a_tiny_adapter_is_written_and_shown(tmp_path: Path) -> None:
    made = run("adapter", "tiny", tmp_path / "made", "--model", tiny_model(), "--rank", "2", "--targets", "q_proj")
    assert made.stdout.strip() == str(tmp_path / "made")
    shown = json.loads(run("adapter", "show", tmp_path / "made", "--json").stdout)
    assert (shown["rank"], shown["kinds"], shown["adapted_modules"], shown["scalings"]) == (2, ["q_proj"], 3, [4.0])
    assert "adapted modules  3" in run("adapter", "show", tmp_path / "made").stdout


def test_a_folder_that_holds_no_adapter_is_refused(tmp_path: Path) -> None:
    assert run("adapter", "show", tmp_path).exit_code == 2


def test_a_preflight_checks_the_base_and_every_adapter_unasked(tuned: list[str]) -> None:
    found = json.loads(run("preflight", *tuned, "--json").stdout)["views"]
    assert [(one["view"]["face"], one["ok"]) for one in found] == [("base", True), ("finetuned", True)]


def test_a_preflight_names_the_view_with_bad_numbers(tmp_path: Path) -> None:
    broken = broken_adapter(tiny_adapter(tiny_model()), tmp_path / "broken")
    result = run("preflight", f"reference:{tiny_model()}", "--adapter", f"bad={broken}")
    assert result.exit_code == 1
    base, bad = result.stdout.splitlines()[2:4]
    assert base.split() == ["base", "sane"]
    assert bad.split()[:2] == ["finetuned(bad)", "bad"]


def scorer(adapter: Path) -> EngineScorer:
    folder = tiny_model()
    return EngineScorer(
        load(EngineSettings(model=folder, adapters=(("a", adapter),))), Tokenizer.from_directory(folder)
    )


async def test_a_sidecar_with_a_broken_adapter_is_not_ready_and_names_the_view(tmp_path: Path) -> None:
    asked = scorer(broken_adapter(tiny_adapter(tiny_model()), tmp_path / "broken"))
    server = SidecarServer(asked, SidecarSettings(port=0, max_items=1), Metrics())
    await server.start()
    try:
        with pytest.raises(BadNumbers, match=r"finetuned\(a\)"):
            await server.make_ready()
        assert isinstance(server.readiness.refusal, FailedPrecondition)
        assert "finetuned(a)" in str(server.readiness.refusal)
    finally:
        await server.drain(0)
        await asked.close()


# ---- views as blocks of code


@pytest.fixture
async def model() -> AsyncIterator[Model[AsyncView]]:
    asked = scorer(tiny_adapter(tiny_model()))
    yield Model(lambda door, view: AsyncView(asked, door, view))
    await asked.close()


async def best(view: AsyncView) -> float:
    outcome = (await view.next_token(QUESTION)).results[0].outcome
    assert isinstance(outcome, NextTokens)
    return float(outcome.top_logprobs[0])


async def test_inside_a_block_every_question_is_asked_of_its_view(model: Model[AsyncView]) -> None:
    found = {}
    for view in (model.as_base(), model.as_scaled("a", 0.0), model.as_finetuned("a"), model.as_null("a", 7)):
        async with view as worn:
            found[str(worn.view)] = await best(worn)
    assert found["base"] == found["scaled(a, 0.0)"]
    assert len(set(found.values())) == 3


async def test_a_stream_is_asked_of_the_view_too(model: Model[AsyncView]) -> None:
    async with model.as_finetuned("a") as worn:
        chunks = [event async for event in worn.rolling(ROLLING) if isinstance(event, TokenChunk)]
    assert sum(len(chunk.tokens) for chunk in chunks) == 2


async def test_a_second_view_cannot_be_entered_while_one_is_open(model: Model[AsyncView]) -> None:
    async with model.as_base():
        with pytest.raises(FailedPrecondition, match=r"finetuned\(a\) was entered while base is open"):
            async with model.as_finetuned("a"):
                pass
    async with model.as_finetuned("a"):
        pass


async def test_a_block_that_fails_is_left_like_any_other(model: Model[AsyncView]) -> None:
    with pytest.raises(ZeroDivisionError):
        async with model.as_base():
            raise ZeroDivisionError
    async with model.as_base():
        pass


async def test_a_view_is_of_no_use_before_and_after_its_block(model: Model[AsyncView]) -> None:
    view = model.as_base()
    with pytest.raises(FailedPrecondition, match="not been entered"):
        await view.next_token(QUESTION)
    async with view:
        pass
    for ask in (view.next_token(QUESTION), view.preflight()):
        with pytest.raises(FailedPrecondition, match="ended with its block"):
            await ask
    with pytest.raises(FailedPrecondition, match="ended with its block"):
        view.rolling(ROLLING)


async def test_a_stream_that_outlives_its_block_ends_with_a_problem(model: Model[AsyncView]) -> None:
    async with model.as_base() as worn:
        events = worn.rolling(ROLLING)
        await anext(events)
    with pytest.raises(FailedPrecondition, match="ended with its block"):
        await anext(events)


async def test_a_view_is_entered_once(model: Model[AsyncView]) -> None:
    view = model.as_base()
    async with view:
        pass
    with pytest.raises(FailedPrecondition, match="entered before"):
        async with view:
            pass


async def test_a_question_with_a_view_of_its_own_is_refused(model: Model[AsyncView]) -> None:
    question = NextTokenQuestion(QUESTION.prompts, 1, variants=(Variant(finetuned("b")),))
    async with model.as_base() as worn:
        with pytest.raises(InvalidArgument) as caught:
            await worn.next_token(question)
    assert caught.value.detail.field == "variants[0].view"


async def test_a_preflight_is_of_the_view(model: Model[AsyncView]) -> None:
    async with model.as_finetuned("nobody") as worn:
        with pytest.raises(NotFound, match="nobody"):
            await worn.preflight()


class Asker:
    """A blocking client that notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __getattr__(self, _name: str) -> Any:
        def ask(question: Any, *, timeout: float | None = None) -> Any:
            self.asked.append(question)
            return iter(("first", "second"))

        return ask


def test_a_blocking_view_keeps_the_same_rules() -> None:
    asker = Asker()
    model: Model[BlockingView] = Model(lambda door, view: BlockingView(asker, door, view))
    with model.as_scaled("a", 0.5) as worn:
        with pytest.raises(FailedPrecondition), model.as_base():
            pass
        events = worn.rolling(ROLLING)
        assert next(events) == "first"  # type: ignore[comparison-overlap]
    assert asker.asked[0].variants == (Variant(scaled("a", 0.5)),)
    with pytest.raises(FailedPrecondition):
        next(events)
    with pytest.raises(FailedPrecondition):
        worn.score(QUESTION)  # type: ignore[arg-type]


# ---- certificates


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"ca_file": "absent.pem"}, Reason.NOT_FOUND),
        ({"ca_file": "text.pem"}, Reason.MALFORMED),
        ({"ca_file": "."}, Reason.NOT_FOUND),
        ({"certificate_file": "text.pem"}, Reason.CONFLICT),
        ({"key_file": "text.pem", "certificate_file": "text.pem"}, Reason.MALFORMED),
    ],
    ids=str,
)
async def test_a_certificate_that_cannot_be_used_is_a_clear_problem(
    files: dict[str, str], reason: Reason, tmp_path: Path
) -> None:
    (tmp_path / "text.pem").write_text("no certificate")
    named: dict[str, Any] = {name: tmp_path / file for name, file in files.items()}
    with pytest.raises(Problem) as caught:
        open_channel(Connection("localhost:1", tls=True, **named))
    assert caught.value.reason is reason
    assert caught.value.detail.field in {*named, "key_file"}
