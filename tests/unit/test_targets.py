"""The grammar of targets: what each kind becomes, and what is said to a target that is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualtrace.client import Client
from dualtrace.engine_scorer import EngineScorer
from dualtrace.problems import InvalidArgument, Problem, Reason
from dualtrace.targets import GRAMMAR, Target, TargetOptions, open_target, parse_target
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
