"""scoring.proto, the requests: questions both ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dualtrace.masks.packing import Convention
from dualtrace.masks.spec import SegmentName
from dualtrace.problems import InvalidArgument, Reason
from dualtrace.questions.asked import (
    PLAIN,
    ExplainMaskQuestion,
    LogprobItem,
    LogprobQuestion,
    MaskedForwardQuestion,
    MaskForm,
    MaskWhy,
    NextTokenQuestion,
    PreflightQuestion,
    RollingQuestion,
    ScoreQuestion,
    TokenizeQuestion,
    Variant,
)
from dualtrace.tokens import Prefix
from dualtrace.v1 import scoring_pb2 as pb
from dualtrace.v1.token_pb2 import TokenRange
from dualtrace.views import BASE
from dualtrace.wire.mask import mask_from_pb, mask_to_pb, segment_from_pb, segment_to_pb, span_from_pb, span_to_pb
from dualtrace.wire.strict import refuse_unknown
from dualtrace.wire.token import (
    boundary_from_pb,
    boundary_to_pb,
    input_from_pb,
    input_to_pb,
    prefix_from_pb,
    prefix_to_pb,
)
from dualtrace.wire.view import view_from_pb, view_to_pb


def variants_from_pb(messages: Sequence[pb.Variant]) -> tuple[Variant, ...]:
    """No variants means one, plain."""
    variants = tuple(variant_from_pb(message, f"variants[{index}]") for index, message in enumerate(messages))
    return variants or PLAIN


def variant_from_pb(message: pb.Variant, field: str) -> Variant:
    view = view_from_pb(message.view, f"{field}.view") if message.HasField("view") else BASE
    mask = mask_from_pb(message.mask, f"{field}.mask") if message.HasField("mask") else None
    return Variant(view, mask, message.allow_leak)


def variant_to_pb(variant: Variant) -> pb.Variant:
    return pb.Variant(
        view=None if variant.view == BASE else view_to_pb(variant.view),
        mask=None if variant.mask is None else mask_to_pb(variant.mask),
        allow_leak=variant.allow_leak,
    )


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
        packing=_packing_from_pb(message),
        delimiter_token_id=message.delimiter_token_id if message.HasField("delimiter_token_id") else None,
        variants=variants_from_pb(message.variants),
        deterministic=message.execution.deterministic,
    )


def _packing_from_pb(message: pb.ScoreRequest) -> Convention | None:
    if not message.HasField("packing"):
        return None
    return Convention[pb.Packing.Name(message.packing).removeprefix("PACKING_")]


def score_to_pb(question: ScoreQuestion) -> pb.ScoreRequest:
    message = pb.ScoreRequest(
        query=input_to_pb(question.query),
        items=[input_to_pb(given) for given in question.items],
        apply_softmax=question.apply_softmax,
        temperature=question.temperature,
        item_first=question.item_first,
        packing=None if question.packing is None else pb.Packing.Value(f"PACKING_{question.packing.name}"),
        delimiter_token_id=question.delimiter_token_id,
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
    views = tuple(view_from_pb(view, f"views[{index}]") for index, view in enumerate(message.views))
    return PreflightQuestion(views or (BASE,))


def preflight_to_pb(question: PreflightQuestion) -> pb.PreflightRequest:
    return pb.PreflightRequest(views=[view_to_pb(view) for view in question.views])


def masked_forward_from_pb(message: pb.MaskedForwardRequest) -> MaskedForwardQuestion:
    refuse_unknown(message)
    _need(message, "input", "input")
    if not message.variants:
        raise InvalidArgument(Reason.EMPTY, "no variants; at least one mask or view is needed", field="variants")
    return MaskedForwardQuestion(
        input=input_from_pb(message.input, "input"),
        variants=variants_from_pb(message.variants),
        segments=_segments_from_pb(message.segments),
        reads=tuple(span_from_pb(span, f"reads[{index}]") for index, span in enumerate(message.reads)),
        prefix=_prefix(message),
        top_k=message.top_k,
        kl_base_masked=message.kl_base_masked,
        kl_masked_base=message.kl_masked_base,
        deterministic=message.execution.deterministic,
    )


def masked_forward_to_pb(question: MaskedForwardQuestion) -> pb.MaskedForwardRequest:
    return pb.MaskedForwardRequest(
        input=input_to_pb(question.input),
        segments=_segments_to_pb(question.segments),
        reads=[span_to_pb(span) for span in question.reads],
        variants=[variant_to_pb(variant) for variant in question.variants],
        prefix=prefix_to_pb(question.prefix),
        top_k=question.top_k,
        kl_base_masked=question.kl_base_masked,
        kl_masked_base=question.kl_masked_base,
        execution=pb.ExecutionOptions(deterministic=True) if question.deterministic else None,
    )


def explain_from_pb(message: pb.ExplainMaskRequest) -> ExplainMaskQuestion:
    refuse_unknown(message)
    _need(message, "input", "input")
    _need(message, "mask", "mask")
    return ExplainMaskQuestion(
        input=input_from_pb(message.input, "input"),
        mask=mask_from_pb(message.mask, "mask"),
        segments=_segments_from_pb(message.segments),
        prefix=_prefix(message),
        layer=message.layer if message.HasField("layer") else None,
        head=message.head if message.HasField("head") else None,
        forms=tuple(MaskForm[pb.MaskForm.Name(form).removeprefix("MASK_FORM_")] for form in message.forms),
        allow_large=message.allow_large,
        why=tuple(MaskWhy(why.layer, why.head, why.query, why.key) for why in message.why),
    )


def explain_to_pb(question: ExplainMaskQuestion) -> pb.ExplainMaskRequest:
    return pb.ExplainMaskRequest(
        input=input_to_pb(question.input),
        segments=_segments_to_pb(question.segments),
        mask=mask_to_pb(question.mask),
        prefix=prefix_to_pb(question.prefix),
        layer=question.layer,
        head=question.head,
        forms=[pb.MaskForm.Value(f"MASK_FORM_{form.name}") for form in question.forms],
        allow_large=question.allow_large,
        why=[pb.MaskQuestion(layer=w.layer, head=w.head, query=w.query, key=w.key) for w in question.why],
    )


def _segments_from_pb(messages: Sequence[pb.NamedSegment]) -> tuple[tuple[SegmentName, tuple[int, int]], ...]:
    for index, message in enumerate(messages):
        if not message.name:
            raise InvalidArgument(Reason.MISSING, "the segment has no name", field=f"segments[{index}].name")
    return tuple((segment_from_pb(m.name), (m.tokens.start, m.tokens.end)) for m in messages)


def _segments_to_pb(segments: tuple[tuple[SegmentName, tuple[int, int]], ...]) -> list[pb.NamedSegment]:
    return [
        pb.NamedSegment(name=segment_to_pb(name), tokens=TokenRange(start=start, end=end))
        for name, (start, end) in segments
    ]


def _shared_to_pb(variants: tuple[Variant, ...], deterministic: bool) -> dict[str, Any]:
    return {
        "variants": [] if variants == PLAIN else [variant_to_pb(variant) for variant in variants],
        "execution": pb.ExecutionOptions(deterministic=True) if deterministic else None,
    }
