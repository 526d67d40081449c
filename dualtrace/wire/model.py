"""model.proto: provenance, cards, limits, capabilities, execution."""

from __future__ import annotations

from dualtrace.card import Capabilities, Card, Limits, QuestionKind
from dualtrace.model_card import ModelProvenance
from dualtrace.questions.answers import Execution
from dualtrace.v1 import model_pb2 as pb
from dualtrace.wire.strict import finite


def provenance_to_pb(provenance: ModelProvenance) -> pb.ModelProvenance:
    return pb.ModelProvenance(
        model_id=provenance.model_id,
        revision=provenance.revision,
        family=provenance.family,
        weights_digest=provenance.weights_digest,
        tokenizer_digest=provenance.tokenizer_digest,
        framework=provenance.framework,
        framework_version=provenance.framework_version,
        dtype=provenance.dtype,
        matmul_precision=provenance.matmul_precision,
        device=provenance.device,
        attention_implementation=provenance.attention_implementation,
        adapters=[pb.AdapterProvenance(name=name, digest=digest) for name, digest in provenance.adapter_digests],
        synthetic=provenance.synthetic,
        digest=provenance.digest(),
    )


def provenance_from_pb(message: pb.ModelProvenance) -> ModelProvenance:
    return ModelProvenance(
        model_id=message.model_id,
        revision=message.revision,
        family=message.family,
        weights_digest=message.weights_digest,
        tokenizer_digest=message.tokenizer_digest,
        framework=message.framework,
        framework_version=message.framework_version,
        dtype=message.dtype,
        matmul_precision=message.matmul_precision,
        device=message.device,
        attention_implementation=message.attention_implementation,
        adapter_digests=tuple((adapter.name, adapter.digest) for adapter in message.adapters),
        synthetic=message.synthetic,
    )


def capabilities_to_pb(capabilities: Capabilities) -> pb.Capabilities:
    return pb.Capabilities(
        questions=[pb.Question.Value(f"QUESTION_{kind.value}") for kind in capabilities.questions],
        text=capabilities.text,
        streams=capabilities.streams,
        shares_prefixes=capabilities.shares_prefixes,
        deterministic=capabilities.deterministic,
        masks=capabilities.masks,
        views=capabilities.views,
        ranks=capabilities.ranks,
        distributions=capabilities.distributions,
    )


def capabilities_from_pb(message: pb.Capabilities) -> Capabilities:
    known = {pb.Question.Value(f"QUESTION_{kind.value}"): kind for kind in QuestionKind}
    return Capabilities(
        # A question that only a newer server knows cannot be asked from here anyway.
        questions=tuple(known[number] for number in message.questions if number in known),
        text=message.text,
        streams=message.streams,
        shares_prefixes=message.shares_prefixes,
        deterministic=message.deterministic,
        masks=message.masks,
        views=message.views,
        ranks=message.ranks,
        distributions=message.distributions,
    )


def limits_to_pb(limits: Limits) -> pb.Limits:
    return pb.Limits(
        max_positions=limits.max_positions,
        max_items=limits.max_items,
        max_top_k=limits.max_top_k,
        max_request_tokens=limits.max_request_tokens,
        max_request_chars=limits.max_request_chars,
        max_inline_array_bytes=limits.max_inline_array_bytes,
        max_work_tokens=limits.max_work_tokens,
    )


def limits_from_pb(message: pb.Limits) -> Limits:
    return Limits(
        max_positions=message.max_positions,
        max_items=message.max_items,
        max_top_k=message.max_top_k,
        max_request_tokens=message.max_request_tokens,
        max_request_chars=message.max_request_chars,
        max_work_tokens=message.max_work_tokens,
        max_inline_array_bytes=message.max_inline_array_bytes,
    )


def card_to_pb(card: Card) -> pb.ModelCard:
    message = pb.ModelCard(
        provenance=provenance_to_pb(card.provenance),
        capabilities=capabilities_to_pb(card.capabilities),
        limits=limits_to_pb(card.limits),
        vocab_size=card.vocab_size,
        layers=card.layers,
        query_heads=card.query_heads,
        kv_heads=card.kv_heads,
        hidden_size=card.hidden_size,
        windows=[window or 0 for window in card.windows],
        buckets=card.buckets,
        tokenizer_prefix_ids=card.tokenizer_prefix_ids,
        adapters=card.adapters,
        server_version=card.server_version,
    )
    if card.bos_token_id is not None:
        message.bos_token_id = card.bos_token_id
    if card.eos_token_id is not None:
        message.eos_token_id = card.eos_token_id
    return message


def card_from_pb(message: pb.ModelCard) -> Card:
    return Card(
        provenance=provenance_from_pb(message.provenance),
        capabilities=capabilities_from_pb(message.capabilities),
        limits=limits_from_pb(message.limits),
        vocab_size=message.vocab_size,
        layers=message.layers,
        query_heads=message.query_heads,
        kv_heads=message.kv_heads,
        hidden_size=message.hidden_size,
        windows=tuple(window or None for window in message.windows),
        buckets=tuple(message.buckets),
        bos_token_id=message.bos_token_id if message.HasField("bos_token_id") else None,
        eos_token_id=message.eos_token_id if message.HasField("eos_token_id") else None,
        tokenizer_prefix_ids=tuple(message.tokenizer_prefix_ids),
        adapters=tuple(message.adapters),
        server_version=message.server_version,
    )


def execution_to_pb(execution: Execution) -> pb.Execution:
    return pb.Execution(
        queue_seconds=execution.queue_seconds,
        tokenize_seconds=execution.tokenize_seconds,
        compute_seconds=execution.compute_seconds,
        total_seconds=execution.total_seconds,
        batches=execution.batches,
        computed_tokens=execution.computed_tokens,
        shared_tokens=execution.shared_tokens,
        step_tokens=execution.step_tokens,
        deterministic=execution.deterministic,
        buckets=execution.buckets,
        padded_tokens=execution.padded_tokens,
        server_version=execution.server_version,
    )


def execution_from_pb(message: pb.Execution) -> Execution:
    return Execution(
        queue_seconds=finite(message.queue_seconds, "execution.queue_seconds"),
        tokenize_seconds=finite(message.tokenize_seconds, "execution.tokenize_seconds"),
        compute_seconds=finite(message.compute_seconds, "execution.compute_seconds"),
        total_seconds=finite(message.total_seconds, "execution.total_seconds"),
        batches=message.batches,
        computed_tokens=message.computed_tokens,
        shared_tokens=message.shared_tokens,
        step_tokens=message.step_tokens,
        deterministic=message.deterministic,
        buckets=tuple(message.buckets),
        padded_tokens=message.padded_tokens,
        server_version=message.server_version,
    )
