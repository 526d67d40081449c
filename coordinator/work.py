"""The work of a job as it is kept: canonical text, so that the same work is the same text.

It knows plans as values. It must not know how work is done or where its text is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.recording import canonical
from dualtrace.library import ComparePlan, RunPlan, check_name
from dualtrace.problems import Internal, Problem, Reason
from dualtrace.records import from_json, parse_json, to_json


@dataclass(frozen=True)
class CaseRun:
    """A saved case, to be run as it stands when its turn comes."""

    name: str

    def __post_init__(self) -> None:
        check_name(self.name, "case")


Work = ComparePlan | RunPlan | CaseRun

KINDS: dict[str, type[Work]] = {"compare": ComparePlan, "run": RunPlan, "case": CaseRun}


def work_to_text(work: Work) -> str:
    kind = next(name for name, cls in KINDS.items() if isinstance(work, cls))
    return canonical({"kind": kind, "work": to_json(work)})


def read_work(text: str) -> Work:
    """What `work_to_text` wrote; by an older version perhaps, and then it is not guessed at."""
    document = parse_json(text, "the work")
    try:
        return from_json(KINDS[document["kind"]], document["work"])
    except (Problem, KeyError, TypeError) as error:
        message = f"the stored work cannot be read by this version: {error}; start the job again"
        raise Internal(Reason.SCHEMA_VERSION, message) from error
