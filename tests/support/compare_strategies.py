"""Hypothesis strategies for what comparisons ask and tell, and for what a coordinator keeps.

It knows the plain values. It must not know the wire.
"""

from __future__ import annotations

import string
from dataclasses import replace

from hypothesis import strategies as st

from dualtrace.compare.events import (
    CompareHeader,
    FirstDivergence,
    IdMismatch,
    ProvenanceDifference,
    SideFailed,
    TokenPairs,
)
from dualtrace.compare.gates import GatePolicy
from dualtrace.compare.pass_rule import TokenStatus
from dualtrace.compare.report import Verdict
from dualtrace.compare.sides import SideName
from dualtrace.compare.tolerance import PROFILES, request_tolerance
from dualtrace.library import (
    Backend,
    BenchmarkPlan,
    Case,
    ComparePlan,
    ComparisonSummary,
    Fallback,
    Job,
    JobEvent,
    JobState,
    Replica,
    RunMode,
    RunPlan,
    RunSummary,
    SideSpec,
)
from dualtrace.questions.asked import PLAIN, MaskedForwardQuestion, Variant
from dualtrace.runs.run import StoredProblem, store_problem
from dualtrace.views import finetuned, scaled
from tests.support.masked import MASKS
from tests.support.strategies import (
    CARDS,
    COUNTS,
    INPUTS,
    LOGPROB_QUESTIONS,
    LOGPROBS,
    NEXT_TOKEN_QUESTIONS,
    PREFIXES,
    PROBLEMS,
    PROVENANCES,
    ROLLING_QUESTIONS,
    TEXTS,
    score_questions,
)

NAMES = st.text(string.ascii_letters + string.digits, min_size=1, max_size=12)
BIG_COUNTS = st.integers(0, 2**62)
THRESHOLDS = st.floats(0, 1e6)

MASKED_QUESTIONS = st.builds(
    MaskedForwardQuestion,
    input=INPUTS,
    variants=st.just(PLAIN),
    prefix=PREFIXES,
    top_k=COUNTS,
    kl_base_masked=st.booleans(),
    deterministic=st.booleans(),
)
ASKED = (LOGPROB_QUESTIONS | ROLLING_QUESTIONS | NEXT_TOKEN_QUESTIONS | score_questions()).map(
    lambda question: replace(question, variants=PLAIN)
) | MASKED_QUESTIONS

VARIANTS = st.builds(
    Variant,
    view=st.sampled_from([Variant().view, finetuned("tuned"), scaled("tuned", 0.25)]),
    mask=st.none() | st.sampled_from(sorted(MASKS)).map(lambda name: MASKS[name]),
    allow_leak=st.booleans(),
)
BACKEND_SIDES = st.builds(SideSpec, NAMES.map(lambda name: f"backend:{name}"), VARIANTS)
SIDES = BACKEND_SIDES | st.builds(SideSpec, NAMES.map(lambda name: f"run:run-{name}"), VARIANTS)
TOLERANCES = st.sampled_from([profile.tolerance for profile in PROFILES]) | st.builds(
    request_tolerance, THRESHOLDS, THRESHOLDS
)
POLICIES = st.builds(
    GatePolicy,
    max_token_mismatches=COUNTS,
    score_max_abs_diff=THRESHOLDS,
    score_mean_abs_diff=THRESHOLDS,
    p95_latency_ratio=THRESHOLDS,
    min_latency_samples=COUNTS,
    latency_required=st.booleans(),
    max_failure_rate=st.floats(0, 1),
) | st.just(GatePolicy())
COMPARE_PLANS = st.builds(
    ComparePlan,
    question=ASKED,
    left=SIDES,
    right=SIDES,
    tolerance=st.none() | TOLERANCES,
    policy=POLICIES,
    debug_token_limit=st.none() | st.integers(0, 1 << 20),
    store=st.booleans(),
)


@st.composite
def run_plans(draw: st.DrawFn) -> RunPlan:
    mode = draw(st.sampled_from(RunMode))
    debug = draw(st.booleans())
    options = st.builds(
        BenchmarkPlan, st.integers(1, 100), st.integers(0, 9), st.integers(1, 256), st.sampled_from(Fallback)
    )
    return RunPlan(
        question=replace(draw(score_questions()), variants=PLAIN) if debug else draw(ASKED),
        side=draw(BACKEND_SIDES),
        mode=mode,
        token_debug=debug,
        benchmark=draw(options) if mode is RunMode.BENCHMARK else None,
    )


