"""Messages as the other end gets them, and what is said of those that are refused. It must not know any message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import Message

from dualtrace.problems import InvalidArgument, Reason

FUTURE = b"\xfa\x3e\x01\x00"  # field 1007, one byte


def over_the_wire(message: Message) -> Any:
    """As the other end gets it: bytes and back."""
    return type(message).FromString(message.SerializeToString())


def refused(call: Callable[..., object], *arguments: object) -> tuple[Reason, str]:
    with pytest.raises(InvalidArgument) as caught:
        call(*arguments)
    return caught.value.reason, caught.value.detail.field
