"""What an id sequence is, token by token, and what counts as text. It must not know how text becomes ids."""

from __future__ import annotations

from dataclasses import dataclass

from dualtrace.arrays import IntArray
from dualtrace.problems import InvalidArgument, Reason


@dataclass(frozen=True)
class Tokens:
    """Token ids with what each of them stands for.

    Offsets count Unicode code points of the text that was encoded, end exclusive. Tokens that are parts of one
    character all have the offsets of the whole character; a token that stands for nothing in the text (a special
    token that the tokenizer adds) has zero width.
    """

    ids: IntArray  # [T] int32
    pieces: tuple[bytes, ...]  # [T] the bytes each token stands for (half an emoji is no string); () when not known
    starts: IntArray | None  # [T] int32; None when the input was ids
    ends: IntArray | None  # [T] int32

    def __len__(self) -> int:
        return len(self.ids)


def check_text(text: str, field: str) -> None:
    """Refuse text that is not Unicode: a lone surrogate has no UTF-8 form, so no tokenizer can see it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            Reason.INVALID_TEXT,
            f"character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}; "
            "text must be valid Unicode: remove it, or join the two halves of its pair",
            field=field,
        ) from None