@st.composite
def token_pairs(draw: st.DrawFn, least: int = 1, most: int = 6) -> TokenPairs:
    count = draw(st.integers(least, most))

    def column(values: st.SearchStrategy) -> tuple:  # type: ignore[type-arg]
        return tuple(draw(st.lists(values, min_size=count, max_size=count)))

    ranks = st.none() | st.integers(1, 2**31 - 1)
    return TokenPairs(
        item=draw(COUNTS),
        first_index=draw(st.integers(0, 2**30)),
        token_ids=column(COUNTS),
        pieces=column(st.binary(max_size=4)) if draw(st.booleans()) else None,
        statuses=column(st.sampled_from(TokenStatus)),
        left_logprobs=column(st.none() | LOGPROBS),
        right_logprobs=column(st.none() | LOGPROBS),
        left_ranks=column(ranks),
        right_ranks=column(ranks),
    )


HEADERS = st.builds(
    CompareHeader,
    PROVENANCES,
    PROVENANCES,
    st.lists(st.builds(ProvenanceDifference, TEXTS, TEXTS, TEXTS), max_size=3).map(tuple),
    TOLERANCES,
)
MAYBE_ID, MAYBE_PIECE, MAYBE_LOGPROB = st.none() | COUNTS, st.none() | st.binary(max_size=4), st.none() | LOGPROBS
COMPARE_EVENTS = (
    HEADERS
    | token_pairs()
    | st.builds(FirstDivergence, COUNTS, COUNTS, MAYBE_LOGPROB, MAYBE_LOGPROB)
    | st.builds(IdMismatch, COUNTS, COUNTS, MAYBE_ID, MAYBE_ID, MAYBE_PIECE, MAYBE_PIECE)
    | st.builds(SideFailed, st.sampled_from(SideName), PROBLEMS)
)

STORED_PROBLEMS: st.SearchStrategy[StoredProblem] = PROBLEMS.map(store_problem)
JOBS = st.builds(
    Job,
    job_id=NAMES,
    request_id=NAMES,
    state=st.sampled_from(JobState),
    last_sequence=BIG_COUNTS,
    run_id=st.none() | NAMES,
    comparison_id=st.none() | NAMES,
    problem=st.none() | STORED_PROBLEMS,
)
JOB_EVENTS = st.builds(JobEvent, BIG_COUNTS, JOBS, TEXTS, BIG_COUNTS, BIG_COUNTS, st.sampled_from(["", "tokens"]))

BACKENDS = st.builds(
    Backend,
    name=NAMES,
    replicas=st.lists(st.builds(Replica, TEXTS, st.booleans(), TEXTS), max_size=3).map(tuple),
    card=st.none() | CARDS,
    synthetic=st.booleans(),
    problem=TEXTS,
)
KINDS = st.sampled_from(["LOGPROB", "ROLLING_LOGPROB", "NEXT_TOKEN_DIST", "SCORE", "MASKED_FORWARD"])
RUN_SUMMARIES = st.builds(
    RunSummary, NAMES, TEXTS, st.sampled_from(RunMode), TEXTS, TEXTS, TEXTS, KINDS, TEXTS, st.booleans(), st.booleans()
)
COMPARISON_SUMMARIES = st.builds(
    ComparisonSummary,
    comparison_id=NAMES,
    created=TEXTS,
    left=TEXTS,
    right=TEXTS,
    question_kind=KINDS,
    verdict=st.sampled_from(Verdict),
    case=TEXTS,
    first_divergence_index=st.none() | COUNTS,
    max_token_abs_diff=st.none() | THRESHOLDS,
)
CASES = st.builds(
    Case,
    name=NAMES,
    question=ASKED,
    left=SIDES,
    right=SIDES,
    tolerance=st.none() | TOLERANCES,
    policy=POLICIES,
    tags=st.lists(NAMES, unique=True, max_size=3).map(tuple),
    description=TEXTS,
    revision=BIG_COUNTS,
)
