"""Runs and reports of a later minor version: read without what is new in them, and written again as our own."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from dualtrace.compare.report import read_report, report_to_text
from dualtrace.engine import int_array
from dualtrace.masks.spec import Alignment, CharRange, MaskSpec, Named, SegmentName, Sliding, Span, TokenRange
from dualtrace.problems import InvalidArgument, Reason
from dualtrace.questions.answers import TokenChunk
from dualtrace.questions.asked import Input, MaskedForwardQuestion, Variant
from dualtrace.runs.run import _identity, read_run, run_to_text
from dualtrace.runs.stored_scorer import StoredScorer
from tests.support.stored import make_report, make_run

IDS = Input(ids=int_array([1, 2, 3]))
RUN = make_run()


def later(change: Any = lambda document: None, run: Any = RUN, version: str = "1.9") -> str:
    """The run as a later version might have written it."""
    document = json.loads(run_to_text(run))
    document["score_debug_schema_version"] = version
    change(document)
    document["identity"] = _identity(document["provenance"]["digest"], document["question"])
    return json.dumps(document)


def add_provenance(document: dict[str, Any]) -> None:
    document["provenance"] |= {"kernel": "x", "digest": "sha256:of-more-fields"}


def masked(*reads: Span) -> Any:
    return replace(RUN, question=MaskedForwardQuestion(IDS, (Variant(mask=MaskSpec(Sliding(2))),), reads=reads))


@pytest.mark.parametrize(
    "read", [TokenRange(1, 2), CharRange(0, 1, Alignment.OVERLAP), Named(SegmentName.PROMPT)], ids=str
)
def test_a_new_field_inside_a_span_of_a_later_version_is_left(read: Span) -> None:
    text = later(lambda document: document["question"]["reads"][0].update(new=1), masked(read))
    assert read_run(text).question.reads == (read,)  # type: ignore[union-attr]


def test_a_new_field_inside_a_span_of_our_own_version_is_refused() -> None:
    text = later(lambda document: document["question"]["reads"][0].update(new=1), masked(TokenRange(1, 2)), "1.0")
    with pytest.raises(InvalidArgument, match=r"question.reads\[0\]"):
        read_run(text)


def test_a_new_field_inside_a_mask_is_refused_in_every_version() -> None:
    text = later(lambda document: document["question"]["variants"][0]["mask"].update(new=1), masked())
    with pytest.raises(InvalidArgument) as caught:
        read_run(text)
    assert caught.value.detail.field.startswith("question.variants[0].mask")


def test_a_later_run_is_written_again_as_our_version_with_its_identity() -> None:
    text = later(add_provenance)
    again = run_to_text(read_run(text))
    assert json.loads(again)["score_debug_schema_version"] == "1.0"
    assert json.loads(again)["identity"] == json.loads(text)["identity"] == read_run(text).identity
    assert json.loads(again)["identity_version"] == "1.9"


def test_what_was_read_from_a_later_version_and_written_again_can_be_read_and_written_again() -> None:
    once = run_to_text(read_run(later(add_provenance)))
    assert run_to_text(read_run(once)) == once


def test_a_later_run_whose_identity_we_can_make_ourselves_is_written_as_any_other() -> None:
    text = later(lambda document: document.update(mood="sunny"))
    assert run_to_text(read_run(text)) == run_to_text(RUN)


def test_a_later_run_that_was_changed_is_noticed() -> None:
    document = json.loads(later(add_provenance))
    document["question"]["top_k"] = 7
    with pytest.raises(InvalidArgument) as caught:
        read_run(json.dumps(document))
    assert caught.value.reason is Reason.ARTIFACT_CORRUPT


@pytest.mark.parametrize("version", ["1.0", "2.3", "soon", 3])
def test_an_identity_of_no_later_version_is_refused(version: object) -> None:
    document = {**json.loads(run_to_text(RUN)), "identity_version": version}
    with pytest.raises(InvalidArgument):
        read_run(json.dumps(document))


def test_one_variant_of_several_has_an_identity_of_its_own() -> None:
    both = replace(RUN, question=replace(RUN.question, variants=(Variant(), Variant())))  # type: ignore[arg-type]
    run = read_run(later(add_provenance, both))
    narrowed = StoredScorer(run, "a run", 0).narrowed_run
    assert narrowed.identity != run.identity


def test_a_replayed_run_of_one_variant_keeps_its_identity() -> None:
    run = read_run(later(add_provenance))
    assert StoredScorer(run, "a run").narrowed_run.identity == run.identity


def test_a_later_report_is_written_again_as_our_version() -> None:
    document = json.loads(report_to_text(make_report()))
    document |= {"score_debug_schema_version": "1.9", "mood": "sunny"}
    again = json.loads(report_to_text(read_report(json.dumps(document))))
    assert again["score_debug_schema_version"] == "1.0"
    assert "mood" not in again


def test_a_run_without_ranks_is_replayed_without_them() -> None:
    bare = replace(RUN.entries[0], token_ranks=(None,) * 3, token_ties=(None,) * 3)  # type: ignore[arg-type]
    scorer = StoredScorer(replace(RUN, entries=(bare,)), "a run")

    async def sizes() -> list[tuple[int, int]]:
        events = [event async for event in scorer.ask(scorer.question)]
        return [(len(event.ranks), len(event.ties)) for event in events if isinstance(event, TokenChunk)]

    assert asyncio.run(sizes()) == [(0, 0)]
    assert not asyncio.run(scorer.describe()).capabilities.ranks
