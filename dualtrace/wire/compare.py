"""compare.proto, what is asked: questions, sides, tolerances, gates, plans of comparisons and runs; both ways."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from google.protobuf.message import Message

from dualtrace.card import QuestionKind
from dualtrace.compare.gates import DEFAULT_GATES, GatePolicy
from dualtrace.compare.tolerance import PROFILES, Tolerance, request_tolerance
from dualtrace.library import BenchmarkPlan, ComparePlan, Fallback, RunMode, RunPlan, SideSpec, check_name
from dualtrace.problems import InvalidArgument, Problem, Reason
from dualtrace.questions.answers import TokenizeAnswer
from dualtrace.questions.asked import (
    PLAIN,
    LogprobQuestion,
    MaskedForwardQuestion,
    NextTokenQuestion,
    RollingQuestion,
    ScoreQuestion,
    Variant,
)
from dualtrace.runs.run import AskedQuestion
from dualtrace.v1 import compare_pb2 as pb
from dualtrace.v1 import model_pb2, scoring_pb2
from dualtrace.wire import answers, questions
from dualtrace.wire.strict import refuse_unknown

REQUEST_TOLERANCE = "request"
MAX_DEBUG_TOKENS = 1 << 20
MAX_REPEATS = 10_000_000  # the most that `max_benchmark_calls` can allow; a coordinator's own number is its to say
MAX_TOLERANCE_NAME, MAX_TOLERANCE_SOURCE = 100, 1000  # characters
BACKEND, RUN = "backend:", "run:"


def need(message: Message, name: str, field: str) -> None:
    if not message.HasField(name):
        raise InvalidArgument(Reason.MISSING, f"{name} is not set", field=field)


def check_id(text: str, field: str) -> str:
    """Ids are ours: anything that cannot be one is refused before it is looked for."""
    if not text:
        raise InvalidArgument(Reason.MISSING, f"{field.rpartition('.')[2]} is empty", field=field)
    return check_name(text, field)


# Questions


def ask_to_pb(question: AskedQuestion) -> pb.Ask:
    if isinstance(question, LogprobQuestion | RollingQuestion | NextTokenQuestion | ScoreQuestion):
        _refuse_variants(question.variants not in (PLAIN, ()), "question")
    match question:
        case LogprobQuestion():
            return pb.Ask(logprob=questions.logprob_to_pb(question))
        case RollingQuestion():
            return pb.Ask(rolling=questions.rolling_to_pb(question))
        case NextTokenQuestion():
            return pb.Ask(next_token=questions.next_token_to_pb(question))
        case ScoreQuestion():
            return pb.Ask(score=questions.score_to_pb(question))
        case MaskedForwardQuestion():
            _refuse_variants(question.variants not in (PLAIN, ()), "question")
            message = questions.masked_forward_to_pb(question)
            message.ClearField("variants")  # here alone an empty list is none of its own
            return pb.Ask(masked_forward=message)
    text = f"{question.kind.value} gives nothing that could be compared; ask one of {_names_of_questions()}"
    raise InvalidArgument(Reason.CONFLICT, text, field="question", allowed=_names_of_questions())


def ask_from_pb(message: pb.Ask, field: str) -> AskedQuestion:
    kind = message.WhichOneof("question")
    if kind is None:
        text = f"no question is set; set one of {_names_of_questions()}"
        raise InvalidArgument(Reason.MISSING, text, field=field, allowed=_names_of_questions())
    asked = getattr(message, kind)
    _refuse_variants(bool(asked.variants), f"{field}.{kind}.variants")
    try:
        return _question(message, kind)
    except Problem as problem:
        raise problem.at(under=f"{field}.{kind}") from None


def _question(message: pb.Ask, kind: str) -> AskedQuestion:
    match kind:
        case "logprob":
            return questions.logprob_from_pb(message.logprob)
        case "rolling":
            return questions.rolling_from_pb(message.rolling)
        case "next_token":
            return questions.next_token_from_pb(message.next_token)
        case "score":
            return questions.score_from_pb(message.score)
        case _:
            plain = scoring_pb2.MaskedForwardRequest()
            plain.CopyFrom(message.masked_forward)
            plain.variants.add()
            return questions.masked_forward_from_pb(plain)


def _names_of_questions() -> str:
    return ", ".join(entry.name for entry in pb.Ask.DESCRIPTOR.oneofs_by_name["question"].fields)


def _refuse_variants(given: bool, field: str) -> None:
    if given:
        text = "the question has variants of its own; in a comparison each side names its view and mask"
        raise InvalidArgument(Reason.CONFLICT, text, field=field)


def question_kind_to_pb(name: str) -> model_pb2.Question.ValueType:
    return model_pb2.Question.Value(f"QUESTION_{name}")


def question_kind_from_pb(number: model_pb2.Question.ValueType) -> str:
    known = {model_pb2.Question.Value(f"QUESTION_{kind.value}"): kind.value for kind in QuestionKind}
    return known.get(number, "")


# Sides


def side_to_pb(spec: SideSpec) -> pb.Side:
    variant = None if spec.variant == Variant() else questions.variant_to_pb(spec.variant)
    if spec.target.startswith(BACKEND):
        return pb.Side(backend=spec.target.removeprefix(BACKEND), variant=variant)
    if spec.target.startswith(RUN):
        return pb.Side(run_id=spec.target.removeprefix(RUN), variant=variant)
    text = f"side {spec.target!r:.120} asked of a coordinator, which knows backends and stored runs by name alone"
    raise InvalidArgument(Reason.MALFORMED, text, field="target", allowed="backend:NAME, run:ID")


def side_from_pb(message: pb.Side, field: str) -> SideSpec:
    match message.WhichOneof("source"):
        case "backend":
            target = BACKEND + check_id(message.backend, f"{field}.backend")
        case "run_id":
            target = RUN + check_id(message.run_id, f"{field}.run_id")
        case _:
            text = "the side is neither a backend nor a stored run"
            raise InvalidArgument(Reason.MISSING, text, field=field, allowed="backend, run_id")
    if not message.HasField("variant"):
        return SideSpec(target)
    return SideSpec(target, questions.variant_from_pb(message.variant, f"{field}.variant"))


# Tolerance and gates


def tolerance_to_pb(tolerance: Tolerance) -> pb.Tolerance:
    return pb.Tolerance(
        abs_epsilon=tolerance.abs_epsilon,
        rel_epsilon=tolerance.rel_epsilon,
        name=tolerance.name,
        source=tolerance.source,
    )


def tolerance_from_pb(message: pb.Tolerance) -> Tolerance:
    """As told by a server: it chose the numbers and says where they come from."""
    return Tolerance(message.name, message.abs_epsilon, message.rel_epsilon, message.source)


def tolerance_from_request(message: pb.Tolerance, field: str) -> Tolerance:
    """As asked: numbers of the caller's own, under a name of theirs, or a profile, whose numbers cannot be bent."""
    given = (message.abs_epsilon, message.rel_epsilon)
    known = {profile.tolerance.name: profile.tolerance for profile in PROFILES}
    if message.name in known:
        return _take_profile(known[message.name], given, field)
    if message.name not in {"", REQUEST_TOLERANCE} and given == (0.0, 0.0):
        allowed = ", ".join(known)
        text = f"tolerance {message.name!r:.120} asked, which is no profile; send its numbers, or ask one of {allowed}"
        raise InvalidArgument(Reason.NOT_FOUND, text, field=f"{field}.name", allowed=allowed)
    for name, most in (("name", MAX_TOLERANCE_NAME), ("source", MAX_TOLERANCE_SOURCE)):
        if len(getattr(message, name)) > most:
            text = f"{name} has {len(getattr(message, name))} characters; at most {most}"
            raise InvalidArgument(Reason.OUT_OF_RANGE, text, field=f"{field}.{name}", allowed=f"0-{most}")
    try:
        own = request_tolerance(*given)
    except Problem as problem:
        raise problem.at(under=field) from None
    return replace(own, name=message.name or own.name, source=message.source or own.source)


