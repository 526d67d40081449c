"""scoring.proto, the streamed answers: their events both ways."""

from __future__ import annotations

from dualtrace.problems import Internal, Reason
from dualtrace.questions.answers import (
    AnswerHeader,
    AnswerSummary,
    ItemDone,
    ItemHeader,
    ItemProblem,
    RollingWindows,
    StreamEvent,
    TokenChunk,
)
from dualtrace.tokens import Tokens
from dualtrace.v1 import scoring_pb2 as pb
from dualtrace.wire import problem as problem_wire
from dualtrace.wire.columns import applied_from_pb, applied_to_pb, floats, ints, usage_from_pb, usage_to_pb
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
        ints(message.ids),
        tuple(message.pieces),
        ints(message.char_starts) if has_offsets else None,
        ints(message.char_ends) if has_offsets else None,
    )
    top_ids = top_logprobs = None
    if message.top_ids:
        top_ids = ints(message.top_ids).reshape(count, -1)
        top_logprobs = floats(message.top_logprobs).reshape(count, -1)
    return TokenChunk(
        message.item, message.variant, message.first_index, tokens, floats(message.logprobs),
        ints(message.ranks), ints(message.ties), top_ids, top_logprobs,
        floats(message.kl_base_masked) if message.kl_base_masked else None,
        floats(message.kl_masked_base) if message.kl_masked_base else None,
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
        **applied_to_pb(done.applied),
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
        applied=applied_from_pb(message),
        document_starts=tuple(message.document_starts),
        delta_modules=tuple(message.delta_modules),
    )


def _summary_to_pb(summary: AnswerSummary) -> pb.AnswerSummary:
    return pb.AnswerSummary(
        usage=usage_to_pb(summary.usage),
        execution=execution_to_pb(summary.execution),
        done=summary.done,
        failed=summary.failed,
    )


def _summary_from_pb(message: pb.AnswerSummary) -> AnswerSummary:
    return AnswerSummary(
        usage_from_pb(message.usage), execution_from_pb(message.execution), message.done, message.failed
    )
