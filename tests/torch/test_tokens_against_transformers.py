"""Ids and specials against transformers, which reads the same files its own way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dualtrace.tokens import Tokenizer
from tests.support import tokenizer_zoo as zoo

pytestmark = pytest.mark.torch

LONG_TEXT = "\n".join(zoo.CORPUS + zoo.HARD_TEXTS)


@pytest.mark.parametrize("special_tokens", [False, True])
@pytest.mark.parametrize("name", zoo.BUILDERS)
def test_ids_and_special_tokens_are_those_of_transformers(name: str, special_tokens: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if name != "wordpiece":
        config |= {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer.json").write_text(zoo.tokenizer_json(name))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer.from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.size) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))
    for text in [*zoo.HARD_TEXTS, LONG_TEXT]:
        expected = theirs(text, add_special_tokens=special_tokens)["input_ids"]
        assert ours.encode(text, special_tokens=special_tokens).ids.tolist() == expected, text