def _take_profile(profile: Tolerance, given: tuple[float, float], field: str) -> Tolerance:
    own = (profile.abs_epsilon, profile.rel_epsilon)
    if given not in {own, (0.0, 0.0)}:
        text = (
            f"profile {profile.name} stands for {own[0]:g} / {own[1]:g}, and {given[0]:g} / {given[1]:g} were sent; "
            "leave the numbers out, or give the tolerance a name of its own"
        )
        raise InvalidArgument(Reason.CONFLICT, text, field=field)
    return profile


def gates_to_pb(policy: GatePolicy) -> pb.GatePolicy | None:
    if policy == DEFAULT_GATES:
        return None
    return pb.GatePolicy(
        max_token_mismatches=policy.max_token_mismatches,
        score_max_abs_diff=policy.score_max_abs_diff,
        score_mean_abs_diff=policy.score_mean_abs_diff,
        p95_latency_ratio=policy.p95_latency_ratio,
        min_latency_samples=policy.min_latency_samples,
        latency_required=policy.latency_required,
        max_failure_rate=policy.max_failure_rate,
    )


def gates_from_pb(message: pb.GatePolicy, field: str) -> GatePolicy:
    given: dict[str, Any] = {
        entry.name: getattr(message, entry.name)
        for entry in pb.GatePolicy.DESCRIPTOR.fields
        if message.HasField(entry.name)  # type: ignore[arg-type]  # any field's name
    }
    for name, value in given.items():
        _check_threshold(value, 1.0 if name == "max_failure_rate" else None, f"{field}.{name}")
    return GatePolicy(**given)


