"""The report's document: every released version stays readable, and what is no whole report is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dualtrace.compare.report import Verdict, read_report, report_digest, report_to_text
from dualtrace.problems import InvalidArgument, Problem, Reason
from tests.support.compared import SideText, answer_of, compare
from tests.support.vectors import FOLDER

FROZEN = sorted((FOLDER / "replay").glob("report-*.json"))
REPORT = compare(
    answer_of(SideText([7, 1, 2], [-1.0, -2.0])), answer_of(SideText([7, 1, 2], [-1.0, -2.5]))
).report  # fmt: skip
TEXT = report_to_text(REPORT)
FAILED = {"code": "UNAVAILABLE", "reason": "UNREACHABLE", "field": "", "message": "gone", "allowed": ""}
Change = Callable[[dict[str, Any]], object]


def changed(change: Change, text: str = TEXT) -> str:
    document = json.loads(text)
    change(document)
    return json.dumps(document)


def refusal(text: str) -> Problem:
    with pytest.raises(InvalidArgument) as caught:
        read_report(text)
    return caught.value


@pytest.mark.parametrize("path", FROZEN, ids=lambda path: str(path.stem))
def test_a_released_report_is_read_and_written_as_it_was(path: Path) -> None:
    text = path.read_text().rstrip("\n")
    assert report_to_text(read_report(text)) == text


def test_released_reports_hold_every_verdict_but_incomparable() -> None:
    found = {read_report(path.read_text()).verdict for path in FROZEN}
    assert found == {Verdict.PASS, Verdict.FAIL, Verdict.ERROR}


def test_a_report_is_one_line_of_ascii() -> None:
    assert TEXT.isascii()
    assert "\n" not in TEXT


def test_equal_reports_have_one_digest_and_others_another() -> None:
    assert report_digest(TEXT) == report_digest(report_to_text(read_report(TEXT)))
    assert report_digest(TEXT) != report_digest(changed(lambda one: one.update(reproduce="x")))


def test_an_unknown_major_version_is_refused() -> None:
    problem = refusal(changed(lambda one: one.update(score_debug_schema_version="2.0")))
    assert problem.reason is Reason.SCHEMA_VERSION


def test_a_later_minor_version_may_hold_more() -> None:
    def grow(document: dict[str, Any]) -> None:
        document["score_debug_schema_version"] = "1.7"
        document["news"] = 1
        document["tokens"]["news"] = {"a": 1}

    assert read_report(changed(grow)).tokens == REPORT.tokens


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda one: one.update(kind="dualtrace.run"), "kind"),
        (lambda one: one.update(news=1), "news"),
        (lambda one: one.pop("verdict"), "verdict"),
        (lambda one: one.update(verdict="MAYBE"), "verdict"),
        (lambda one: one.update(verdict="PASS"), "verdict"),
        (lambda one: one["gates"].pop(), "gates"),
        (lambda one: one["tokens"].update(aligned_count=3), "tokens.aligned_count"),
        (lambda one: one["tokens"].update(token_mismatch_count=0), "tokens.token_mismatch_count"),
        (lambda one: one["tokens"].update(first_divergence_region=None), "tokens.first_divergence_region"),
        (lambda one: one["tolerance"].update(abs_epsilon=-1.0), "abs_epsilon"),
        (lambda one: one["policy"].update(max_failure_rate=2.0), "max_failure_rate"),
        (lambda one: one["items"][0]["columns"]["statuses"].pop(), "items[0].columns"),
        (lambda one: one["items"][0].update(kept_tokens=9), "items[0].kept_tokens"),
        (lambda one: one["items"][0]["columns"]["left_not_finite"].append({"index": 9, "value": "NaN"}),
         "items[0].columns.left_not_finite"),
        (lambda one: one["question"].update(kind="EXPLAIN_MASK"), "question.kind"),
        (lambda one: one["left"].update(target=3), "left.target"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_no_whole_report_is_refused_by_its_field(change: Change, field: str) -> None:
    assert refusal(changed(change)).detail.field == field


@pytest.mark.parametrize(
    ("name", "change", "field"),
    [
        ("next-token", lambda one: one["distributions"][0]["left_tail"].update(state="NONE"),
         "distributions[0].left_tail.state"),
        ("next-token", lambda one: one["distributions"][0]["left_tail"].update(logprob=None),
         "distributions[0].left_tail.logprob"),
        ("next-token", lambda one: one["distributions"][0].update(js_lower=0.7), "distributions[0].js_lower"),
        ("next-token", lambda one: one["distributions"][0]["token_ids"].pop(), "distributions[0]"),
        ("score", lambda one: one["labels"][0]["left_scores"].pop(), "labels[0]"),
        ("score", lambda one: one["labels"][0].update(status="ID_MISMATCH"), "verdict"),
        ("score", lambda one: one["left"].update(problem=FAILED), "verdict"),
        ("score", lambda one: (one["labels"][0].update(status="UNAVAILABLE"), one.update(scores=None)), "verdict"),
        ("score", lambda one: one.update(verdict="ERROR"), "verdict"),
    ],
)  # fmt: skip
def test_lines_of_a_report_are_checked_too(name: str, change: Change, field: str) -> None:
    text = (FOLDER / "replay" / f"report-1.0-{name}.json").read_text()
    assert refusal(changed(change, text)).detail.field == field


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"kind": NaN}', TEXT[:-1]])
def test_what_is_no_document_is_refused(text: str) -> None:
    refusal(text)
