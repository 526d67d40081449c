"""The grammar of targets: what each kind becomes, and what is said to a target that is none."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualtrace.client import Client
from dualtrace.engine import int_array
from dualtrace.engine_scorer import EngineScorer
from dualtrace.problems import InvalidArgument, Problem, Reason, Unsupported
from dualtrace.questions.answers import NextTokens
from dualtrace.questions.asked import Input, NextTokenQuestion
from dualtrace.scorer import ask_one
from dualtrace.targets import GRAMMAR, Target, TargetOptions, open_target, parse_target
from tests.support.adapters import tiny_adapter
from tests.support.tiny import tiny_model

KINDS = ("grpc", "grpcs", "reference", "fake", "py")


@pytest.mark.parametrize(
    ("text", "kind", "rest"),
    [
        ("grpc://localhost:9000", "grpc", "localhost:9000"),
        ("grpcs://[::1]:443", "grpcs", "[::1]:443"),
        ("reference:models/tiny", "reference", "models/tiny"),
        ("reference:C:/models", "reference", "C:/models"),
        ("fake:", "fake", ""),
        ("fake:vocab=8,seed=1", "fake", "vocab=8,seed=1"),
        ("py:port:logits", "py", "port:logits"),
    ],
)
def test_a_target_is_its_kind_and_the_rest(text: str, kind: str, rest: str) -> None:
    assert parse_target(text) == Target(kind, rest)


@pytest.mark.parametrize(
    "text",
    ["", "torch", "grpc", "grpc:", "grpc://", "grpc:localhost:9000", "reference:", "py:", "http://x", ":x", "GRPC://x:1",
     "fake", " fake:", "x" * 5000, "a\0b"],
)  # fmt: skip
def test_a_text_that_is_no_target_is_malformed(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_target(text)
    assert (caught.value.reason, caught.value.detail.field) == (Reason.MALFORMED, "target")


def test_a_target_without_a_kind_is_told_the_grammar() -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_target("localhost:9000")
    assert caught.value.detail.allowed == GRAMMAR


def test_a_folder_without_a_kind_is_told_what_it_may_have_meant(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=f"Did you mean reference:{tmp_path}"):
        parse_target(str(tmp_path))


@given(st.sampled_from(KINDS), st.text(min_size=3).filter(lambda rest: not rest.startswith("/")))
def test_a_target_written_out_reads_back(kind: str, rest: str) -> None:
    target = Target(kind, rest)
    assert parse_target(str(target)) == target


@given(st.text())
def test_any_text_is_a_target_or_a_problem(text: str) -> None:
    reason = None
    try:
        parse_target(text)
    except Problem as problem:
        reason = problem.reason
    assert reason in {None, Reason.MALFORMED}


async def test_a_fake_target_is_a_scorer_with_the_fakes_tokenizer() -> None:
    scorer = await open_target(parse_target("fake:seed=7"), TargetOptions())
    card = await scorer.describe()
    await scorer.close()
    assert (card.provenance.model_id, card.capabilities.text) == ("fake-7", True)


async def test_a_reference_target_is_the_checkpoint_with_its_own_tokenizer() -> None:
    scorer = await open_target(parse_target(f"reference:{tiny_model()}"), TargetOptions())
    card = await scorer.describe()
    await scorer.close()
    assert (card.provenance.framework, card.capabilities.text) == ("reference", True)
    assert card.provenance.tokenizer_digest.startswith("sha256:")


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with a function of logits in the current folder."""
    (tmp_path / "target_port.py").write_text("import numpy as np\ndef logits(t):\n    return np.zeros((len(t), 300))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "target_port", raising=False)
    return "py:target_port:logits"


async def test_a_python_target_knows_ids_alone(port: str) -> None:
    scorer = await open_target(parse_target(port), TargetOptions())
    card = await scorer.describe()
    await scorer.close()
    assert (card.vocab_size, card.capabilities.text) == (300, False)


async def test_a_python_target_knows_text_with_a_tokenizer(port: str) -> None:
    scorer = await open_target(parse_target(port), TargetOptions(tokenizer=tiny_model()))
    card = await scorer.describe()
    await scorer.close()
    assert card.capabilities.text


async def test_a_sidecar_is_not_contacted_before_it_is_asked() -> None:
    scorer = await open_target(parse_target("grpc://nowhere.invalid:1"), TargetOptions())
    assert isinstance(scorer, Client)
    await scorer.close()


async def test_certificates_without_tls_are_a_conflict_and_never_ignored() -> None:
    with pytest.raises(InvalidArgument) as caught:
        await open_target(parse_target("grpc://localhost:1"), TargetOptions(ca_file=Path("ca.pem")))
    assert caught.value.reason is Reason.CONFLICT


async def test_a_folder_that_is_not_there_is_a_problem_and_no_traceback(tmp_path: Path) -> None:
    with pytest.raises(Problem):
        await open_target(parse_target(f"reference:{tmp_path / 'none'}"), TargetOptions())


async def test_a_spec_that_means_nothing_is_refused_when_it_is_opened() -> None:
    with pytest.raises(InvalidArgument):
        await open_target(parse_target("fake:colour=red"), TargetOptions())


async def test_an_engine_in_this_process_is_an_engine_scorer() -> None:
    scorer = await open_target(parse_target("fake:"), TargetOptions())
    assert isinstance(scorer, EngineScorer)
    await scorer.close()


@pytest.mark.parametrize("kind", ["torch", "jax"])
def test_an_engine_over_a_checkpoint_is_a_target(kind: str) -> None:
    assert parse_target(f"{kind}:models/tiny") == Target(kind, "models/tiny")


def announce(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    points = [EntryPoint(name, value, "dualtrace.engines")]
    monkeypatch.setattr("dualtrace.engine_registry.metadata.entry_points", lambda group: points)


@pytest.mark.parametrize("kind", ["torch", "jax"])
async def test_a_missing_framework_is_told_with_the_extra_that_brings_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(monkeypatch, kind, "absent_framework_of_ours:load")
    with pytest.raises(Unsupported, match=rf"pip install 'dualtrace\[{kind}\]'"):
        await open_target(parse_target(f"{kind}:{tiny_model()}"), TargetOptions())


async def test_an_announced_engine_is_a_target_and_gets_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, "mine", "dualtrace.reference:load")
    folder = tiny_model()
    options = TargetOptions(adapters=(("a", tiny_adapter(folder)),), dtype="float64", device="cpu")
    scorer = await open_target(parse_target(f"mine:{folder}"), options)
    card = await scorer.describe()
    await scorer.close()
    assert card.adapters == ("a",)


def test_an_engine_that_nobody_announced_is_no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, "mine", "dualtrace.reference:load")
    with pytest.raises(InvalidArgument):
        parse_target("yours:x")


