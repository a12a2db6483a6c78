"""Timeouts of connections, for headers, bodies and reading, and a bound on their number; uvicorn has none of them."""

import asyncio
import json
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from minigpt4.serving.errors import ApiError, error_body
from minigpt4.serving.settings import Limits


def protocol_with(limits: Limits) -> type[asyncio.Protocol]:
    """Return the protocol for uvicorn's option `http`."""
    return type("BoundedProtocol", (_BoundedProtocol,), {"limits": limits, "idle": {}})


class _BoundedProtocol(H11Protocol):
    limits: ClassVar[Limits]
    idle: ClassVar[dict[Any, None]]  # connections without a request, the oldest first

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._waits_for: str = ""
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            oldest = next(iter(self.idle), self)
            oldest._wait_for("")
            oldest.transport.abort()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_for("")
        self._was_read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.limits.write_seconds, self._abort)

    def resume_writing(self) -> None:
        self._was_read()
        super().resume_writing()

    def _was_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "this is not HTTP that can be understood, or its headers are too long"))

    def _watch(self) -> None:
        """Set the deadline for what the client has to send next."""
        if self.transport.is_closing():
            self._wait_for("")
        elif self.conn.their_state is h11.SEND_BODY:
            self._wait_for("body")
        elif self.conn.their_state is h11.IDLE and not self.timeout_keep_alive_task:
            self._wait_for("headers")
        else:
            self._wait_for("")

    def _wait_for(self, what: str) -> None:
        if what == self._waits_for:
            return
        self._waits_for = what
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self.idle.pop(self, None)
        if what == "headers":
            self.idle[self] = None
            self._deadline = self.loop.call_later(self.limits.header_seconds, self._too_slow)
        elif what == "body":
            # The application has a deadline of its own, and words for it; this one is for bodies it does not read.
            self._deadline = self.loop.call_later(self.limits.body_seconds + 2, self._abort)

    def _too_slow(self) -> None:
        if self.conn.our_state is h11.IDLE and not self.transport.is_closing():
            self._refuse(ApiError(408, "the headers did not arrive in time"))
        self.loop.call_later(1, self._abort)

    def _refuse(self, error: ApiError) -> None:
        """Answer what is no request and close; only close where an answer has begun, or may have no body."""
        state = self.conn.our_state
        asked = state is h11.SEND_RESPONSE
        if asked:
            self.cycle.disconnected = True  # the application has nobody to answer any more
            self.cycle.message_event.set()
        if not (asked or state is h11.IDLE) or (asked and self.scope["method"] == "HEAD"):
            self.transport.close()
            return
        body = json.dumps(error_body(error)).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        response = h11.Response(status_code=error.http_status, headers=headers)
        events = (response, h11.Data(data=body), h11.EndOfMessage())
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()

    def _abort(self) -> None:
        self.transport.abort()
