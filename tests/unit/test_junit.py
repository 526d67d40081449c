"""JUnit XML: what a continuous integration server will find in it."""

from datetime import UTC, datetime
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualtrace.cases.junit import Outcome, Result, write_junit

STARTED = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
RESULTS = (
    Result("fine", "a.yaml", Outcome.PASSED, 1.5, properties=(("max_abs_diff", "1e-6"),)),
    Result("apart", "a.yaml", Outcome.FAILED, 0.25, "FAIL", "parts at token 3", "first line\nsecond line"),
    Result("away", "b.yaml", Outcome.ERRED, 0.0, "UNREACHABLE", "the right side cannot be reached"),
    Result("left out", "b.yaml", Outcome.SKIPPED, 0.0, message="an earlier case failed"),
)


def parsed(*results: Result) -> ElementTree.Element:
    return ElementTree.fromstring(write_junit("dualtrace", results, STARTED, 2.0))


@pytest.mark.parametrize("path", [".", "testsuite"])
def test_the_counts_are_those_of_the_results(path: str) -> None:
    found = parsed(*RESULTS).find(path)
    assert found is not None
    names = ("tests", "failures", "errors", "skipped", "time")
    assert [found.attrib[name] for name in names] == ["4", "1", "1", "1", "2.000"]


def test_each_result_is_a_test_case_in_its_file() -> None:
    cases = parsed(*RESULTS).findall("testsuite/testcase")
    assert [(case.attrib["classname"], case.attrib["name"]) for case in cases] == [
        ("a.yaml", "fine"), ("a.yaml", "apart"), ("b.yaml", "away"), ("b.yaml", "left out"),
    ]  # fmt: skip


def test_a_passed_test_has_nothing_below_it_but_properties() -> None:
    case = parsed(RESULTS[0]).find("testsuite/testcase")
    assert case is not None
    assert [below.tag for below in case] == ["properties"]


@pytest.mark.parametrize(("index", "tag", "kind"), [(1, "failure", "FAIL"), (2, "error", "UNREACHABLE")])
def test_what_went_wrong_is_told_with_its_kind_and_text(index: int, tag: str, kind: str) -> None:
    told = parsed(RESULTS[index]).find(f"testsuite/testcase/{tag}")
    assert told is not None
    assert told.attrib == {"message": RESULTS[index].message, "type": kind}
    assert told.text == (RESULTS[index].text or RESULTS[index].message)


def test_the_time_it_started_is_told_in_utc_without_a_zone() -> None:
    suite = parsed().find("testsuite")
    assert suite is not None
    assert suite.attrib["timestamp"] == "2026-03-04T05:06:07"


@given(st.text())
def test_any_text_gives_a_document_that_can_be_read(text: str) -> None:
    result = Result(text, text, Outcome.FAILED, 0.0, text, text, text, ((text, text),))
    assert len(parsed(result).findall("testsuite/testcase/failure")) == 1


def test_a_control_character_is_shown_and_not_lost() -> None:
    told = parsed(Result("x", "y", Outcome.ERRED, 0.0, "k", "m", "a\x00b")).find("testsuite/testcase/error")
    assert told is not None
    assert told.text == "a\\x00b"
