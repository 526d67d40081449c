"""scoring.proto, the unary answers: responses both ways."""

from __future__ import annotations

from dualtrace.problems import Internal, Problem, Reason
from dualtrace.questions.answers import (
    MaskAnswer,
    MaskExplanation,
    NextTokenAnswer,
    NextTokenResult,
    NextTokens,
    PreflightAnswer,
    PreflightResult,
    ScoreAnswer,
    ScoreResult,
    Tail,
    TokenizeAnswer,
    ViewReceipt,
)
from dualtrace.v1 import scoring_pb2 as pb
from dualtrace.wire import problem as problem_wire
from dualtrace.wire.columns import applied_from_pb, applied_to_pb, floats, ints, usage_from_pb, usage_to_pb
from dualtrace.wire.mask import metadata_from_pb, metadata_to_pb
from dualtrace.wire.model import execution_from_pb, execution_to_pb, provenance_from_pb, provenance_to_pb
from dualtrace.wire.token import tokens_from_pb, tokens_to_pb


def _tail_to_pb(tail: Tail) -> pb.Tail:
    return pb.Tail(state=pb.TailState.Value(f"TAIL_STATE_{tail.state}"), tail_logprob=tail.logprob)


def _tail_from_pb(message: pb.Tail) -> Tail:
    logprob = message.tail_logprob if message.HasField("tail_logprob") else None
    if message.state == pb.TAIL_STATE_UNSPECIFIED or message.state not in pb.TailState.values():
        text = f"the other end sent tail state {message.state}; a tail without a known state says nothing"
        raise Internal(Reason.UNKNOWN_ENUM_VALUE, text, field="tail.state")
    return Tail(pb.TailState.Name(message.state).removeprefix("TAIL_STATE_"), logprob)


def next_token_to_pb(answer: NextTokenAnswer) -> pb.NextTokenDistResponse:
    return pb.NextTokenDistResponse(
        results=[_next_result_to_pb(result) for result in answer.results],
        provenance=provenance_to_pb(answer.provenance),
        usage=usage_to_pb(answer.usage),
        execution=execution_to_pb(answer.execution),
        views=[pb.ViewReceipt(variant=v.variant, delta_modules=v.delta_modules) for v in answer.views],
    )


def _next_result_to_pb(result: NextTokenResult) -> pb.NextTokenDistResult:
    message = pb.NextTokenDistResult(item=result.item, variant=result.variant)
    outcome = result.outcome
    if isinstance(outcome, Problem):
        message.problem.CopyFrom(problem_wire.to_pb(outcome))
        return message
    beyond = outcome.tail_beyond_extra
    message.next.CopyFrom(
        pb.NextTokens(
            top_ids=outcome.top_ids.tolist(),
            top_logprobs=outcome.top_logprobs.tolist(),
            top_pieces=outcome.top_pieces,
            tail=_tail_to_pb(outcome.tail),
            extra_logprobs=outcome.extra_logprobs.tolist(),
            tail_beyond_extra=None if beyond is None else _tail_to_pb(beyond),
            vocab_size=outcome.vocab_size,
            prompt_tokens=outcome.prompt_tokens,
            prefix_token_id=outcome.prefix_token_id,
            **applied_to_pb(outcome.applied),
        )
    )
    return message


def next_token_from_pb(message: pb.NextTokenDistResponse) -> NextTokenAnswer:
    return NextTokenAnswer(
        tuple(NextTokenResult(r.item, r.variant, _next_outcome_from_pb(r)) for r in message.results),
        provenance_from_pb(message.provenance),
        usage_from_pb(message.usage),
        execution_from_pb(message.execution),
        tuple(ViewReceipt(view.variant, tuple(view.delta_modules)) for view in message.views),
    )


def _next_outcome_from_pb(result: pb.NextTokenDistResult) -> NextTokens | Problem:
    if result.WhichOneof("outcome") == "problem":
        return problem_wire.from_pb(result.problem)
    following = result.next
    return NextTokens(
        top_ids=ints(following.top_ids),
        top_logprobs=floats(following.top_logprobs),
        top_pieces=tuple(following.top_pieces),
        tail=_tail_from_pb(following.tail),
        extra_logprobs=floats(following.extra_logprobs),
        tail_beyond_extra=_tail_from_pb(following.tail_beyond_extra)
        if following.HasField("tail_beyond_extra")
        else None,
        vocab_size=following.vocab_size,
        prompt_tokens=following.prompt_tokens,
        prefix_token_id=following.prefix_token_id if following.HasField("prefix_token_id") else None,
        applied=applied_from_pb(following),
    )


