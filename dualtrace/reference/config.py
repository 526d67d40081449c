"""Reading a model's config so that nothing in it is overlooked.

It knows that a key which nobody asked for may change the maths. It must not know any model family.
"""

from __future__ import annotations

from typing import Any, NoReturn

from ..problems import InvalidArgument, Reason, Unsupported

# Identity, tokens, files, training, and generation settings that older versions kept in config.json: none of these
# changes what a forward pass in evaluation computes.
NO_EFFECT = frozenset(
    {
        "model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path",
        "name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
        "decoder_start_token_id", "use_cache", "initializer_range", "attention_dropout", "embd_pdrop",
        "resid_pdrop", "attn_pdrop", "output_attentions", "output_hidden_states", "return_dict",
        "return_dict_in_generate", "torchscript", "use_bfloat16", "id2label", "label2id", "problem_type",
        "tokenizer_class", "task_specific_params", "finetuning_task", "gradient_checkpointing", "summary_type",
        "summary_use_proj", "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "n_ctx",
        "predict_special_tokens", "chunk_size_feed_forward", "is_decoder", "is_llama_config",
        "transformers.js_config", "_commit_hash", "tie_encoder_decoder", "max_length", "min_length",
        "do_sample", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
        "num_beams", "num_beam_groups", "num_return_sequences", "early_stopping", "no_repeat_ngram_size",
        "bad_words_ids", "prefix",
    }
)  # fmt: skip

INERT_VALUES: dict[str, tuple[Any, ...]] = {
    # keys that change the maths, at the values at which they do not
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "pretraining_tp": (1,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (None, 1.0),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "quantization_config": (None,),
    "auto_map": (None,),  # the model brings its own code
    "pruned_heads": (None, {}),
}

_REQUIRED = object()


class ConfigReader:
    """Hands out config values by name and type, and remembers which were asked for."""

    def __init__(self, values: dict[str, Any], where: str = "config.json") -> None:
        self._values = values
        self._where = where
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def count(self, key: str, default: Any = _REQUIRED) -> int:
        """A positive whole number; a null in the file means the default."""
        value = self._take(key, default)
        if type(value) is not int or value < 1:
            self._refuse_value(key, value, "a whole number above 0")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A positive number."""
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self._refuse_value(key, value, "a finite number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._take(key, default)
        if not isinstance(value, bool):
            self._refuse_value(key, value, "true or false")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: Any = _REQUIRED) -> str:
        """A name of which only some are implemented."""
        value = self._take(key, default)
        if value not in allowed:
            raise Unsupported(
                Reason.MODEL_UNSUPPORTED,
                f"{self._where} has {key} = {value!r}; the reference engine implements {', '.join(allowed)}.",
                allowed=", ".join(allowed),
            )
        return str(value)

    def mapping(self, key: str) -> dict[str, Any] | None:
        value = self._take(key, None)
        if value is not None and not isinstance(value, dict):
            self._refuse_value(key, value, "an object or null")
        return value

    def refuse_true(self, key: str) -> None:
        if self.flag(key, False):
            raise Unsupported(
                Reason.MODEL_UNSUPPORTED,
                f"{self._where} has {key} = true, which the reference engine does not implement.",
            )

    def finish(self) -> None:
        """Refuse what nobody asked for, unless it is known to change nothing."""
        for key, value in self._values.items():
            if key in self._read or key in NO_EFFECT:
                continue
            if not any(value == inert and type(value) is type(inert) for inert in INERT_VALUES.get(key, ())):
                raise Unsupported(
                    Reason.MODEL_UNSUPPORTED,
                    f"{self._where} has {key} = {str(value)[:80]}, which the reference engine does not handle; "
                    "it may change the model's numbers, so it is not ignored.",
                )

    def _take(self, key: str, default: Any) -> Any:
        self._read.add(key)
        value = self._values.get(key)
        if value is None and default is _REQUIRED:
            raise InvalidArgument(Reason.MODEL_INVALID, f"{self._where} has no {key}.")
        return default if value is None else value

    def _refuse_value(self, key: str, value: Any, allowed: str) -> NoReturn:
        raise InvalidArgument(
            Reason.MODEL_INVALID,
            f"{self._where} has {key} = {str(value)[:80]!r}; it must be {allowed}.",
            allowed=allowed,
        )
