"""A checkpoint's config, read so that no key is overlooked: a key nobody asked for may change the maths.

It knows keys that change nothing and keys at values that change nothing. It must not know any family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from dualtrace.problems import InvalidArgument, Reason, Unsupported

# Identity, special tokens, files, dropout and other training matters, and generation settings: a forward pass in
# evaluation never looks at them.
WITHOUT_EFFECT = frozenset(
    {
        "model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path",
        "name_or_path", "_commit_hash", "transformers.js_config", "_attn_implementation_autoset",
        "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
        "decoder_start_token_id", "tokenizer_class", "use_cache", "cache_implementation", "output_attentions",
        "output_hidden_states", "return_dict", "return_dict_in_generate", "initializer_range",
        "attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop", "dropout",
        "activation_dropout", "layerdrop", "classifier_dropout", "hidden_dropout_prob",
        "gradient_checkpointing", "torchscript", "use_bfloat16", "problem_type", "id2label", "label2id",
        "task_specific_params", "finetuning_task", "summary_type", "summary_use_proj", "summary_activation",
        "summary_first_dropout", "summary_proj_to_labels", "n_ctx", "predict_special_tokens",
        "chunk_size_feed_forward", "is_decoder", "is_llama_config", "tie_encoder_decoder", "max_length",
        "min_length", "do_sample", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
        "length_penalty", "num_beams", "num_beam_groups", "num_return_sequences", "early_stopping",
        "no_repeat_ngram_size", "bad_words_ids", "prefix",
    }
)  # fmt: skip

# Keys that change the maths, with the values at which they do not.
WITHOUT_EFFECT_AT: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "pretraining_tp": (1,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (None, 1.0),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "quantization_config": (None,),
    "auto_map": (None,),
    "pruned_heads": (None, {}),
}

_NEEDED = object()


class Keys:
    """The values of a config (or of a mapping inside one) by name and kind; `finish` refuses what was not asked."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self._values = values
        self._where = where
        self._asked: set[str] = set()

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def ignore(self, *keys: str) -> None:
        """Keys that this family holds and that change nothing in it."""
        self._asked.update(keys)

    def count(self, key: str, default: object = _NEEDED) -> int:
        value = self._ask(key, default)
        if type(value) is not int or value < 1:
            self._refuse(key, value, "a whole number above 0")
        return value

    def index(self, key: str, default: object = _NEEDED) -> int:
        """A whole number that may be 0."""
        value = self._ask(key, default)
        if type(value) is not int or value < 0:
            self._refuse(key, value, "a whole number, 0 or above")
        return value

    def number(self, key: str, default: object = _NEEDED) -> float:
        value = self._ask(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            self._refuse(key, value, "a finite number above 0")
        return float(value)

    def number_or_none(self, key: str) -> float | None:
        return self.number(key) if self.has(key) else self._ask(key, None)

    def flag(self, key: str, default: bool) -> bool:
        value = self._ask(key, default)
        if type(value) is not bool:
            self._refuse(key, value, "true or false")
        return value

    def mapping(self, key: str) -> dict[str, Any] | None:
        value = self._ask(key, None)
        if value is not None and not isinstance(value, dict):
            self._refuse(key, value, "an object or null")
        return value

    def names(self, key: str, allowed: tuple[str, ...], size: int) -> tuple[str, ...] | None:
        """A list with one of the allowed names for each layer."""
        value = self._ask(key, None)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != size or not all(name in allowed for name in value):
            self._refuse(key, value, f"a list of {size} names out of {', '.join(allowed)}")
        return tuple(value)

    def one_of(self, key: str, allowed: tuple[Any, ...], default: object = _NEEDED) -> Any:
        """A value of which only some are implemented."""
        value = self._ask(key, default)
        if not any(value == one and type(value) is type(one) for one in allowed):
            listed = ", ".join(map(str, allowed))
            raise Unsupported(
                Reason.MODEL_UNSUPPORTED,
                f"{self._where} has {key} = {str(value)[:80]!r}; the JAX engine implements {listed}",
                field=key,
                allowed=listed,
            )
        return value

    def finish(self) -> None:
        for key, value in self._values.items():
            if key in self._asked or key in WITHOUT_EFFECT:
                continue
            harmless = WITHOUT_EFFECT_AT.get(key, ())
            if not any(value == one and type(value) is type(one) for one in harmless):
                raise Unsupported(
                    Reason.MODEL_UNSUPPORTED,
                    f"{self._where} has {key} = {str(value)[:80]}, which the JAX engine does not handle for this "
                    "family; it may change the numbers, so it is not ignored",
                    field=key,
                )

    def _ask(self, key: str, default: object) -> Any:
        self._asked.add(key)
        value = self._values.get(key)
        if value is None and default is _NEEDED:
            raise InvalidArgument(Reason.MODEL_INVALID, f"{self._where} has no {key}, which this family needs")
        return default if value is None else value

    def _refuse(self, key: str, value: object, allowed: str) -> NoReturn:
        message = f"{self._where} has {key} = {str(value)[:80]!r}; it must be {allowed}"
        raise InvalidArgument(Reason.MODEL_INVALID, message, field=key, allowed=allowed)


def refuse_model(message: str) -> NoReturn:
    raise InvalidArgument(Reason.MODEL_INVALID, message)
