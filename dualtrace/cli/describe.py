"""`dualtrace describe`: what stands behind a target, what it can do and up to which size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dualtrace.cli.inputs import Ask, ask_options
from dualtrace.cli.visible import show_line

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dualtrace.card import Card

KIND = "dualtrace.card"


@click.command()
@ask_options
def describe(ask: Ask) -> None:
    """Say what stands behind TARGET: model, numbers, abilities, limits."""
    from dualtrace.cli.asking import with_scorer
    from dualtrace.cli.output import show, write_json

    card = with_scorer(ask, lambda scorer, _deadline, _tell: scorer.describe())
    if ask.as_json:
        write_json(card_to_json(card))
    else:
        show([card_table(card)])


def card_to_json(card: Card) -> dict[str, Any]:
    from dualtrace.records import to_json

    document = {"kind": KIND, **to_json(card)}
    document["provenance"]["digest"] = card.provenance.digest()
    return document


def card_table(card: Card) -> RenderableType:
    from rich.text import Text

    from dualtrace.cli.tables import pairs_table

    return pairs_table([(name, Text(show_line(value, 200))) for name, value in _facts(card)])


def _facts(card: Card) -> list[tuple[str, str]]:
    from dualtrace.cli.tables import name_engine

    known, able, limits = card.provenance, card.capabilities, card.limits
    heads = f"{card.query_heads} query heads, {card.kv_heads} key-value heads"
    windows = sorted({window for window in card.windows if window is not None})
    abilities = ("streams", "shares_prefixes", "deterministic", "masks", "views", "ranks", "distributions")
    facts = [
        ("model", f"{known.model_id} {known.revision}".strip()),
        ("family", known.family),
        ("shape", f"{card.layers} layers, {heads}, width {card.hidden_size}"),
        ("vocabulary", f"{card.vocab_size} logits"),
        ("longest input", f"{limits.max_positions} tokens"),
        ("native windows", ", ".join(str(window) for window in windows) or "none"),
        ("engine", name_engine(known)),
        ("numbers", f"{known.dtype}, matmul {known.matmul_precision}, {known.attention_implementation} attention"),
        ("device", known.device),
        ("bos / eos", f"{_or_none(card.bos_token_id)} / {_or_none(card.eos_token_id)}"),
        ("own prefix", ", ".join(str(one) for one in card.tokenizer_prefix_ids) or "none"),
        ("questions", ", ".join(kind.value.lower() for kind in able.questions)),
        ("text", "yes" if able.text else "no: token ids only"),
        ("able to", ", ".join(name.replace("_", " ") for name in abilities if getattr(able, name))),
        ("adapters", ", ".join(card.adapters) or "none"),
        ("padded to", "; ".join(card.buckets) or "nothing"),
        ("limits", f"{limits.max_items} items, {limits.max_request_tokens} tokens, top-k {limits.max_top_k}"),
        ("weights", known.weights_digest or "unknown"),
        ("tokenizer", known.tokenizer_digest or "none"),
        ("provenance", known.digest()),
        ("server", card.server_version or "unknown"),
    ]
    return [*facts, ("synthetic", "yes: no model stands behind the numbers")] if known.synthetic else facts


def _or_none(value: int | None) -> str:
    return "none" if value is None else str(value)
