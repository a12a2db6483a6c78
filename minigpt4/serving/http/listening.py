"""Between the engine's thread and one client: what the engine says reaches the client, and its leaving the engine."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Literal

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minigpt4.serving.http.completions import Writer, event
from minigpt4.serving.http.openai_errors import ApiError, as_api_error, error_body

if TYPE_CHECKING:  # they load torch
    from minigpt4.inference.engine import Engine
    from minigpt4.inference.request import Event, Request

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ClientLeftError(Exception):
    """Nobody waits for the answer any more."""


class Mailbox:
    """Takes what the engine delivers, from its thread, to the event loop."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[Event | Literal[False]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[BaseException | None] = self._loop.create_future()
        """Done when the engine has ended the answer, with what went wrong; also when nobody listens any more."""

    def __call__(self, delivered: "Event") -> None:
        """Take one event."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended and nobody listens
            self._loop.call_soon_threadsafe(self._take, delivered)

    def _take(self, delivered: "Event") -> None:
        if not isinstance(delivered, str) and not self.ended.done():
            self.ended.set_result(delivered)
        self.events.put_nowait(delivered)

    def left(self) -> None:
        """Take the news that the client left."""
        self.events.put_nowait(False)


class Listening:
    """One client that waits for one answer.

    Args:
        engine: Answers.
        request: What it was asked.
        mailbox: Where it delivers to.
        answered: Told, once the engine has ended the answer, of the request and of what went wrong.
    """

    def __init__(
        self,
        engine: "Engine",
        request: "Request",
        mailbox: Mailbox,
        answered: Callable[["Request", BaseException | None], None],
    ) -> None:
        self.engine = engine
        self.request = request
        self.mailbox = mailbox
        # Not when the client leaves: the engine has not ended then, and its figures are not there yet.
        mailbox.ended.add_done_callback(lambda ended: answered(request, ended.result()))

    async def pieces(self, receive: Receive, ping_seconds: float | None) -> AsyncIterator[str | None]:
        """Yield text as it is said, and None when there was nothing to say for so many seconds.

        Args:
            receive: Where the client's leaving is heard.
            ping_seconds: None for no such signs.

        Raises:
            ClientLeftError: The client left; the engine knows already.
            ApiError: The answer failed or was given up.
        """
        watcher = asyncio.create_task(self._watch(receive))
        try:
            while True:
                try:
                    async with asyncio.timeout(ping_seconds):
                        heard = await self.mailbox.events.get()
                except TimeoutError:
                    yield None
                    continue
                if heard is None:
                    break
                if heard is False:
                    raise ClientLeftError
                if isinstance(heard, BaseException):
                    raise as_api_error(heard)
                yield heard
        finally:
            self.request.cancel()  # nothing, where it has ended
            watcher.cancel()
        if self.request.answer.finish_reason == "cancelled":
            raise ApiError(
                503, "the answer was given up: it took too long, or the server is closing",
                code="timeout", headers={"Retry-After": "10"},
            )  # fmt: skip

    @property
    def place(self) -> int:
        """How many are before this one; 0 when it is being answered."""
        return self.engine.place_in_queue(self.request)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.request.cancel()  # at once: whoever reads the mailbox may be busy sending
        self.mailbox.left()


async def whole_answer(listening: Listening, http: HttpRequest, writer: Writer) -> Response:
    """Wait for the whole answer."""
    try:
        async for _ in listening.pieces(http.receive, None):
            pass
    except ClientLeftError:
        return Response(status_code=499)
    return Response(writer.whole(listening.request.answer).model_dump_json(), media_type="application/json")


class AnswerStream(Response):
    """An answer as it is said: server-sent events.

    Args:
        listening: Whose pieces are sent.
        writer: Writes them.
        ping_seconds: Between comments while there is nothing to send.
    """

    media_type = "text/event-stream"

    def __init__(self, listening: Listening, writer: Writer, ping_seconds: float) -> None:
        self.listening = listening
        self.writer = writer
        self.ping_seconds = ping_seconds
        self.status_code = 200
        self.background = None
        self.init_headers(STREAM_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

        async def write(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            await write(self.writer.begin())
            async for piece in self.listening.pieces(receive, self.ping_seconds):
                await write(self._ping() if piece is None else self.writer.piece(piece))
        except ClientLeftError:
            return
        except ApiError as error:
            await write(event(error_body(error)), more=False)
            return
        await write(self.writer.end(self.listening.request.answer), more=False)

    def _ping(self) -> bytes:
        return f": ping {self.listening.place} waiting before this one\n\n".encode()
