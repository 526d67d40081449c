"""compare.proto, long work: what a job is to do, how it stands, and its events; both ways."""

from __future__ import annotations

from dualtrace.library import ComparePlan, Job, JobEvent, JobState, RunPlan
from dualtrace.problems import Internal, InvalidArgument, Reason
from dualtrace.runs.run import restore_problem, store_problem
from dualtrace.v1 import compare_pb2 as pb
from dualtrace.wire import problem as problem_wire
from dualtrace.wire.compare import (
    check_id,
    compare_plan_from_pb,
    compare_plan_to_pb,
    run_plan_from_pb,
    run_plan_to_pb,
)
from dualtrace.wire.strict import refuse_unknown

Work = ComparePlan | RunPlan | str
"""What a job does; text is the name of a saved case to run."""


def start_to_pb(request_id: str, work: Work) -> pb.StartJobRequest:
    if isinstance(work, str):
        return pb.StartJobRequest(request_id=request_id, run_case=work)
    if isinstance(work, RunPlan):
        return pb.StartJobRequest(request_id=request_id, run=run_plan_to_pb(work))
    return pb.StartJobRequest(request_id=request_id, compare=compare_plan_to_pb(work))


def start_from_pb(message: pb.StartJobRequest) -> tuple[str, Work]:
    refuse_unknown(message)
    request_id = check_id(message.request_id, "request_id")
    match message.WhichOneof("work"):
        case "compare":
            plan = compare_plan_from_pb(message.compare, "compare")
            if not plan.store:
                text = "a job's result is what it keeps; discard is for a streaming Compare"
                raise InvalidArgument(Reason.CONFLICT, text, field="compare.discard")
            return request_id, plan
        case "run":
            return request_id, run_plan_from_pb(message.run, "run")
        case "run_case":
            return request_id, check_id(message.run_case, "run_case")
        case _:
            text = "the job is given nothing to do"
            raise InvalidArgument(Reason.MISSING, text, field="work", allowed="compare, run, run_case")


def job_to_pb(job: Job) -> pb.Job:
    return pb.Job(
        job_id=job.job_id,
        request_id=job.request_id,
        state=pb.JobState.Value(f"JOB_STATE_{job.state}"),
        last_sequence=job.last_sequence,
        run_id=job.run_id,
        comparison_id=job.comparison_id,
        problem=None if job.problem is None else problem_wire.to_pb(restore_problem(job.problem)),
    )


def job_from_pb(message: pb.Job) -> Job:
    known = {pb.JobState.Value(f"JOB_STATE_{state}"): state for state in JobState}
    if message.state not in known:
        text = f"the coordinator sent job state {message.state}, which this version does not know; update it"
        raise Internal(Reason.UNKNOWN_ENUM_VALUE, text, field="job.state")
    return Job(
        job_id=message.job_id,
        request_id=message.request_id,
        state=known[message.state],
        last_sequence=message.last_sequence,
        run_id=message.run_id if message.HasField("run_id") else None,
        comparison_id=message.comparison_id if message.HasField("comparison_id") else None,
        problem=store_problem(problem_wire.from_pb(message.problem)) if message.HasField("problem") else None,
    )


def watch_from_pb(message: pb.WatchJobRequest) -> tuple[str, int]:
    refuse_unknown(message)
    if message.after_sequence < 0:
        text = f"after_sequence {message.after_sequence} asked; 0 for all events, or the last number that was seen"
        raise InvalidArgument(Reason.OUT_OF_RANGE, text, field="after_sequence", allowed="0 or more")
    return check_id(message.job_id, "job_id"), message.after_sequence


def job_id_from_pb(message: pb.GetJobRequest | pb.CancelJobRequest) -> str:
    refuse_unknown(message)
    return check_id(message.job_id, "job_id")


def job_event_to_pb(event: JobEvent) -> pb.WatchJobResponse:
    return pb.WatchJobResponse(
        sequence=event.sequence,
        job=job_to_pb(event.job),
        message=event.message,
        done=event.done,
        total=event.total,
        unit=event.unit,
    )


def job_event_from_pb(message: pb.WatchJobResponse) -> JobEvent:
    return JobEvent(
        message.sequence, job_from_pb(message.job), message.message, message.done, message.total, message.unit
    )