async def test_a_number_type_that_the_engine_has_not_is_refused() -> None:
    with pytest.raises(Unsupported, match="int3"):
        await open_target(parse_target(f"reference:{tiny_model()}"), TargetOptions(dtype="int3"))


@pytest.mark.parametrize("name", ["adapters", "dtype", "device"])
@pytest.mark.parametrize("target", ["grpc://localhost:1", "fake:", "py:math:sqrt"])
async def test_what_a_target_cannot_use_is_a_conflict_and_never_ignored(target: str, name: str) -> None:
    value = (("a", Path("x")),) if name == "adapters" else "x"
    with pytest.raises(InvalidArgument) as caught:
        await open_target(parse_target(target), TargetOptions(**{name: value}))  # type: ignore[arg-type]
    assert (caught.value.reason, caught.value.detail.field) == (Reason.CONFLICT, name)


@pytest.mark.torch
async def test_a_torch_target_answers_as_the_reference_does() -> None:
    folder = tiny_model()
    question = NextTokenQuestion((Input(ids=int_array([5, 6, 7])),), top_k=3)
    found = []
    for kind in ("torch", "reference"):
        scorer = await open_target(parse_target(f"{kind}:{folder}"), TargetOptions())
        outcome = (await ask_one(scorer, question)).results[0].outcome
        await scorer.close()
        assert isinstance(outcome, NextTokens)
        found.append(outcome.top_ids.tolist())
    assert found[0] == found[1]


def test_a_json_file_that_exists_is_a_stored_run_and_another_is_no_target(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text("{}")
    assert parse_target(str(file)) == Target("file", str(file))
    assert str(parse_target(str(file))) == str(file)
    with pytest.raises(InvalidArgument, match="no such file"):
        parse_target(str(tmp_path / "other.json"))


@pytest.mark.parametrize("text", ["run:run-1", "backend:torch"])
async def test_what_a_coordinator_keeps_needs_its_name(text: str) -> None:
    with pytest.raises(InvalidArgument):
        await open_target(parse_target(text), TargetOptions())


def test_only_engines_over_a_checkpoint_are_engines() -> None:
    texts = ("reference:m", "fake:", "py:a:b", "grpc://h:1", "run:a", "backend:a")
    assert [parse_target(text).kind for text in texts if parse_target(text).is_engine] == ["reference"]
