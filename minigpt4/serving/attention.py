"""`POST /v1/attention`, an extension of the API: a conversation in, a map of where the model looked out."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from fastapi import Request

from minigpt4.errors import UsageError
from minigpt4.serving.errors import ApiError
from minigpt4.serving.pictures import open_messages
from minigpt4.serving.requests import RequestHandler
from minigpt4.serving.schema import AttentionAnswer, AttentionRequest

MAX_WAITING = 4
"""Maps in the making and waiting; a map takes as long as reading its conversation three times."""


class AttentionHandler:
    """Maker of attention maps, one after the other in a thread of its own.

    Args:
        handler: Has the engine, whose model is used.
    """

    def __init__(self, handler: RequestHandler) -> None:
        self.handler = handler
        self._waiting = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="attention")

    async def look(self, http: Request) -> AttentionAnswer:
        """Return the map that a request asks for.

        Raises:
            ApiError: With what is wrong, and where.
            UsageError: The model has no such maps.
        """
        handler = self.handler
        if not handler.info.has_attention_maps:
            raise UsageError(
                "this model has no Q-Former, so there is no cross-attention to show",
                hint="nano and MiniGPT-4 with Vicuna have one",
            )
        self._check_room()
        async with handler.bodies.read(http) as body:
            asked = await asyncio.to_thread(handler.parse, body, AttentionRequest)
            body.clear()
        self._check_room()  # only from here on it takes room: a slow body keeps nobody out
        self._waiting += 1
        try:
            messages = await open_messages(asked.messages, handler.settings, handler.pool, handler.info.image_size)
            span = None if asked.span is None else (asked.span[0], asked.span[1])
            loop = asyncio.get_running_loop()
            seen = await loop.run_in_executor(
                self._thread, lambda: handler.engine.backend.attention_map(messages, span)
            )
        finally:
            self._waiting -= 1
        model = handler.settings.model_id
        return AttentionAnswer(model=model, of=seen.of, text=seen.text, values=seen.values)

    def _check_room(self) -> None:
        if self.handler.closing:
            raise ApiError(503, "the server is closing")
        if self._waiting >= MAX_WAITING:
            message = f"{self._waiting} maps are being made or wait already"
            raise ApiError(429, message, "wait a few seconds", headers={"Retry-After": "5"})
