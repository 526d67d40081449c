"""scoring.proto, the requests: questions both ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dualtrace.problems import InvalidArgument, Problem, Reason, Unsupported
from dualtrace.questions.asked import (
    PLAIN,
    LogprobItem,
    LogprobQuestion,
    NextTokenQuestion,
    PreflightQuestion,
    RollingQuestion,
    ScoreQuestion,
    TokenizeQuestion,
    Variant,
)
from dualtrace.tokens import Prefix
from dualtrace.v1 import scoring_pb2 as pb
from dualtrace.v1 import view_pb2
from dualtrace.wire.strict import refuse_unknown
from dualtrace.wire.token import (
    boundary_from_pb,
    boundary_to_pb,
    input_from_pb,
    input_to_pb,
    prefix_from_pb,
    prefix_to_pb,
)


def variants_from_pb(messages: Sequence[pb.Variant]) -> tuple[Variant, ...]:
    """No variants means one, plain. Masks and views are refused by name until an engine serves them."""
    for index, message in enumerate(messages):
        if message.HasField("mask"):
            text = "this version serves the causal mask only; leave the mask out"
            raise Unsupported(Reason.UNSUPPORTED_MASK, text, field=f"variants[{index}].mask")
        if message.HasField("view"):
            _check_base_view(message.view, f"variants[{index}].view")
    return (Variant(),) * len(messages) or PLAIN


def _check_base_view(view: view_pb2.View, field: str) -> None:
    if view.WhichOneof("face") is None:
        text = "the view names no face; leave it out for base"
        raise InvalidArgument(Reason.MISSING, text, field=field)
    if view.WhichOneof("face") != "base":
        text = f"view {view.WhichOneof('face')} asked; this version serves the base view only"
        raise Unsupported(Reason.UNSUPPORTED_VIEW, text, field=field)


def _prefix(message: Any) -> Prefix:
    return prefix_from_pb(message.prefix if message.HasField("prefix") else None)


def _need(message: Any, field: str, path: str) -> None:
    if not message.HasField(field):
        raise InvalidArgument(Reason.MISSING, f"{field} is not set", field=path)


def logprob_from_pb(message: pb.LogprobRequest) -> LogprobQuestion:
    refuse_unknown(message)
    items = []
    for index, item in enumerate(message.items):
        for part in ("prompt", "completion"):
            _need(item, part, f"items[{index}].{part}")
        prompt = input_from_pb(item.prompt, f"items[{index}].prompt")
        items.append(LogprobItem(prompt, input_from_pb(item.completion, f"items[{index}].completion")))
    return LogprobQuestion(
        items=tuple(items),
        boundary=boundary_from_pb(message.boundary) if message.HasField("boundary") else None,
        prefix=_prefix(message),
        top_k=message.top_k,
        variants=variants_from_pb(message.variants),
        deterministic=message.execution.deterministic,
    )


def logprob_to_pb(question: LogprobQuestion) -> pb.LogprobRequest:
    return pb.LogprobRequest(
        items=[
            pb.LogprobItem(prompt=input_to_pb(item.prompt), completion=input_to_pb(item.completion))
            for item in question.items
        ],
        boundary=None if question.boundary is None else boundary_to_pb(question.boundary),
        prefix=prefix_to_pb(question.prefix),
        top_k=question.top_k,
        **_shared_to_pb(question.variants, question.deterministic),
    )


def rolling_from_pb(message: pb.RollingLogprobRequest) -> RollingQuestion:
    refuse_unknown(message)
    return RollingQuestion(
        inputs=tuple(input_from_pb(given, f"inputs[{index}]") for index, given in enumerate(message.inputs)),
        prefix=_prefix(message),
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        stride=message.stride if message.HasField("stride") else None,
        top_k=message.top_k,
        variants=variants_from_pb(message.variants),
        deterministic=message.execution.deterministic,
    )


def rolling_to_pb(question: RollingQuestion) -> pb.RollingLogprobRequest:
    return pb.RollingLogprobRequest(
        inputs=[input_to_pb(given) for given in question.inputs],
        prefix=prefix_to_pb(question.prefix),
        max_tokens=question.max_tokens,
        stride=question.stride,
        top_k=question.top_k,
        **_shared_to_pb(question.variants, question.deterministic),
    )


def next_token_from_pb(message: pb.NextTokenDistRequest) -> NextTokenQuestion:
    refuse_unknown(message)
    return NextTokenQuestion(
        prompts=tuple(input_from_pb(given, f"prompts[{index}]") for index, given in enumerate(message.prompts)),
        top_k=message.top_k,
        extra_token_ids=tuple(message.extra_token_ids),
        prefix=_prefix(message),
        variants=variants_from_pb(message.variants),
        deterministic=message.execution.deterministic,
    )


def next_token_to_pb(question: NextTokenQuestion) -> pb.NextTokenDistRequest:
    return pb.NextTokenDistRequest(
        prompts=[input_to_pb(given) for given in question.prompts],
        top_k=question.top_k,
        extra_token_ids=question.extra_token_ids,
        prefix=prefix_to_pb(question.prefix),
        **_shared_to_pb(question.variants, question.deterministic),
    )


def score_from_pb(message: pb.ScoreRequest) -> ScoreQuestion:
    refuse_unknown(message)
    _need(message, "query", "query")
    _refuse_packing(message)
    labels = item_labels = None
    match message.WhichOneof("labels"):
        case "label_token_ids":
            labels = tuple(message.label_token_ids.ids)
        case "item_label_token_ids":
            item_labels = tuple(tuple(ids.ids) for ids in message.item_label_token_ids.lists)
    return ScoreQuestion(
        query=input_from_pb(message.query, "query"),
        items=tuple(input_from_pb(given, f"items[{index}]") for index, given in enumerate(message.items)),
        labels=labels,
        item_labels=item_labels,
        apply_softmax=message.apply_softmax,
        temperature=message.temperature if message.HasField("temperature") else None,
        item_first=message.item_first,
        variants=variants_from_pb(message.variants),
        deterministic=message.execution.deterministic,
    )


def _refuse_packing(message: pb.ScoreRequest) -> None:
    if message.HasField("packing") and message.item_first:
        text = "packing puts the query first; it excludes item_first"
        raise InvalidArgument(Reason.CONFLICT, text, field="item_first")
    if message.HasField("packing"):
        text = "this version scores each item as its own sequence; leave packing out"
        raise Unsupported(Reason.NOT_IMPLEMENTED, text, field="packing")
    if message.HasField("delimiter_token_id"):
        text = "a delimiter belongs to packing; leave it out"
        raise InvalidArgument(Reason.CONFLICT, text, field="delimiter_token_id")


def score_to_pb(question: ScoreQuestion) -> pb.ScoreRequest:
    message = pb.ScoreRequest(
        query=input_to_pb(question.query),
        items=[input_to_pb(given) for given in question.items],
        apply_softmax=question.apply_softmax,
        temperature=question.temperature,
        item_first=question.item_first,
        **_shared_to_pb(question.variants, question.deterministic),
    )
    if question.labels is not None:
        message.label_token_ids.ids.extend(question.labels)
        message.label_token_ids.SetInParent()
    if question.item_labels is not None:
        message.item_label_token_ids.SetInParent()
        for ids in question.item_labels:
            message.item_label_token_ids.lists.add(ids=ids)
    return message


def tokenize_from_pb(message: pb.TokenizeRequest) -> TokenizeQuestion:
    refuse_unknown(message)
    inputs = tuple(input_from_pb(given, f"inputs[{index}]") for index, given in enumerate(message.inputs))
    return TokenizeQuestion(inputs, message.special_tokens)


def tokenize_to_pb(question: TokenizeQuestion) -> pb.TokenizeRequest:
    return pb.TokenizeRequest(
        inputs=[input_to_pb(given) for given in question.inputs], special_tokens=question.special_tokens
    )


def preflight_from_pb(message: pb.PreflightRequest) -> PreflightQuestion:
    refuse_unknown(message)
    for index, view in enumerate(message.views):
        try:
            _check_base_view(view, f"views[{index}]")
        except Problem as problem:
            raise problem.at(item=index) from None
    return PreflightQuestion(max(1, len(message.views)))


def preflight_to_pb(question: PreflightQuestion) -> pb.PreflightRequest:
    return pb.PreflightRequest(views=[view_pb2.View(base=view_pb2.BaseView())] * question.views)


def _shared_to_pb(variants: tuple[Variant, ...], deterministic: bool) -> dict[str, Any]:
    return {
        "variants": [] if variants == PLAIN else [pb.Variant()] * len(variants),
        "execution": pb.ExecutionOptions(deterministic=True) if deterministic else None,
    }
