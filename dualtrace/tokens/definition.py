"""What a tokenizer's files say, read and checked before anything is built from them. Nothing of them is ever run.

It knows tokenizer.json, tokenizer_config.json, special_tokens_map.json and config.json. It must not encode.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualtrace.problems import InvalidArgument, NotFound, Problem, Reason, Unsupported

_LARGEST_TOKENIZER_JSON_BYTES = 256 << 20
_LARGEST_OTHER_FILE_BYTES = 16 << 20

SpecialName = str | int | None
"""A bos or eos as a file names it: its text, its id, or none."""


@dataclass(frozen=True)
class Files:
    """A model directory's tokenizer, as read."""

    tokenizer_json: str
    bos: SpecialName
    eos: SpecialName


@dataclass(frozen=True)
class Stages:
    """The parts of a tokenizer around its model, as JSON; None where it has none."""

    normalizer: dict[str, Any] | None
    pre_tokenizer: dict[str, Any] | None
    post_processor: dict[str, Any] | None
    decoder: dict[str, Any] | None


def invalid(message: str) -> Problem:
    return InvalidArgument(Reason.MODEL_INVALID, message, field="tokenizer")


def read_files(directory: Path) -> Files:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise NotFound(
            Reason.NOT_FOUND,
            f"no tokenizer.json in {directory}; other tokenizer files are not read: convert the tokenizer to it",
            field="tokenizer",
        )
    others = [_read_object(directory / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    config = _read_object(directory / "config.json")
    return Files(_read_text(path), _find_special("bos", others, config), _find_special("eos", others, config))


def _read_text(path: Path) -> str:
    largest = _LARGEST_TOKENIZER_JSON_BYTES if path.name == "tokenizer.json" else _LARGEST_OTHER_FILE_BYTES
    try:
        with path.open("rb") as file:
            content = file.read(largest + 1)
        if len(content) > largest:
            raise invalid(f"{path.name} is larger than {largest} bytes, the most that is read")
        return content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise invalid(f"{path.name} cannot be read: {error}") from error


def parse_object(text: str, name: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid(f"{name} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise invalid(f"{name} must hold a JSON object, it holds a {type(parsed).__name__}")
    return parsed


def _read_object(path: Path) -> dict[str, Any]:
    return parse_object(_read_text(path), path.name) if path.is_file() else {}


def _find_special(name: str, token_files: list[dict[str, Any]], config: dict[str, Any]) -> SpecialName:
    """The first file that names it decides; an explicit null says that there is none."""
    key = f"{name}_token"
    for holder in token_files:
        if key in holder:
            value = holder[key]
            content = value.get("content") if isinstance(value, dict) else value
            if value is None or isinstance(content, str):
                return content
            raise invalid(f'{key} must be a string, {{"content": string}} or null, it is {value!r:.80}')
    value = config.get(f"{key}_id")
    if isinstance(value, list):
        value = value[0] if value else None
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise invalid(f"{key}_id in config.json must be an integer, it is {value!r:.80}")


def neutralise(document: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer without what would cut text, add padding, or hide characters from the offsets. Ids stay."""
    shown = {"normalizer", "pre_tokenizer", "post_processor", "decoder"}
    kept = {key: _untrimmed(value) if key in shown else value for key, value in document.items()}
    return kept | {"truncation": None, "padding": None}


def _untrimmed(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: False if key == "trim_offsets" else _untrimmed(value) for key, value in node.items()}
    return [_untrimmed(value) for value in node] if isinstance(node, list) else node


def refuse_randomness(document: dict[str, Any]) -> None:
    dropout = document["model"].get("dropout")
    if dropout:
        raise Unsupported(
            Reason.MODEL_UNSUPPORTED,
            f"this tokenizer drops merges at random (dropout = {dropout}), so one text has many tokenisations; "
            "set model.dropout to null in tokenizer.json",
            field="tokenizer",
        )


def digest(document: dict[str, Any], bos_id: int | None, eos_id: int | None) -> str:
    whole = {"tokenizer": document, "bos_id": bos_id, "eos_id": eos_id}
    canonical = json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def own_specials(post_processor: dict[str, Any] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the post-processor puts in front of a text and behind it."""
    if post_processor is None or post_processor["type"] == "ByteLevel":
        return (), ()
    kind = post_processor["type"]
    if kind in {"BertProcessing", "RobertaProcessing"}:
        return (int(post_processor["cls"][1]),), (int(post_processor["sep"][1]),)
    if kind == "TemplateProcessing":
        return _template_specials(post_processor)
    if kind == "Sequence":
        front: tuple[int, ...] = ()
        back: tuple[int, ...] = ()
        for inner in post_processor["processors"]:
            inner_front, inner_back = own_specials(inner)
            front, back = inner_front + front, back + inner_back
        return front, back
    raise Unsupported(
        Reason.MODEL_UNSUPPORTED, f"post_processor {kind!r} is not known", field="tokenizer",
        allowed="ByteLevel, TemplateProcessing, BertProcessing, RobertaProcessing, Sequence",
    )  # fmt: skip


def _template_specials(post_processor: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    sides: tuple[list[int], list[int]] = ([], [])
    behind = False
    for entry in post_processor["single"]:
        if "Sequence" in entry:
            behind = True
        else:
            name = entry["SpecialToken"]["id"]
            special = post_processor["special_tokens"].get(name)
            if special is None:
                raise invalid(f"tokenizer.json's post_processor names {name!r}, which its special_tokens do not hold")
            sides[behind].extend(int(token_id) for token_id in special["ids"])
    return tuple(sides[0]), tuple(sides[1])
