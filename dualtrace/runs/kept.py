"""The JSON form of a stored run: the run itself, and beside it what the coordinator knows of how it came about.

Versioned like a run, which stands inside as its own document. It knows values. It must not know files or the store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dualtrace.json_text import FloatTexts, dump_json
from dualtrace.library import BenchmarkFigures, RunMode, RunRecord
from dualtrace.problems import InvalidArgument, Reason
from dualtrace.records import from_json, malformed, parse_json, to_json
from dualtrace.runs.run import Run, check_version, read_run_object, write_run

KIND = "dualtrace.run_record"
SCHEMA_VERSION = "1.0"


def write_record(record: RunRecord) -> dict[str, Any]:
    """The record as a JSON object of plain values."""
    head = _Head(**{name: getattr(record, name) for name in _Head.__dataclass_fields__})
    return {
        "kind": KIND,
        "score_debug_schema_version": SCHEMA_VERSION,
        **to_json(head),
        "run": write_run(record.run),
        "token_debug": None if record.token_debug is None else write_run(record.token_debug),
    }


def record_to_text(record: RunRecord, texts: FloatTexts | None = None) -> str:
    """One line of ASCII: safe for every terminal, file and pipe. `texts`: of numbers that other documents hold too."""
    return dump_json(write_record(record), texts)


def read_record(text: str) -> RunRecord:
    """Read a record, checked whole. An unknown major version is refused; a later minor may hold more fields."""
    document = parse_json(text, "the run record")
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise malformed("kind", "not that of a run record", f'an object with "kind": "{KIND}"')
    newer = check_version(document.get("score_debug_schema_version"), SCHEMA_VERSION, "the run record")
    apart = {"kind", "score_debug_schema_version", "run", "token_debug"}
    head = from_json(_Head, {key: value for key, value in document.items() if key not in apart}, newer=newer)
    for name in ("run", "token_debug"):
        if name not in document:
            raise InvalidArgument(Reason.MISSING, f"{name} is missing", field=name)
    debug = document["token_debug"]
    return RunRecord(
        run=read_run_object(document["run"]),
        token_debug=None if debug is None else _read_debug(debug),
        **{name: getattr(head, name) for name in _Head.__dataclass_fields__},
    )


def _read_debug(document: object) -> Run:
    try:
        return read_run_object(document)
    except InvalidArgument as problem:
        raise problem.at(under="token_debug") from None


@dataclass(frozen=True)
class _Head:
    """The fields of RunRecord that are no run."""

    run_id: str
    mode: RunMode
    target: str
    benchmark: BenchmarkFigures | None
    config_hash: str
    input_hash: str
    mask_hash: str
    mask_shape: str
    mrr: float | None
    rank1_share: float | None
    raw_request_ref: str
    raw_response_ref: str
    synthetic: bool
