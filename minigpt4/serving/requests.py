"""Requests on their way to the engine: admission to its queue, parsing and pictures; and the end of a server."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.responses import Response

from minigpt4.serving.bodies import BodyReader, read_json
from minigpt4.serving.errors import ApiError, validation_error
from minigpt4.serving.metrics import Metrics
from minigpt4.serving.pictures import PicturePool, open_messages
from minigpt4.serving.schema import AttentionRequest, ChatRequest, ImagePart, Message
from minigpt4.serving.settings import Settings
from minigpt4.serving.streaming import AnswerStream, EventQueue, PendingAnswer, Writer, whole_answer

if TYPE_CHECKING:
    from minigpt4.inference.backends.protocol import ModelInfo
    from minigpt4.inference.engine import Engine
    from minigpt4.inference.request import Request as EngineRequest

T = TypeVar("T")
Asked = TypeVar("Asked", ChatRequest, AttentionRequest)


class RequestHandler:
    """What the routes share: the engine once it is loaded, admission, and the steps from a body to its answer.

    Args:
        settings: Limits and names.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.bodies = BodyReader(settings.limits)
        self.pool = PicturePool(settings.limits.image, children=settings.decoders)
        self.metrics = Metrics(self.pool)
        self.closing = False
        self.started = int(time.time())
        self._engine: Engine | None = None
        self._closed: asyncio.Task[None] | None = None
        self._preparing: set[Request] = set()  # admitted and read, and not the engine's yet
        # One thread: what it does holds the interpreter anyway, and tokenizers are not for two at once.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="requests")

    @property
    def engine(self) -> "Engine":
        """The engine.

        Raises:
            ApiError: 503 while the model is loading.
        """
        if self._engine is None:
            raise ApiError(503, "the model is still loading", code="loading", headers={"Retry-After": "5"})
        return self._engine

    @property
    def info(self) -> "ModelInfo":
        """The model; raises as `engine` does."""
        return self.engine.info

    @property
    def is_ready(self) -> bool:
        """Whether requests are answered now."""
        return self._engine is not None and not self.closing

    @property
    def unfinished(self) -> int:
        """How many requests have been admitted and not answered yet."""
        if self._engine is None:
            return 0
        counts = self._engine.counts
        return len(self._preparing) + counts.waiting + counts.answering

    def open(self, engine: "Engine") -> None:
        """Answer requests with an engine from now on."""
        self.metrics.watch(engine)
        self._engine = engine

    async def close(self) -> None:
        """Refuse new requests, finish or cancel those there are, and end the children."""
        self.closing = True
        self.bodies.close()
        if self._closed is None:
            self._closed = asyncio.create_task(self._close())
        await asyncio.shield(self._closed)

    def cancel_all(self) -> None:
        """Cancel the answers in progress: an engine that computes while the interpreter ends would abort it."""
        if self._engine is not None:
            self._engine.close(0, patience=2)

    def check_room(self) -> None:
        """Refuse at once what the engine would refuse in the end.

        Raises:
            ApiError: 429 without room, 503 while the model is loading.
        """
        engine = self.engine
        if self.closing or len(self._preparing) >= engine.room:
            self.metrics.refused += 1
            raise ApiError(
                429,
                "the server is closing" if self.closing else f"the server has {engine.counts.waiting} requests waiting",
                "wait a few seconds and ask again",
                headers={"Retry-After": "2"},
            )

    async def chat(self, http: Request) -> Response:
        """Answer a chat completion that was admitted (`check_room`).

        Raises:
            ApiError: With what is wrong, and where.
            ConnectionError: The client left.
        """
        async with self.bodies.read(http) as body:  # what is read is let go before the answer begins
            self.check_room()  # again: only from here on it takes room, so that a slow body keeps nobody out
            self._preparing.add(http)
            try:
                asked = await self.run(partial(self._parsed_chat, body))
                body.clear()  # its pictures are in memory a second time by now
                pending = await self._submit(asked, http)
            finally:
                self._preparing.discard(http)
        options = asked.stream_options
        writer = Writer(self.settings.model_id, options is not None and options.include_usage)
        if asked.stream:
            return AnswerStream(pending, writer, self.settings.limits.ping_seconds)
        del asked, body  # hundreds of requests may wait, and their pictures are long
        return await whole_answer(pending, http, writer)

    def parse(self, body: bytearray, form: type[Asked]) -> Asked:
        """Return a body as a request of one kind, its model's name and its amount of messages checked.

        Raises:
            ApiError: 400 or 404, naming the field.
        """
        try:
            asked = form.model_validate(read_json(body, self.settings.limits))
        except ValidationError as error:
            raise validation_error(error) from error
        if asked.model is not None and asked.model != self.settings.model_id:
            raise ApiError(
                404, f"there is no model {asked.model[:80]!r} here", f"the model is {self.settings.model_id!r}",
                param="model", code="model_not_found",
            )  # fmt: skip
        self._check_amount(asked.messages)
        return asked

    async def run(self, work: Callable[[], T]) -> T:
        """Do something that takes a while off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _close(self) -> None:
        if self._engine is not None:
            seconds = self.settings.limits.drain_seconds
            done, loop = asyncio.Event(), asyncio.get_running_loop()

            def close(engine: "Engine") -> None:
                engine.close(seconds)
                with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waited so long
                    loop.call_soon_threadsafe(done.set)

            # Not a thread of a pool: the interpreter would wait for those when it has to end at once.
            threading.Thread(target=close, args=[self._engine], daemon=True).start()
            with contextlib.suppress(TimeoutError):  # an answer that cannot be cancelled ends with the process
                await asyncio.wait_for(done.wait(), seconds + 0.5)
        await self.pool.close()
        self._thread.shutdown(wait=False)

    def _parsed_chat(self, body: bytearray) -> ChatRequest:
        asked, limits = self.parse(body, ChatRequest), self.settings.limits
        if asked.stream_options is not None and not asked.stream:
            raise ApiError(400, "stream_options is for streams alone", "add stream: true", param="stream_options")
        most, hint, context = limits.max_new_tokens, "", self.info.context
        if context and context < most:
            most, hint = context, f"the language model reads {context} tokens, question and answer together"
        if (longest := asked.options.get("max_new_tokens", 0)) > most:
            name = "max_completion_tokens" if asked.max_completion_tokens else "max_tokens"
            message = f"{name} is {longest}, expected at most {most}"
            raise ApiError(400, message, hint, param=name, code="answer_too_long")
        if (asked.num_beams or 1) > limits.max_beams:
            message = f"num_beams is {asked.num_beams}, expected at most {limits.max_beams}"
            raise ApiError(400, message, param="num_beams")
        return asked

    def _check_amount(self, messages: Sequence[Message]) -> None:
        """Refuse more messages, text or pictures than a request may bring, before a picture is looked at."""
        limits = self.settings.limits
        parts = [part for message in messages if isinstance(message.content, list) for part in message.content]
        texts = [message.content for message in messages if isinstance(message.content, str)]
        texts += [part.text for part in parts if not isinstance(part, ImagePart)]
        for count, most, what in (
            (len(messages), limits.max_messages, "messages"),
            (sum(isinstance(part, ImagePart) for part in parts), limits.max_pictures, "pictures"),
            (sum(map(len, texts)), limits.max_text, "characters of text"),
        ):
            if count > most:
                raise ApiError(400, f"the request has {count} {what}, expected at most {most}", param="messages")

    async def _submit(self, asked: ChatRequest, http: Request) -> PendingAnswer:
        engine, queue = self.engine, EventQueue()
        messages = await open_messages(asked.messages, self.settings, self.pool, self.info.image_size)

        def submit() -> "EngineRequest":
            submitted = engine.submit(
                messages, asked.options, queue, stop=asked.stop_strings, timeout=self.settings.limits.answer_seconds
            )
            # Here, where it begins to count with the engine: counted twice, it would have another one refused.
            self._preparing.discard(http)
            return submitted

        return PendingAnswer(engine, await self.run(submit), queue, self.metrics.answered)