def score_to_pb(answer: ScoreAnswer) -> pb.ScoreResponse:
    return pb.ScoreResponse(
        results=[
            pb.ScoreResult(
                item=result.item,
                variant=result.variant,
                scores=result.scores,
                label_logprobs=result.label_logprobs,
                prompt_tokens=result.prompt_tokens,
                problem=None if result.problem is None else problem_wire.to_pb(result.problem),
                **applied_to_pb(result.applied),
            )
            for result in answer.results
        ],
        provenance=provenance_to_pb(answer.provenance),
        usage=usage_to_pb(answer.usage),
        execution=execution_to_pb(answer.execution),
        views=[pb.ViewReceipt(variant=v.variant, delta_modules=v.delta_modules) for v in answer.views],
    )


def score_from_pb(message: pb.ScoreResponse) -> ScoreAnswer:
    return ScoreAnswer(
        tuple(
            ScoreResult(
                item=result.item,
                variant=result.variant,
                prompt_tokens=result.prompt_tokens,
                scores=tuple(result.scores),
                label_logprobs=tuple(result.label_logprobs),
                problem=problem_wire.from_pb(result.problem) if result.HasField("problem") else None,
                applied=applied_from_pb(result),
            )
            for result in message.results
        ),
        provenance_from_pb(message.provenance),
        usage_from_pb(message.usage),
        execution_from_pb(message.execution),
        tuple(ViewReceipt(view.variant, tuple(view.delta_modules)) for view in message.views),
    )


def tokenize_to_pb(answer: TokenizeAnswer) -> pb.TokenizeResponse:
    response = pb.TokenizeResponse()
    for result in answer.results:
        if isinstance(result, Problem):
            response.results.add(problem=problem_wire.to_pb(result))
        else:
            response.results.add(tokens=tokens_to_pb(result))
    return response


def tokenize_from_pb(message: pb.TokenizeResponse) -> TokenizeAnswer:
    return TokenizeAnswer(
        tuple(
            problem_wire.from_pb(result.problem)
            if result.WhichOneof("outcome") == "problem"
            else tokens_from_pb(result.tokens)
            for result in message.results
        )
    )


def preflight_to_pb(answer: PreflightAnswer) -> pb.PreflightResponse:
    return pb.PreflightResponse(
        results=[
            pb.PreflightResult(ok=r.ok, problem=None if r.problem is None else problem_wire.to_pb(r.problem))
            for r in answer.results
        ]
    )


def preflight_from_pb(message: pb.PreflightResponse) -> PreflightAnswer:
    return PreflightAnswer(
        tuple(
            PreflightResult(r.ok, problem_wire.from_pb(r.problem) if r.HasField("problem") else None)
            for r in message.results
        )
    )


def explanation_to_pb(explained: MaskExplanation) -> pb.ExplainMaskResponse:
    rows = explained.rows or ()
    return pb.ExplainMaskResponse(
        metadata=metadata_to_pb(explained.metadata),
        tokens=tokens_to_pb(explained.tokens),
        leaking_rows=explained.leaking_rows,
        empty_rows=explained.empty_rows,
        rows=[pb.MaskRow(starts=[run[0] for run in row], ends=[run[1] for run in row]) for row in rows],
        npy=explained.npy,
        png=explained.png,
        answers=[pb.MaskAnswer(may_see=answer.may_see, rule=answer.rule) for answer in explained.answers],
    )


def explanation_from_pb(message: pb.ExplainMaskResponse) -> MaskExplanation:
    rows = tuple(tuple(zip(row.starts, row.ends, strict=True)) for row in message.rows)
    return MaskExplanation(
        metadata=metadata_from_pb(message.metadata),
        tokens=tokens_from_pb(message.tokens),
        leaking_rows=tuple(message.leaking_rows),
        empty_rows=message.empty_rows,
        rows=rows or None,
        npy=message.npy if message.HasField("npy") else None,
        png=message.png if message.HasField("png") else None,
        answers=tuple(MaskAnswer(answer.may_see, answer.rule) for answer in message.answers),
    )
