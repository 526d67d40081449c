"""What is kept: runs, comparisons, cases, jobs and the backends that answer, as plain values.

The coordinator stores them, the client and the command line show them, files in a repository spell cases. It must not
know how any of that is done.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from dualtrace.card import Card
from dualtrace.compare.gates import DEFAULT_GATES, GatePolicy
from dualtrace.compare.report import CompareReport, Verdict
from dualtrace.compare.tolerance import Tolerance
from dualtrace.problems import InvalidArgument, Reason
from dualtrace.questions.asked import Variant
from dualtrace.runs.run import AskedQuestion, Run, StoredProblem

T = TypeVar("T")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Names of backends, cases and tags: safe in a URL, a file name and a shell."""


def check_name(name: str, field: str) -> str:
    if NAME.fullmatch(name) is None:
        message = f"{name!r:.120} is no name; use 1 to 100 letters, digits, dots, dashes and underscores"
        raise InvalidArgument(Reason.MALFORMED, message, field=field, allowed=NAME.pattern)
    return name


@dataclass(frozen=True)
class Page(Generic[T]):
    entries: tuple[T, ...]
    next_page_token: str  # "": this was the last page


@dataclass(frozen=True)
class SideSpec:
    """Who answers a side, by the one grammar of targets, and under which face and mask.

    A coordinator takes `backend:NAME` and `run:ID` alone: it opens no address and no folder that a caller names.
    """

    target: str
    variant: Variant = Variant()  # noqa: RUF009 - frozen


# Backends


@dataclass(frozen=True)
class Replica:
    address: str
    serving: bool
    problem: str  # why it does not serve; "" when it does or was never reached


@dataclass(frozen=True)
class Backend:
    """Replicas of one model behind one name."""

    name: str
    replicas: tuple[Replica, ...]
    card: Card | None  # None until a replica has described itself
    synthetic: bool = False  # the fake engine stands behind it
    problem: str = ""  # why it must not be used: replicas that differ in provenance

    @property
    def healthy(self) -> bool:
        return not self.problem and any(replica.serving for replica in self.replicas)


# Runs and comparisons


class RunMode(StrEnum):
    SCORE = "SCORE"
    BENCHMARK = "BENCHMARK"


class Fallback(StrEnum):
    """What may stand in for a backend, in benchmark mode alone."""

    NONE = "NONE"  # real backends only; a missing one is an error
    AUTO = "AUTO"  # real, else the fake engine, marked synthetic
    MOCK = "MOCK"  # the fake engine
    BENCH = "BENCH"  # a local timing harness: no model, no scorer, only the coordinator's own cost


@dataclass(frozen=True)
class BenchmarkPlan:
    repeats: int = 20
    warm_up: int = 3  # calls before the repeats, timed apart
    concurrency: int = 1
    fallback: Fallback = Fallback.NONE


@dataclass(frozen=True)
class BenchmarkFigures:
    """Of the repeats alone; the warm-up stands apart. Latencies in milliseconds, in the order the calls ended."""

    source: str  # "real", "mock" or "bench"
    concurrency: int
    warm_up_ms: tuple[float, ...]
    latencies_ms: tuple[float, ...]
    failures: int
    first_failure: StoredProblem | None
    p50_ms: float | None  # None when every call failed
    p95_ms: float | None
    p99_ms: float | None
    failure_rate: float
    calls_per_second: float
    tokens_per_second: float


@dataclass(frozen=True)
class RunPlan:
    """A run that is asked for: one side's answer, to be stored."""

    question: AskedQuestion
    side: SideSpec
    mode: RunMode = RunMode.SCORE
    token_debug: bool = False  # of a Score question: score the items' own tokens too
    benchmark: BenchmarkPlan | None = None  # set if and only if mode is BENCHMARK
    timeout_seconds: float | None = None  # of one call; None: the coordinator's own limit


@dataclass(frozen=True)
class RunRecord:
    """A stored run. Immutable."""

    run_id: str
    mode: RunMode
    target: str
    run: Run
    token_debug: Run | None  # the items' own tokens, where asked
    benchmark: BenchmarkFigures | None
    config_hash: str  # "sha256:..." over mode, options and provenance digest
    input_hash: str  # over the question without its variants
    mask_hash: str  # digest of the mask; "" without one
    mask_shape: str  # as MaskMetadata.shape; "" without one
    mrr: float | None
    rank1_share: float | None
    raw_request_ref: str  # digests of artifacts: the very bytes that were sent and received
    raw_response_ref: str
    synthetic: bool


@dataclass(frozen=True)
class RunSummary:
    run_id: str
    created: str
    mode: RunMode
    target: str
    model_id: str
    framework: str
    question_kind: str
    identity: str
    complete: bool
    synthetic: bool


@dataclass(frozen=True)
class ComparePlan:
    """A comparison that is asked for."""

    question: AskedQuestion | None  # None: a side's stored run says it, the left one's first
    left: SideSpec
    right: SideSpec
    tolerance: Tolerance | None = None  # None: the profile of the two cards
    policy: GatePolicy = DEFAULT_GATES
    debug_token_limit: int | None = None  # tokens a side kept in the report; None: 4096, or what is allowed if less
    store: bool = True  # keep both runs and the report
    timeout_seconds: float | None = None
    case: str = ""  # the saved case that this is a run of


@dataclass(frozen=True)
class ComparisonRecord:
    """A stored comparison: two runs and a report. Immutable."""

    comparison_id: str
    left_run_id: str  # "" when the side failed before anything came
    right_run_id: str
    case: str
    report: CompareReport


@dataclass(frozen=True)
class ComparisonSummary:
    comparison_id: str
    created: str
    left: str
    right: str
    question_kind: str
    verdict: Verdict
    case: str
    first_divergence_index: int | None
    max_token_abs_diff: float | None


# Cases


@dataclass(frozen=True)
class Case:
    """A saved parity test."""

    name: str
    question: AskedQuestion
    left: SideSpec
    right: SideSpec
    tolerance: Tolerance | None = None
    policy: GatePolicy = DEFAULT_GATES
    tags: tuple[str, ...] = ()
    description: str = ""
    revision: int = 0  # given by the store; 0 for a case that is only written down

    def __post_init__(self) -> None:
        check_name(self.name, "name")
        for index, tag in enumerate(self.tags):
            check_name(tag, f"tags[{index}]")
        if len(set(self.tags)) != len(self.tags):
            raise InvalidArgument(Reason.DUPLICATE, f"case {self.name} has a tag twice", field="tags")


# Jobs


class JobState(StrEnum):
    WAITING = "WAITING"
    RUNNING = "RUNNING"
    DONE = "DONE"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def is_end(self) -> bool:
        return self in {JobState.DONE, JobState.FAILED, JobState.CANCELLED}


@dataclass(frozen=True)
class Job:
    """Long work. It yields a run or a comparison."""

    job_id: str
    request_id: str
    state: JobState
    last_sequence: int  # of its last event
    run_id: str | None = None
    comparison_id: str | None = None
    problem: StoredProblem | None = None  # set when FAILED


@dataclass(frozen=True)
class JobEvent:
    """One step of a job, numbered 1, 2, 3, ... without gaps."""

    sequence: int
    job: Job  # as it stood then
    message: str  # for people: "512 of 4096 tokens on both sides"
    done: int  # progress in `unit`; 0 when unknown
    total: int
    unit: str  # "tokens", "calls", ""
