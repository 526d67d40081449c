"""What a checkpoint may hold without changing what a forward pass computes: config keys and tensors.

It knows names alone, for every engine that refuses what it does not know. It must not know any engine or model family.
"""

from __future__ import annotations

import re
from typing import Any

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

# buffers that some versions of transformers saved beside the weights: they follow from the config
BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)")
