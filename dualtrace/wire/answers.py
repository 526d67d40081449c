"""scoring.proto, the responses: streamed events and unary answers both ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dualtrace.engine import FloatArray, IntArray
from dualtrace.problems import Internal, Problem, Reason
from dualtrace.questions.answers import (
    AnswerHeader,
    AnswerSummary,
    Applied,
    ItemDone,
    ItemHeader,
    ItemProblem,
    MaskAnswer,
    MaskExplanation,
    NextTokenAnswer,
    NextTokenResult,
    NextTokens,
    PreflightAnswer,
    PreflightResult,
    RollingWindows,
    ScoreAnswer,
    ScoreResult,
    StreamEvent,
    Tail,
    TokenChunk,
    TokenizeAnswer,
    Usage,
)
from dualtrace.tokens import Tokens
from dualtrace.v1 import scoring_pb2 as pb
from dualtrace.wire import problem as problem_wire
from dualtrace.wire.mask import metadata_from_pb, metadata_to_pb, receipt_from_pb, receipt_to_pb
from dualtrace.wire.model import execution_from_pb, execution_to_pb, provenance_from_pb, provenance_to_pb
from dualtrace.wire.token import tokens_from_pb, tokens_to_pb


def event_to_pb(event: StreamEvent, sequence: int) -> pb.AnswerEvent:
    match event:
        case TokenChunk():
            return pb.AnswerEvent(sequence=sequence, tokens=_chunk_to_pb(event))
        case AnswerHeader():
            return pb.AnswerEvent(sequence=sequence, header=_header_to_pb(event))
        case ItemDone():
            return pb.AnswerEvent(sequence=sequence, item_done=_done_to_pb(event))
        case ItemProblem():
            problem = pb.ItemProblem(item=event.item, variant=event.variant, problem=problem_wire.to_pb(event.problem))
            return pb.AnswerEvent(sequence=sequence, item_problem=problem)
        case AnswerSummary():
            return pb.AnswerEvent(sequence=sequence, summary=_summary_to_pb(event))


def event_from_pb(message: pb.AnswerEvent) -> StreamEvent | None:
    """None for an event that only a newer server knows."""
    match message.WhichOneof("event"):
        case "tokens":
            return _chunk_from_pb(message.tokens)
        case "header":
            return _header_from_pb(message.header)
        case "item_done":
            return _done_from_pb(message.item_done)
        case "item_problem":
            item = message.item_problem
            return ItemProblem(item.item, item.variant, problem_wire.from_pb(item.problem))
        case "summary":
            return _summary_from_pb(message.summary)
        case _:
            return None


def _header_to_pb(header: AnswerHeader) -> pb.AnswerHeader:
    columns = [pb.COLUMN_IDS, pb.COLUMN_LOGPROBS, pb.COLUMN_RANKS, pb.COLUMN_TIES]
    if header.has_pieces:
        columns.append(pb.COLUMN_PIECES)
    if header.has_offsets:
        columns.append(pb.COLUMN_CHAR_OFFSETS)
    if header.top_k:
        columns.append(pb.COLUMN_TOP)
    if header.kl_base_masked:
        columns.append(pb.COLUMN_KL_BASE_MASKED)
    if header.kl_masked_base:
        columns.append(pb.COLUMN_KL_MASKED_BASE)
    return pb.AnswerHeader(
        provenance=provenance_to_pb(header.provenance),
        items=[_item_header_to_pb(item) for item in header.items],
        variants=header.variants,
        columns=columns,
        top_k=header.top_k,
        streams=header.streams,
    )


def _header_from_pb(message: pb.AnswerHeader) -> AnswerHeader:
    return AnswerHeader(
        provenance=provenance_from_pb(message.provenance),
        items=tuple(_item_header_from_pb(item) for item in message.items),
        variants=message.variants,
        top_k=message.top_k,
        streams=message.streams,
        has_pieces=pb.COLUMN_PIECES in message.columns,
        has_offsets=pb.COLUMN_CHAR_OFFSETS in message.columns,
        kl_base_masked=pb.COLUMN_KL_BASE_MASKED in message.columns,
        kl_masked_base=pb.COLUMN_KL_MASKED_BASE in message.columns,
    )


def _item_header_to_pb(item: ItemHeader) -> pb.ItemHeader:
    windows = item.windows
    return pb.ItemHeader(
        prefix_token_id=item.prefix_token_id,
        token_count=item.token_count,
        prompt_tokens=item.prompt_tokens,
        scored_start=item.scored_start,
        boundary_token_merged=item.boundary_token_merged,
        unscored=None if item.unscored is None else tokens_to_pb(item.unscored),
        windows=None
        if windows is None
        else pb.RollingWindows(count=windows.count, max_tokens=windows.max_tokens, stride=windows.stride),
    )


def _item_header_from_pb(message: pb.ItemHeader) -> ItemHeader:
    windows = message.windows
    return ItemHeader(
        token_count=message.token_count,
        prompt_tokens=message.prompt_tokens,
        scored_start=message.scored_start if message.HasField("scored_start") else None,
        prefix_token_id=message.prefix_token_id if message.HasField("prefix_token_id") else None,
        boundary_token_merged=message.boundary_token_merged,
        unscored=tokens_from_pb(message.unscored) if message.HasField("unscored") else None,
        windows=RollingWindows(windows.count, windows.max_tokens, windows.stride)
        if message.HasField("windows")
        else None,
    )


def _chunk_to_pb(chunk: TokenChunk) -> pb.TokenChunk:
    tokens = chunk.tokens
    # tolist() first: extending a repeated field with an array is several times slower.
    return pb.TokenChunk(
        item=chunk.item,
        variant=chunk.variant,
        first_index=chunk.first_index,
        ids=tokens.ids.tolist(),
        pieces=tokens.pieces,
        char_starts=() if tokens.starts is None else tokens.starts.tolist(),
        char_ends=() if tokens.ends is None else tokens.ends.tolist(),
        logprobs=chunk.logprobs.tolist(),
        ranks=chunk.ranks.tolist(),
        ties=chunk.ties.tolist(),
        top_ids=() if chunk.top_ids is None else chunk.top_ids.ravel().tolist(),
        top_logprobs=() if chunk.top_logprobs is None else chunk.top_logprobs.ravel().tolist(),
        kl_base_masked=() if chunk.kl_base_masked is None else chunk.kl_base_masked.tolist(),
        kl_masked_base=() if chunk.kl_masked_base is None else chunk.kl_masked_base.tolist(),
    )


def _chunk_from_pb(message: pb.TokenChunk) -> TokenChunk:
    count = len(message.ids)
    _check_columns(message, count)
    has_offsets = bool(message.char_starts)
    tokens = Tokens(
        _ints(message.ids),
        tuple(message.pieces),
        _ints(message.char_starts) if has_offsets else None,
        _ints(message.char_ends) if has_offsets else None,
    )
    top_ids = top_logprobs = None
    if message.top_ids:
        top_ids = _ints(message.top_ids).reshape(count, -1)
        top_logprobs = _floats(message.top_logprobs).reshape(count, -1)
    return TokenChunk(
        message.item, message.variant, message.first_index, tokens, _floats(message.logprobs),
        _ints(message.ranks), _ints(message.ties), top_ids, top_logprobs,
        _floats(message.kl_base_masked) if message.kl_base_masked else None,
        _floats(message.kl_masked_base) if message.kl_masked_base else None,
    )  # fmt: skip


OPTIONAL_COLUMNS = ("pieces", "char_starts", "char_ends", "kl_base_masked", "kl_masked_base")


def _check_columns(message: pb.TokenChunk, count: int) -> None:
    """Columns of one length each, or the chunk says nothing that can be trusted."""
    wrong = [name for name in ("logprobs", "ranks", "ties") if len(getattr(message, name)) != count]
    wrong += [n for n in OPTIONAL_COLUMNS if len(getattr(message, n)) not in (0, count)]
    entries = len(message.top_ids)
    if len(message.char_starts) != len(message.char_ends):
        wrong.append("char_ends")
    if len(message.top_logprobs) != entries or (entries % count if count else entries):
        wrong.append("top_logprobs")
    if wrong:
        raise Internal(Reason.BUG, f"the other end sent a token chunk whose {wrong[0]} column has another length")


def _done_to_pb(done: ItemDone) -> pb.ItemDone:
    return pb.ItemDone(
        item=done.item,
        variant=done.variant,
        scored_tokens=done.scored_tokens,
        total_logprob=done.total_logprob,
        mean_logprob=done.mean_logprob,
        perplexity=done.perplexity,
        is_greedy=done.is_greedy,
        document_starts=done.document_starts,
        delta_modules=done.delta_modules,
        **_applied_to_pb(done.applied),
    )


def _done_from_pb(message: pb.ItemDone) -> ItemDone:
    return ItemDone(
        item=message.item,
        variant=message.variant,
        scored_tokens=message.scored_tokens,
        total_logprob=message.total_logprob if message.HasField("total_logprob") else None,
        mean_logprob=message.mean_logprob if message.HasField("mean_logprob") else None,
        perplexity=message.perplexity if message.HasField("perplexity") else None,
        is_greedy=message.is_greedy if message.HasField("is_greedy") else None,
        applied=_applied_from_pb(message),
        document_starts=tuple(message.document_starts),
        delta_modules=tuple(message.delta_modules),
    )


def _applied_to_pb(applied: Applied | None) -> dict[str, Any]:
    if applied is None:
        return {}
    return {"receipt": receipt_to_pb(applied.receipt), "mask": metadata_to_pb(applied.metadata)}


def _applied_from_pb(message: pb.ItemDone | pb.ScoreResult | pb.NextTokens) -> Applied | None:
    if not (message.HasField("receipt") and message.HasField("mask")):
        return None
    return Applied(metadata_from_pb(message.mask), receipt_from_pb(message.receipt))


def _usage_to_pb(usage: Usage) -> pb.Usage:
    return pb.Usage(prompt_tokens=usage.prompt_tokens, computed_tokens=usage.computed_tokens)


def _usage_from_pb(message: pb.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.computed_tokens)


def _summary_to_pb(summary: AnswerSummary) -> pb.AnswerSummary:
    return pb.AnswerSummary(
        usage=_usage_to_pb(summary.usage),
        execution=execution_to_pb(summary.execution),
        done=summary.done,
        failed=summary.failed,
    )


def _summary_from_pb(message: pb.AnswerSummary) -> AnswerSummary:
    return AnswerSummary(
        _usage_from_pb(message.usage), execution_from_pb(message.execution), message.done, message.failed
    )


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
        usage=_usage_to_pb(answer.usage),
        execution=execution_to_pb(answer.execution),
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
            **_applied_to_pb(outcome.applied),
        )
    )
    return message


def next_token_from_pb(message: pb.NextTokenDistResponse) -> NextTokenAnswer:
    return NextTokenAnswer(
        tuple(NextTokenResult(r.item, r.variant, _next_outcome_from_pb(r)) for r in message.results),
        provenance_from_pb(message.provenance),
        _usage_from_pb(message.usage),
        execution_from_pb(message.execution),
    )


def _next_outcome_from_pb(result: pb.NextTokenDistResult) -> NextTokens | Problem:
    if result.WhichOneof("outcome") == "problem":
        return problem_wire.from_pb(result.problem)
    following = result.next
    return NextTokens(
        top_ids=_ints(following.top_ids),
        top_logprobs=_floats(following.top_logprobs),
        top_pieces=tuple(following.top_pieces),
        tail=_tail_from_pb(following.tail),
        extra_logprobs=_floats(following.extra_logprobs),
        tail_beyond_extra=_tail_from_pb(following.tail_beyond_extra)
        if following.HasField("tail_beyond_extra")
        else None,
        vocab_size=following.vocab_size,
        prompt_tokens=following.prompt_tokens,
        prefix_token_id=following.prefix_token_id if following.HasField("prefix_token_id") else None,
        applied=_applied_from_pb(following),
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
                **_applied_to_pb(result.applied),
            )
            for result in answer.results
        ],
        provenance=provenance_to_pb(answer.provenance),
        usage=_usage_to_pb(answer.usage),
        execution=execution_to_pb(answer.execution),
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
                applied=_applied_from_pb(result),
            )
            for result in message.results
        ),
        provenance_from_pb(message.provenance),
        _usage_from_pb(message.usage),
        execution_from_pb(message.execution),
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


def _ints(values: Sequence[int]) -> IntArray:
    return np.array(values, dtype=np.int32)


def _floats(values: Sequence[float]) -> FloatArray:
    return np.array(values, dtype=np.float64)
