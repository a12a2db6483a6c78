"""Answers on their way from the engine's thread to a client, whole or as server-sent events, and cancellation back."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minigpt4.serving.errors import ApiError, as_api_error, error_body
from minigpt4.serving.schema import AnswerMessage, ChatCompletion, Choice, FinishReason, finish_reason, usage

if TYPE_CHECKING:  # they load torch
    from minigpt4.inference.engine import Engine
    from minigpt4.inference.request import Answer, Event, Request


class EventQueue:
    """Queue from the engine's thread to the event loop, for one answer."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[Event | Literal[False]] = asyncio.Queue()  # False: the client left
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[BaseException | None] = self._loop.create_future()
        """Done when the engine has ended the answer, with its error, whether a client still waits or not."""

    def __call__(self, delivered: "Event") -> None:
        """Add an event, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self._add, delivered)

    def _add(self, delivered: "Event") -> None:
        if not isinstance(delivered, str) and not self.ended.done():
            self.ended.set_result(delivered)
        self.events.put_nowait(delivered)


class PendingAnswer:
    """An answer that a client waits for.

    Args:
        engine: Answers.
        request: What it was asked.
        queue: Where it delivers to.
        on_end: Called with the request and its error when the engine has ended it, which is after a client left.
    """

    def __init__(
        self,
        engine: "Engine",
        request: "Request",
        queue: EventQueue,
        on_end: Callable[["Request", BaseException | None], None],
    ) -> None:
        self.engine = engine
        self.request = request
        self.queue = queue
        queue.ended.add_done_callback(lambda ended: on_end(request, ended.result()))

    async def pieces(self, receive: Receive, ping_seconds: float | None = None) -> AsyncIterator[str | None]:
        """Yield the text piece by piece, and None when there was none for so many seconds.

        Raises:
            ConnectionError: The client left; the request is cancelled.
            ApiError: The answer failed or was cancelled.
        """
        watcher = asyncio.create_task(self._watch(receive))
        try:
            while True:
                try:
                    async with asyncio.timeout(ping_seconds):
                        event = await self.queue.events.get()
                except TimeoutError:
                    yield None
                    continue
                if event is None:
                    break
                if event is False:
                    raise ConnectionError("the client left")
                if isinstance(event, BaseException):
                    raise as_api_error(event)
                yield event
        finally:
            self.request.cancel()  # nothing, where it has ended
            watcher.cancel()
        if self.request.answer.finish_reason == "cancelled":
            raise ApiError(
                503, "the answer was given up: it took too long, or the server is closing",
                code="timeout", headers={"Retry-After": "10"},
            )  # fmt: skip

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.request.cancel()  # at once: the reader of the queue may be busy sending
        self.queue.events.put_nowait(False)


@dataclass(frozen=True)
class Writer:
    """Writer of one answer in OpenAI's form.

    Args:
        model: What the client calls the model.
        with_usage: Whether a stream ends with the usage.
    """

    model: str
    with_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: "Answer") -> ChatCompletion:
        """Return a complete answer."""
        choice = Choice(message=AnswerMessage(content=answer.text), finish_reason=finish_reason(answer))
        return ChatCompletion(id=self.id, created=self.created, model=self.model, choices=[choice], usage=usage(answer))

    def chunk(self, delta: dict[str, Any], reason: FinishReason | None = None) -> bytes:
        """Return a chunk of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self._event({"choices": [choice]} | ({"usage": None} if self.with_usage else {}))

    def end(self, answer: "Answer") -> bytes:
        """Return the last chunks of a stream."""
        written = self.chunk({}, finish_reason(answer))
        if self.with_usage:
            written += self._event({"choices": [], "usage": usage(answer).model_dump()})
        return written + b"data: [DONE]\n\n"

    def _event(self, content: dict[str, Any]) -> bytes:
        head = {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}
        return event(head | content)


def event(content: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


async def whole_answer(pending: PendingAnswer, http: HttpRequest, writer: Writer) -> Response:
    """Wait for a complete answer and return it."""
    async for _ in pending.pieces(http.receive):
        pass
    return Response(writer.whole(pending.request.answer).model_dump_json(), media_type="application/json")


class AnswerStream(Response):
    """An answer as server-sent events, with comments while there is no text.

    Args:
        pending: The answer.
        writer: Writes its pieces.
        ping_seconds: Between comments.
    """

    media_type = "text/event-stream"

    def __init__(self, pending: PendingAnswer, writer: Writer, ping_seconds: float) -> None:
        self.pending = pending
        self.writer = writer
        self.ping_seconds = ping_seconds
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

        async def write(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        pending = self.pending
        try:
            await write(self.writer.chunk({"role": "assistant", "content": ""}))
            async for piece in pending.pieces(receive, self.ping_seconds):
                if piece is None:
                    before = pending.engine.queue_position(pending.request)
                    await write(f": ping {before} waiting before this one\n\n".encode())
                else:
                    await write(self.writer.chunk({"content": piece}))
        except ApiError as error:
            await write(event(error_body(error)), more=False)
            return
        await write(self.writer.end(pending.request.answer), more=False)
