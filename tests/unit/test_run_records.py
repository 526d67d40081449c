"""Run records: what is written is read again as it was, and what is no record is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dualtrace.problems import InvalidArgument, Problem, Reason
from dualtrace.runs.kept import read_record, record_to_text, write_record
from tests.support.stored import make_full_record, make_record


def refusal(document: Any) -> Problem:
    with pytest.raises(InvalidArgument) as caught:
        read_record(json.dumps(document))
    return caught.value


@pytest.mark.parametrize("record", [make_record(), make_full_record()], ids=["sparse", "full"])
def test_reading_and_writing_again_changes_nothing(record: Any) -> None:
    text = record_to_text(record)
    assert record_to_text(read_record(text)) == text


def test_every_field_comes_back() -> None:
    record = make_full_record()
    back = read_record(record_to_text(record))
    plain = [name for name in record.__dataclass_fields__ if name not in {"run", "token_debug"}]
    assert [getattr(back, name) for name in plain] == [getattr(record, name) for name in plain]


def test_the_runs_inside_come_back() -> None:
    record = make_full_record()
    back = read_record(record_to_text(record))
    assert back.token_debug is not None
    assert record.token_debug is not None
    assert (back.run.entries, back.token_debug.entries) == (record.run.entries, record.token_debug.entries)


def test_a_record_is_one_line_of_ascii() -> None:
    text = record_to_text(make_record(text="naïve \ud83d\nline"))
    assert text.isascii()
    assert "\n" not in text


def test_a_run_document_is_no_record() -> None:
    assert refusal(write_record(make_record())["run"]).detail.field == "kind"


def test_an_unknown_major_version_is_refused() -> None:
    problem = refusal({**write_record(make_record()), "score_debug_schema_version": "2.0"})
    assert problem.reason is Reason.SCHEMA_VERSION


def test_an_unknown_field_is_refused() -> None:
    assert refusal({**write_record(make_record()), "extra": 1}).reason is Reason.UNKNOWN_FIELD


def test_an_unknown_field_of_a_later_minor_version_is_left() -> None:
    record = make_record()
    later = {**write_record(record), "score_debug_schema_version": "1.7", "extra": 1}
    assert read_record(json.dumps(later)).run_id == record.run_id


@pytest.mark.parametrize("name", ["run", "token_debug", "benchmark", "run_id"])
def test_a_missing_field_is_named(name: str) -> None:
    document = write_record(make_record())
    del document[name]
    assert refusal(document).detail.field == name


def test_a_token_debug_that_was_changed_is_named() -> None:
    document = write_record(make_full_record())
    document["token_debug"]["identity"] = "sha256:0"
    assert refusal(document).detail.field == "token_debug.identity"