def _check_threshold(value: float, most: float | None, field: str) -> None:
    allowed = "0 or more" if most is None else f"0-{most:g}"
    if not math.isfinite(value):
        raise InvalidArgument(Reason.NOT_FINITE, f"{value} asked; a threshold is a finite number", field=field)
    if value < 0 or (most is not None and value > most):
        raise InvalidArgument(Reason.OUT_OF_RANGE, f"{value:g} asked; {allowed}", field=field, allowed=allowed)


# Plans


def compare_plan_to_pb(plan: ComparePlan) -> pb.CompareRequest:
    if plan.case:
        text = "only the coordinator says that a comparison is a run of a case; start it with run_case"
        raise InvalidArgument(Reason.CONFLICT, text, field="case")
    return pb.CompareRequest(
        ask=None if plan.question is None else ask_to_pb(plan.question),
        left=side_to_pb(plan.left),
        right=side_to_pb(plan.right),
        tolerance=None if plan.tolerance is None else tolerance_to_pb(plan.tolerance),
        gates=gates_to_pb(plan.policy),
        debug_token_limit=plan.debug_token_limit,
        discard=not plan.store,
        timeout_seconds=plan.timeout_seconds,
    )


def compare_plan_from_pb(message: pb.CompareRequest, field: str = "") -> ComparePlan:
    refuse_unknown(message, field)
    prefix = f"{field}." if field else ""
    for side in ("left", "right"):
        need(message, side, prefix + side)
    left, right = (side_from_pb(getattr(message, side), f"{prefix}{side}") for side in ("left", "right"))
    if not message.HasField("ask") and not any(side.target.startswith(RUN) for side in (left, right)):
        text = "no question is set, and neither side is a stored run that could say it"
        raise InvalidArgument(Reason.MISSING, text, field=f"{prefix}ask")
    limit = None
    if message.HasField("debug_token_limit"):
        limit = message.debug_token_limit
        _check_count(limit, 0, MAX_DEBUG_TOKENS, f"{prefix}debug_token_limit")
    return ComparePlan(
        question=ask_from_pb(message.ask, f"{prefix}ask") if message.HasField("ask") else None,
        left=left,
        right=right,
        tolerance=_asked_tolerance(message, prefix),
        policy=gates_from_pb(message.gates, f"{prefix}gates") if message.HasField("gates") else DEFAULT_GATES,
        debug_token_limit=limit,
        store=not message.discard,
        timeout_seconds=_asked_seconds(message, prefix),
    )


def _asked_seconds(message: Any, prefix: str) -> float | None:
    if not message.HasField("timeout_seconds"):
        return None
    seconds: float = message.timeout_seconds
    if not 0 < seconds < math.inf:  # NaN too
        text = f"timeout_seconds {seconds} asked; it must be a finite number above 0"
        raise InvalidArgument(Reason.OUT_OF_RANGE, text, field=f"{prefix}timeout_seconds", allowed="> 0")
    return seconds


