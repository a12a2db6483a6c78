"""What the routes share: the engine when it is there, what waits for it, and the steps from a body to its answer."""

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.responses import Response

from minigpt4.serving.http.bodies import ChatRequest
from minigpt4.serving.http.completions import Writer
from minigpt4.serving.http.limits import BodyReader
from minigpt4.serving.http.listening import AnswerStream, Listening, Mailbox, whole_answer
from minigpt4.serving.http.metrics import Metrics
from minigpt4.serving.http.openai_errors import ApiError, sentence_of
from minigpt4.serving.http.strict_json import read_json
from minigpt4.serving.pictures.opening import check_amount, open_messages
from minigpt4.serving.pictures.pool import PicturePool, Target
from minigpt4.serving.settings import Settings

if TYPE_CHECKING:
    from minigpt4.inference.engine import Engine  # loads torch
    from minigpt4.inference.request import Request as EngineRequest

T = TypeVar("T")

UNREAD_SECONDS = 0.2
"""How long a request has a place whose body is not read: one that sends slowly may not keep others out."""


@dataclass(eq=False)
class Place:
    """A place in the queue for a request that the engine does not have yet.

    Args:
        until: When it is given to others, by the monotonic clock.
    """

    until: float


class Desk:
    """Where requests are taken.

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
        self._places: set[Place] = set()
        # One thread: what it does holds the interpreter anyway, and tokenizers are not for two at once.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="desk")

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
    def is_ready(self) -> bool:
        """Whether requests are answered now."""
        return self._engine is not None and not self.closing

    @property
    def unfinished(self) -> int:
        """How many requests have been taken and not answered yet."""
        if self._engine is None:
            return 0
        counts = self._engine.counts
        return len(self._places) + counts.waiting + counts.answering

    def open(self, engine: "Engine") -> None:
        """Answer requests with an engine from now on."""
        self.metrics.watch(engine)
        self._engine = engine

    async def close(self) -> None:
        """Take no more requests, finish or give up those there are, and end the children."""
        self.closing = True
        self.bodies.close()
        if self._closed is None:
            self._closed = asyncio.create_task(self._close())
        await asyncio.shield(self._closed)

    def give_up(self) -> None:
        """Give up the answers in progress: an engine that computes while the interpreter ends would abort it."""
        if self._engine is not None:
            self._engine.close(0, patience=2)

    def check_room(self) -> None:
        """Refuse at once what would be refused in the end.

        Raises:
            ApiError: 429 without room, 503 while the model is loading.
        """
        engine = self.engine
        now = time.monotonic()
        if self.closing or sum(place.until > now for place in self._places) >= engine.room:
            self.metrics.refused += 1
            waiting = engine.counts.waiting
            raise ApiError(
                429,
                "the server is closing" if self.closing else f"the server has {waiting} requests waiting",
                "wait a few seconds and ask again",
                headers={"Retry-After": "2"},
            )

    def take_place(self) -> Place:
        """Keep a place for a request that arrives now, until the engine has it or the place is given back.

        Raises:
            ApiError: As `check_room`.
        """
        self.check_room()
        place = Place(time.monotonic() + UNREAD_SECONDS)
        self._places.add(place)
        return place

    def give_back(self, place: Place) -> None:
        """End a request's place."""
        self._places.discard(place)

    async def answer(self, http: Request, place: Place) -> Response:
        """Answer a chat completion that has a place.

        Raises:
            ApiError: With what is wrong, and where.
        """
        async with self.bodies.read(http) as body:  # what is read is let go before the answer begins
            if self.closing or place.until < time.monotonic():
                self.check_room()
            place.until = math.inf
            asked = await self._apart(partial(self._parsed, body))
            body.clear()  # its pictures are in memory a second time by now
            listening = await self._submitted(asked, place)
        options = asked.stream_options
        writer = Writer(self.settings.model_id, options is not None and options.include_usage)
        if asked.stream:
            return AnswerStream(listening, writer, self.settings.limits.ping_seconds)
        del asked, body  # hundreds of requests may wait, and their pictures are long
        return await whole_answer(listening, http, writer)

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
            with contextlib.suppress(TimeoutError):  # an answer that cannot be given up ends with the process
                await asyncio.wait_for(done.wait(), seconds + 0.5)
        self.pool.close()
        self._thread.shutdown(wait=False)

    def _parsed(self, body: bytearray) -> ChatRequest:
        limits = self.settings.limits
        try:
            asked = ChatRequest.model_validate(read_json(body, limits))
        except ValidationError as error:
            raise sentence_of(error) from error
        if asked.model is not None and asked.model != self.settings.model_id:
            raise ApiError(
                404, f"there is no model {asked.model[:80]!r} here", f"the model is {self.settings.model_id!r}",
                param="model", code="model_not_found",
            )  # fmt: skip
        if asked.stream_options is not None and not asked.stream:
            raise ApiError(400, "stream_options is for streams alone", "add stream: true", param="stream_options")
        self._check_length(asked)
        if (asked.num_beams or 1) > limits.max_beams:
            raise ApiError(
                400, f"num_beams is {asked.num_beams}, expected at most {limits.max_beams}", param="num_beams"
            )
        check_amount(asked.messages, self.settings)
        return asked

    def _check_length(self, asked: ChatRequest) -> None:
        """Refuse an answer longer than this server gives, or than the language model could read even by itself."""
        context = getattr(self.engine.model.config.text_config, "max_position_embeddings", None)
        most, hint = self.settings.limits.max_new_tokens, ""
        if context and context < most:
            most, hint = context, f"the language model reads {context} tokens, question and answer together"
        if (longest := asked.options.get("max_new_tokens", 0)) > most:
            name = "max_completion_tokens" if asked.max_completion_tokens else "max_tokens"
            message = f"{name} is {longest}, expected at most {most}"
            raise ApiError(400, message, hint, param=name, code="answer_too_long")

    async def _submitted(self, asked: ChatRequest, place: Place) -> Listening:
        engine = self.engine
        messages = await open_messages(asked.messages, self.settings, self.pool, target_of(engine))
        mailbox = Mailbox()

        def submit() -> "EngineRequest":
            submitted = engine.submit(
                messages,
                asked.options,
                mailbox,
                stop=asked.stop_strings,
                timeout=self.settings.limits.answer_seconds,
            )
            # Here, where it begins to count with the engine: counted twice, it would have another one refused.
            self.give_back(place)
            return submitted

        request = await self._apart(submit)
        return Listening(engine, request, mailbox, self.metrics.answered)

    async def _apart(self, work: Callable[[], T]) -> T:
        """Do something that takes a while off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def target_of(engine: "Engine") -> Target | None:
    """Return the size to which the model's processor would bring a picture, so that a decoder can do it."""
    processor = engine.processor.image_processor
    size = processor.size
    if not processor.do_resize or not size.height or not size.width:
        return None
    return Target(int(size.width), int(size.height), int(processor.resample))
