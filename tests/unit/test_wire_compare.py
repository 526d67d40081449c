"""Comparisons over the wire: what is asked and told arrives, what is absent is the default, what is odd is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings

from dualtrace.compare.gates import DEFAULT_GATES, GatePolicy
from dualtrace.compare.report import Verdict
from dualtrace.compare.tolerance import PROFILES, Tolerance
from dualtrace.library import BenchmarkPlan, ComparePlan, Fallback, RunMode, RunPlan, SideSpec
from dualtrace.problems import Internal, Problem, Reason
from dualtrace.questions.asked import Input, RollingQuestion, ScoreQuestion, TokenizeQuestion, Variant
from dualtrace.v1 import compare_pb2 as pb
from dualtrace.v1 import model_pb2, scoring_pb2, token_pb2
from dualtrace.views import finetuned
from dualtrace.wire import compare as wire
from dualtrace.wire import compare_events, jobs
from tests.support import compare_strategies as known
from tests.support.strategies import same
from tests.support.wired import FUTURE, over_the_wire, refused

FEW = settings(max_examples=60)
TEXT = RollingQuestion((Input(text="one two"),))
PLAN = ComparePlan(TEXT, SideSpec("backend:torch"), SideSpec("backend:jax"))


@FEW
@given(known.ASKED)
def test_a_question_arrives_as_it_was_asked(question: Any) -> None:
    assert same(wire.ask_from_pb(over_the_wire(wire.ask_to_pb(question)), "ask"), question)


@FEW
@given(known.COMPARE_PLANS)
def test_a_plan_arrives_as_it_was_sent(plan: ComparePlan) -> None:
    assert same(wire.compare_plan_from_pb(over_the_wire(wire.compare_plan_to_pb(plan))), plan)


@FEW
@given(known.run_plans())
def test_a_run_arrives_as_it_was_sent(plan: RunPlan) -> None:
    assert same(wire.run_plan_from_pb(over_the_wire(wire.run_plan_to_pb(plan)), "run"), plan)


@FEW
@given(known.COMPARE_EVENTS)
def test_an_event_arrives_as_it_was_told(event: Any) -> None:
    assert same(compare_events.told_from_pb(over_the_wire(compare_events.told_to_pb(event, 7))), event)


@FEW
@given(known.JOBS)
def test_a_job_arrives_as_it_stands(job: Any) -> None:
    assert jobs.job_from_pb(over_the_wire(jobs.job_to_pb(job))) == job


@FEW
@given(known.JOB_EVENTS)
def test_a_job_event_arrives_as_it_was_told(event: Any) -> None:
    assert jobs.job_event_from_pb(over_the_wire(jobs.job_event_to_pb(event))) == event


@pytest.mark.parametrize(
    "work",
    [PLAN, RunPlan(TEXT, SideSpec("backend:torch")), "smoke"],
    ids=["compare", "run", "case"],
)
def test_work_arrives_as_it_was_sent(work: Any) -> None:
    request_id, arrived = jobs.start_from_pb(over_the_wire(jobs.start_to_pb("night-1", work)))
    assert (request_id, same(arrived, work)) == ("night-1", True)


@FEW
@given(known.token_pairs(most=40))
def test_pairs_that_were_cut_are_the_same_pairs(pairs: Any) -> None:
    parts = list(compare_events.cut_pairs(pairs, 7))
    joined = replace(
        pairs,
        **{
            name: None if getattr(pairs, name) is None else sum((getattr(part, name) for part in parts), ())
            for name in (
                "token_ids", "pieces", "statuses", "left_logprobs", "right_logprobs", "left_ranks", "right_ranks",
            )
        },
    )  # fmt: skip
    assert same(joined, pairs)


@FEW
@given(known.token_pairs(most=40))
def test_pairs_that_were_cut_say_where_they_stand(pairs: Any) -> None:
    starts = [part.first_index - pairs.first_index for part in compare_events.cut_pairs(pairs, 7)]
    assert starts == list(range(0, len(pairs.token_ids), 7))


def test_a_report_is_cut_into_parts_that_join_to_it() -> None:
    text = "x" * (compare_events.REPORT_PART_BYTES + 5)
    parts = list(compare_events.cut_report(text))
    assert ([len(part) for part in parts], b"".join(parts).decode()) == ([1 << 20, 5], text)


def test_how_a_comparison_ended_arrives() -> None:
    done = compare_events.CompareDone("1.0", Verdict.FAIL, ("token parity",), "cmp-1", "sha256:0")
    assert compare_events.told_from_pb(over_the_wire(compare_events.told_to_pb(done, 3))) == done


def test_an_event_of_a_newer_server_is_left_out() -> None:
    assert compare_events.told_from_pb(pb.CompareResponse.FromString(FUTURE)) is None


def test_columns_of_different_lengths_are_refused() -> None:
    message = pb.CompareResponse(pairs=pb.TokenPairs(statuses=[pb.TOKEN_STATUS_MATCH], token_ids=[1, 2]))
    with pytest.raises(Internal):
        compare_events.told_from_pb(message)


def test_what_is_absent_is_the_default() -> None:
    message = pb.CompareRequest(
        ask=pb.Ask(rolling=scoring_pb2.RollingLogprobRequest(inputs=[token_pb2.Input(text="one two")])),
        left=pb.Side(backend="torch"),
        right=pb.Side(backend="jax"),
    )
    assert same(wire.compare_plan_from_pb(message), PLAN)


def test_a_gate_that_is_absent_keeps_its_default_beside_one_that_is_set() -> None:
    assert wire.gates_from_pb(pb.GatePolicy(max_token_mismatches=3), "gates") == GatePolicy(max_token_mismatches=3)


def test_a_zero_that_is_set_is_not_an_absent_gate() -> None:
    assert wire.gates_from_pb(pb.GatePolicy(score_max_abs_diff=0.0), "gates").score_max_abs_diff == 0.0


def test_default_gates_are_not_sent() -> None:
    assert wire.gates_to_pb(DEFAULT_GATES) is None


def test_a_benchmark_option_that_is_absent_is_its_default() -> None:
    message = pb.RunRequest(
        ask=wire.ask_to_pb(TEXT), side=pb.Side(backend="a"), mode=pb.RUN_MODE_BENCHMARK, benchmark=pb.BenchmarkOptions()
    )
    assert wire.run_plan_from_pb(message, "run").benchmark == BenchmarkPlan()


def asked(**changes: Any) -> pb.CompareRequest:
    message = wire.compare_plan_to_pb(PLAN)
    for name, value in changes.items():
        message.ClearField(name)  # type: ignore[arg-type]
        if value is not None:
            getattr(message, name).CopyFrom(value)
    return message


def with_future(message: Message) -> Any:
    return type(message).FromString(message.SerializeToString() + FUTURE)


def limited_to(seconds: float) -> pb.CompareRequest:
    message = asked()
    message.timeout_seconds = seconds
    return message


VARIED = wire.ask_to_pb(TEXT)
VARIED.rolling.variants.add()
REFUSED = {
    "no left side": (asked(left=None), Reason.MISSING, "left"),
    "no right side": (asked(right=None), Reason.MISSING, "right"),
    "no question of two backends": (asked(ask=None), Reason.MISSING, "ask"),
    "an empty question": (asked(ask=pb.Ask()), Reason.MISSING, "ask"),
    "an input that is not set": (
        asked(ask=pb.Ask(rolling=scoring_pb2.RollingLogprobRequest(inputs=[token_pb2.Input()]))),
        Reason.MISSING,
        "ask.rolling.inputs[0]",
    ),
    "a question with variants": (asked(ask=VARIED), Reason.CONFLICT, "ask.rolling.variants"),
    "a side that is nothing": (asked(left=pb.Side()), Reason.MISSING, "left"),
    "a backend without a name": (asked(left=pb.Side(backend="")), Reason.MISSING, "left.backend"),
    "a backend's name that is an address": (asked(left=pb.Side(backend="a:1/..")), Reason.MALFORMED, "left.backend"),
    "a run id that is too long": (asked(right=pb.Side(run_id="r" * 101)), Reason.MALFORMED, "right.run_id"),
    "a field of a later version, deep": (
        asked(left=pb.Side(backend="a", variant=with_future(scoring_pb2.Variant()))),
        Reason.UNKNOWN_FIELD,
        "left.variant.<1007>",
    ),
    "a tolerance below 0": (
        asked(tolerance=pb.Tolerance(abs_epsilon=-1)), Reason.OUT_OF_RANGE, "tolerance.abs_epsilon",
    ),
    "a tolerance that is no number": (
        asked(tolerance=pb.Tolerance(rel_epsilon=float("nan"))), Reason.NOT_FINITE, "tolerance.rel_epsilon",
    ),
    "a tolerance without end": (
        asked(tolerance=pb.Tolerance(abs_epsilon=float("inf"))), Reason.NOT_FINITE, "tolerance.abs_epsilon",
    ),
    "a tolerance's name without end": (
        asked(tolerance=pb.Tolerance(abs_epsilon=1, name="a" * 101)), Reason.OUT_OF_RANGE, "tolerance.name",
    ),
    "no time at all": (limited_to(0.0), Reason.OUT_OF_RANGE, "timeout_seconds"),
    "endless time": (limited_to(float("inf")), Reason.OUT_OF_RANGE, "timeout_seconds"),
    "time that is no number": (limited_to(float("nan")), Reason.OUT_OF_RANGE, "timeout_seconds"),
    "a profile that nobody entered": (asked(tolerance=pb.Tolerance(name="loose")), Reason.NOT_FOUND, "tolerance.name"),
    "a profile with bent numbers": (
        asked(tolerance=pb.Tolerance(name=PROFILES[0].tolerance.name, abs_epsilon=0.3)), Reason.CONFLICT, "tolerance",
    ),
    "a negative gate": (
        asked(gates=pb.GatePolicy(max_token_mismatches=-1)), Reason.OUT_OF_RANGE, "gates.max_token_mismatches",
    ),
    "a gate that is no number": (
        asked(gates=pb.GatePolicy(score_max_abs_diff=float("nan"))), Reason.NOT_FINITE, "gates.score_max_abs_diff",
    ),
    "a share above 1": (asked(gates=pb.GatePolicy(max_failure_rate=2)), Reason.OUT_OF_RANGE, "gates.max_failure_rate"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_is_refused_at_the_field_to_blame(name: str) -> None:
    message, reason, field = REFUSED[name]
    assert refused(wire.compare_plan_from_pb, message) == (reason, field)


def test_a_negative_token_limit_is_refused() -> None:
    message = pb.CompareRequest(left=pb.Side(run_id="r"), right=pb.Side(run_id="s"), debug_token_limit=-1)
    assert refused(wire.compare_plan_from_pb, message) == (Reason.OUT_OF_RANGE, "debug_token_limit")


def test_two_stored_runs_need_no_question() -> None:
    message = pb.CompareRequest(left=pb.Side(run_id="run-1"), right=pb.Side(run_id="run-2"))
    assert wire.compare_plan_from_pb(message).question is None


def test_a_stored_run_on_the_right_can_say_the_question_too() -> None:
    message = pb.CompareRequest(left=pb.Side(backend="torch"), right=pb.Side(run_id="run-2"))
    assert wire.compare_plan_from_pb(message).question is None


def test_a_token_limit_that_is_not_sent_is_left_to_the_coordinator() -> None:
    message = pb.CompareRequest(left=pb.Side(run_id="run-1"), right=pb.Side(run_id="run-2"))
    assert wire.compare_plan_from_pb(message).debug_token_limit is None


def test_a_profile_is_asked_by_its_name_alone() -> None:
    profile = PROFILES[1].tolerance
    assert wire.tolerance_from_request(pb.Tolerance(name=profile.name), "tolerance") == profile


def test_numbers_of_the_caller_keep_the_name_and_source_that_the_caller_gives_them() -> None:
    asked = pb.Tolerance(abs_epsilon=0.5, name="ours", source="measured by us")
    told = wire.tolerance_from_request(asked, "tolerance")
    assert (told.name, told.abs_epsilon, told.source) == ("ours", 0.5, "measured by us")


def test_numbers_without_a_name_are_the_requests() -> None:
    told = wire.tolerance_from_request(pb.Tolerance(abs_epsilon=0.5), "tolerance")
    assert (told.name, told.source) == ("request", "given by the caller")


def test_a_tolerance_told_by_a_server_is_taken_as_told() -> None:
    told = Tolerance("of-later", 0.1, 0.2, "measured in 2031")
    assert wire.tolerance_from_pb(over_the_wire(wire.tolerance_to_pb(told))) == told


@pytest.mark.parametrize("target", ["grpc://host:1", "torch:/models/x", "backend", ""])
def test_a_coordinator_is_sent_no_address_and_no_folder(target: str) -> None:
    assert refused(wire.side_to_pb, SideSpec(target)) == (Reason.MALFORMED, "target")


def test_a_question_with_variants_is_not_sent() -> None:
    question = replace(TEXT, variants=(Variant(finetuned("x")),))
    assert refused(wire.ask_to_pb, question)[0] is Reason.CONFLICT


def test_a_question_that_scores_nothing_is_not_sent() -> None:
    assert refused(wire.ask_to_pb, TokenizeQuestion((Input(text="a"),)))[0] is Reason.CONFLICT


def test_a_plan_that_says_of_which_case_it_is_a_run_is_not_sent() -> None:
    assert refused(wire.compare_plan_to_pb, replace(PLAN, case="smoke")) == (Reason.CONFLICT, "case")


RUN = wire.run_plan_to_pb(RunPlan(TEXT, SideSpec("backend:torch")))


def run_with(**changes: Any) -> pb.RunRequest:
    message = pb.RunRequest()
    message.CopyFrom(RUN)
    message.MergeFrom(pb.RunRequest(**changes))
    return message


BENCHMARK = {"mode": pb.RUN_MODE_BENCHMARK}
REFUSED_RUNS = {
    "no mode": (pb.RunRequest(ask=RUN.ask, side=RUN.side), Reason.MISSING, "run.mode"),
    "no question": (pb.RunRequest(side=RUN.side, mode=pb.RUN_MODE_SCORE), Reason.MISSING, "run.ask"),
    "a stored run": (run_with(side=pb.Side(run_id="run-1")), Reason.CONFLICT, "run.side"),
    "options without a benchmark": (run_with(benchmark=pb.BenchmarkOptions()), Reason.CONFLICT, "run.benchmark"),
    "a benchmark without options": (run_with(**BENCHMARK), Reason.CONFLICT, "run.benchmark"),
    "no repeats": (
        run_with(**BENCHMARK, benchmark=pb.BenchmarkOptions(repeats=0)), Reason.OUT_OF_RANGE, "run.benchmark.repeats",
    ),
    "too many at a time": (
        run_with(**BENCHMARK, benchmark=pb.BenchmarkOptions(concurrency=257)),
        Reason.OUT_OF_RANGE,
        "run.benchmark.concurrency",
    ),
    "a fallback that is set to nothing": (
        run_with(**BENCHMARK, benchmark=pb.BenchmarkOptions(fallback=pb.FALLBACK_UNSPECIFIED)),
        Reason.UNKNOWN_ENUM_VALUE,
        "run.benchmark.fallback",
    ),
    "token debug without items": (run_with(token_debug=True), Reason.CONFLICT, "run.token_debug"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_RUNS)
def test_a_run_is_refused_at_the_field_to_blame(name: str) -> None:
    message, reason, field = REFUSED_RUNS[name]
    assert refused(wire.run_plan_from_pb, message, "run") == (reason, field)


def test_token_debug_of_a_score_question_is_taken() -> None:
    plan = RunPlan(
        ScoreQuestion(Input(text="q"), (Input(text="i"),), labels=(1, 2)), SideSpec("backend:a"), token_debug=True
    )
    assert wire.run_plan_from_pb(wire.run_plan_to_pb(plan), "run").token_debug


def test_every_mode_and_fallback_has_its_number() -> None:
    numbers: list[int] = [pb.RunMode.Value(f"RUN_MODE_{mode}") for mode in RunMode]
    numbers += [pb.Fallback.Value(f"FALLBACK_{fallback}") for fallback in Fallback]
    assert 0 not in numbers


REFUSED_JOBS = {
    "nothing to do": (pb.StartJobRequest(request_id="a"), Reason.MISSING, "work"),
    "no request id": (pb.StartJobRequest(run_case="smoke"), Reason.MISSING, "request_id"),
    "a request id that is no name": (
        pb.StartJobRequest(request_id="a b", run_case="smoke"), Reason.MALFORMED, "request_id",
    ),
    "a request id that is too long": (
        pb.StartJobRequest(request_id="a" * 101, run_case="smoke"), Reason.MALFORMED, "request_id",
    ),
    "a case without a name": (pb.StartJobRequest(request_id="a", run_case=""), Reason.MISSING, "run_case"),
    "a comparison that keeps nothing": (
        pb.StartJobRequest(request_id="a", compare=wire.compare_plan_to_pb(replace(PLAN, store=False))),
        Reason.CONFLICT,
        "compare.discard",
    ),
    "a plan that is wrong inside": (
        pb.StartJobRequest(request_id="a", compare=asked(left=pb.Side())), Reason.MISSING, "compare.left",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_JOBS)
def test_a_job_is_refused_at_the_field_to_blame(name: str) -> None:
    message, reason, field = REFUSED_JOBS[name]
    assert refused(jobs.start_from_pb, message) == (reason, field)


def test_the_time_that_a_side_may_take_crosses_the_wire() -> None:
    limited = replace(PLAN, timeout_seconds=1.5)
    assert wire.compare_plan_from_pb(over_the_wire(wire.compare_plan_to_pb(limited))).timeout_seconds == 1.5


def test_the_time_that_a_call_of_a_run_may_take_crosses_the_wire() -> None:
    _, work = jobs.start_from_pb(
        over_the_wire(jobs.start_to_pb("a", RunPlan(TEXT, SideSpec("backend:a"), timeout_seconds=1.5)))
    )
    assert isinstance(work, RunPlan)
    assert work.timeout_seconds == 1.5


def test_a_negative_sequence_is_refused() -> None:
    message = pb.WatchJobRequest(job_id="job-1", after_sequence=-1)
    assert refused(jobs.watch_from_pb, message) == (Reason.OUT_OF_RANGE, "after_sequence")


def test_a_job_state_of_a_newer_server_is_told_and_not_guessed() -> None:
    with pytest.raises(Problem):
        jobs.job_from_pb(pb.Job(job_id="job-1", state=99))  # type: ignore[arg-type]


@pytest.mark.parametrize("number", model_pb2.Question.values())
def test_a_kind_of_question_keeps_its_name(number: Any) -> None:
    name = wire.question_kind_from_pb(number)
    assert name == "" if number == 0 else wire.question_kind_to_pb(name) == number