def _asked_tolerance(message: Any, prefix: str) -> Tolerance | None:
    if not message.HasField("tolerance"):
        return None
    return tolerance_from_request(message.tolerance, f"{prefix}tolerance")


def _check_count(value: int, low: int, high: int, field: str) -> None:
    if not low <= value <= high:
        text = f"{field.rpartition('.')[2]} {value} asked; {low} to {high} is allowed"
        raise InvalidArgument(Reason.OUT_OF_RANGE, text, field=field, allowed=f"{low}-{high}")


def run_plan_to_pb(plan: RunPlan) -> pb.RunRequest:
    benchmark = plan.benchmark
    return pb.RunRequest(
        ask=ask_to_pb(plan.question),
        side=side_to_pb(plan.side),
        mode=pb.RunMode.Value(f"RUN_MODE_{plan.mode}"),
        token_debug=plan.token_debug,
        timeout_seconds=plan.timeout_seconds,
        benchmark=None
        if benchmark is None
        else pb.BenchmarkOptions(
            repeats=benchmark.repeats,
            warm_up=benchmark.warm_up,
            concurrency=benchmark.concurrency,
            fallback=pb.Fallback.Value(f"FALLBACK_{benchmark.fallback}"),
        ),
    )


def run_plan_from_pb(message: pb.RunRequest, field: str) -> RunPlan:
    refuse_unknown(message, field)
    for name in ("ask", "side"):
        need(message, name, f"{field}.{name}")
    if message.mode == pb.RUN_MODE_UNSPECIFIED:
        raise InvalidArgument(Reason.MISSING, "mode is not set", field=f"{field}.mode", allowed="SCORE, BENCHMARK")
    mode = RunMode(pb.RunMode.Name(message.mode).removeprefix("RUN_MODE_"))
    side = side_from_pb(message.side, f"{field}.side")
    if side.target.startswith(RUN):
        text = "a stored run is not asked again; name a backend"
        raise InvalidArgument(Reason.CONFLICT, text, field=f"{field}.side")
    if message.HasField("benchmark") != (mode is RunMode.BENCHMARK):
        text = "benchmark options are set if and only if the mode is BENCHMARK"
        raise InvalidArgument(Reason.CONFLICT, text, field=f"{field}.benchmark")
    question = ask_from_pb(message.ask, f"{field}.ask")
    if message.token_debug and not isinstance(question, ScoreQuestion):
        text = "token_debug scores the items of a Score question; this question has none"
        raise InvalidArgument(Reason.CONFLICT, text, field=f"{field}.token_debug")
    benchmark = _benchmark(message.benchmark, f"{field}.benchmark") if message.HasField("benchmark") else None
    return RunPlan(question, side, mode, message.token_debug, benchmark, _asked_seconds(message, f"{field}."))


def _benchmark(message: pb.BenchmarkOptions, field: str) -> BenchmarkPlan:
    given: dict[str, Any] = {}
    for name, low, high in (("repeats", 1, MAX_REPEATS), ("warm_up", 0, MAX_REPEATS), ("concurrency", 1, 256)):
        if message.HasField(name):  # type: ignore[arg-type]  # one of its fields' names
            given[name] = getattr(message, name)
            _check_count(given[name], low, high, f"{field}.{name}")
    if message.HasField("fallback"):
        given["fallback"] = Fallback(pb.Fallback.Name(message.fallback).removeprefix("FALLBACK_"))
    return BenchmarkPlan(**given)


# Texts of a backend


def texts_to_pb(backend: str, texts: Sequence[str]) -> pb.TokenizeTextsRequest:
    return pb.TokenizeTextsRequest(backend=backend, texts=texts)


def texts_from_pb(message: pb.TokenizeTextsRequest) -> tuple[str, tuple[str, ...]]:
    refuse_unknown(message)
    return check_id(message.backend, "backend"), tuple(message.texts)


def tokens_to_pb(answer: TokenizeAnswer) -> pb.TokenizeTextsResponse:
    return pb.TokenizeTextsResponse(results=answers.tokenize_to_pb(answer).results)


def tokens_from_pb(message: pb.TokenizeTextsResponse) -> TokenizeAnswer:
    return answers.tokenize_from_pb(scoring_pb2.TokenizeResponse(results=message.results))
