"""Text into token ids and back to places in the text: tokenizer, pieces, offsets, boundaries, prefixes, spans.

It knows tokenizer files and text. It must not know models, engines, masks, protobuf or transformers.
"""

from dualtrace.tokens.boundaries import Boundary, Cut
from dualtrace.tokens.prefixes import Prefix, PrefixKind, prefix_for_ids
from dualtrace.tokens.sequence import Tokens, check_text
from dualtrace.tokens.spans import Alignment, Selected, select_span
from dualtrace.tokens.tokenizer import Tokenizer

__all__ = [
    "Alignment",
    "Boundary",
    "Cut",
    "Prefix",
    "PrefixKind",
    "Selected",
    "Tokenizer",
    "Tokens",
    "check_text",
    "prefix_for_ids",
    "select_span",
]
