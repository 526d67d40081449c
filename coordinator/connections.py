"""One HTTP connection and its patience: a head, a body and a close may take so long, and then the connection ends.

uvicorn bounds only the pause between two requests. It knows uvicorn's protocol class. It must not know what is served.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

HEAD_SECONDS = 10.0  # from the connection, or the first byte of a further request, to the end of the head
BODY_SECONDS = 60.0  # from the head to the end of the body
CLOSE_SECONDS = 60.0  # for a reader to take what is left when all was written

CONNECTION = "connection"
"""In a scope's `state`: the connection itself."""


class TimedConnection(H11Protocol):
    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, {**app_state, CONNECTION: self}, _loop)
        self._awaited = ""  # what the timer runs for: "head", "body", "close"; "": none runs
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_gone(self) -> bool:
        return self.transport.is_closing()

    def drop(self) -> None:
        """End it now, whatever was written and not read."""
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as the class above
        super().connection_made(transport)
        self._wait_for("head", HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_for("", 0)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._look()

    def _look(self) -> None:
        """Start the timer of what is waited for now. Between two requests uvicorn's own timer runs."""
        theirs = self.conn.their_state
        if self.transport.is_closing():
            self._wait_for("close", CLOSE_SECONDS)
        elif theirs is h11.SEND_BODY:
            self._wait_for("body", BODY_SECONDS)
        elif theirs is h11.IDLE and (self._awaited == "head" or self.conn.trailing_data[0]):
            self._wait_for("head", HEAD_SECONDS)
        else:
            self._wait_for("", 0)

    def _wait_for(self, what: str, seconds: float) -> None:
        """A timer that runs for this very thing goes on: a byte now and then does not wind it up again."""
        if what == self._awaited:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._awaited = what
        self._timer = self.loop.call_later(seconds, self._give_up) if what else None

    def _give_up(self) -> None:
        if self._awaited == "close":
            self.drop()
        else:
            self.transport.close()
            self._wait_for("close", CLOSE_SECONDS)
