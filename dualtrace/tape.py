"""A tape of a call: the very bytes that went over the wire, for whoever must prove later what was said.

It knows bytes and where gRPC serializes. It must not know messages, questions or where a tape is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

Serializer = Callable[[Any], bytes]
Deserializer = Callable[[bytes], Any]

DEFAULT_LIMIT_BYTES = 64 << 20
UNTAPED = ("/Describe", "/Preflight")  # they ask for no answer of the model
LEADING = ("/Tokenize",)  # asked before a question, to ask it in ids


class Tape:
    """The first question asked with it: one request, and the responses in order. Later ones pass it by.

    A response stands as protobuf's delimited form has it: its length as a varint, then its bytes. What goes beyond the
    limit is left out whole and marked as cut, so a tape can always be read up to its end.
    """

    def __init__(self, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._responses = bytearray()
        self._call: object = None  # the one on the tape
        self._is_leading = True
        self.request = b""
        self.request_cut = False
        self.responses_cut = False

    @property
    def responses(self) -> bytes:
        return bytes(self._responses)

    def start(self, call: object, method: str, request: bytes) -> None:
        """A call begins. The tape takes the first one, and for a leading one the next that is none."""
        if not self._is_leading:
            return
        self._is_leading = method.endswith(LEADING)
        self._call = call
        self._responses = bytearray()
        self.request_cut = len(request) > self._limit_bytes
        self.request = b"" if self.request_cut else request
        self.responses_cut = False

    def add_response(self, call: object, response: bytes) -> None:
        if call is not self._call:
            return
        length = varint(len(response))
        room = self._limit_bytes - len(self._responses)
        self.responses_cut = self.responses_cut or len(length) + len(response) > room
        if not self.responses_cut:
            self._responses += length + response


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the high bit says that more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def split_responses(responses: bytes) -> list[bytes]:
    """The responses of a tape, each by itself."""
    found = []
    at = 0
    while at < len(responses):
        length = shift = 0
        while responses[at] & 0x80:
            length |= (responses[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
        length |= responses[at] << shift
        at += 1
        found.append(responses[at : at + length])
        at += length
    return found


class TapedChannel:
    """A channel whose questions go onto a tape as they are serialized. Uploads stay off it."""

    def __init__(self, channel: grpc.aio.Channel, tape: Tape) -> None:
        self._channel = channel
        self._tape = tape

    def unary_unary(self, method: str, **how: Any) -> Any:
        return self._taped(self._channel.unary_unary, method, how)

    def unary_stream(self, method: str, **how: Any) -> Any:
        return self._taped(self._channel.unary_stream, method, how)

    def stream_unary(self, method: str, **how: Any) -> Any:
        return self._channel.stream_unary(method, **how)

    def _taped(self, make: Callable[..., Any], method: str, how: dict[str, Any]) -> Any:
        """Serializers belong to a method and know no call, so every call gets a pair of its own."""
        if method.endswith(UNTAPED):
            return make(method, **how)
        serialize: Serializer = how.pop("request_serializer")
        deserialize: Deserializer = how.pop("response_deserializer")

        def ask(request: Any, **more: Any) -> Any:
            call = object()

            def write(message: Any) -> bytes:
                data = serialize(message)
                self._tape.start(call, method, data)
                return data

            def read(data: bytes) -> Any:
                self._tape.add_response(call, data)
                return deserialize(data)

            return make(method, request_serializer=write, response_deserializer=read, **how)(request, **more)

        return ask
