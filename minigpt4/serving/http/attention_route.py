"""`POST /v1/attention`, an extension of the API: a conversation in, a map of where the model looked out."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from minigpt4.serving.http.bodies import Message
from minigpt4.serving.http.desk import Desk, target_of
from minigpt4.serving.http.openai_errors import ApiError, sentence_of
from minigpt4.serving.http.strict_json import read_json
from minigpt4.serving.pictures.opening import check_amount, open_messages

if TYPE_CHECKING:
    from minigpt4.inference.attention import AttentionMaps  # loads torch

MAX_WAITING = 4
"""Maps in the making and waiting; a map takes as long as reading its conversation three times.

Bodies that are still arriving are none of them: `BodyReader` bounds those, in number of bytes and in time.
"""


class AttentionRequest(BaseModel):
    """The body of `POST /v1/attention`."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    messages: Annotated[
        list[Message],
        Field(
            min_length=1, description="As for a chat completion; the last may be the assistant's, which is meant then."
        ),
    ]
    model: str | None = None
    span: Annotated[
        list[Annotated[int, Field(ge=0, le=1_000_000)]] | None,
        Field(
            min_length=2,
            max_length=2,
            description="First character and the one after the last of the answer's words that are meant; else all.",
        ),
    ] = None


class AttentionAnswer(BaseModel):
    """Where the model looked."""

    object: Literal["attention_map"] = "attention_map"
    model: str
    of: Literal["picture", "answer"]
    text: str
    values: list[list[float]]


def add_attention(app: FastAPI, desk: Desk, responses: dict[int | str, dict[str, Any]] | None = None) -> None:
    """Add the route to an application.

    Args:
        app: The application.
        desk: Has the engine, whose model is used.
        responses: How its errors are described.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="attention")
    made: list[AttentionMaps] = []
    waiting = 0

    def maps() -> "AttentionMaps":
        from minigpt4.inference.attention import AttentionMaps

        if not made:
            made.append(AttentionMaps(desk.engine.model, desk.engine.processor))
        return made[0]

    def check_room() -> None:
        if desk.closing:
            raise ApiError(503, "the server is closing")
        if waiting >= MAX_WAITING:
            said = f"{waiting} maps are being made or wait already"
            raise ApiError(429, said, "wait a few seconds", headers={"Retry-After": "5"})

    schema = {"$ref": "#/components/schemas/AttentionRequest"}

    @app.post(
        "/v1/attention",
        responses=responses,
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
    )
    async def look(http: Request) -> AttentionAnswer:
        """Say where the model looked on the last picture: a grid of numbers from 0 to 1 over the whole of it."""
        nonlocal waiting
        from minigpt4.inference.attention import check_can_look

        check_can_look(desk.engine.model)
        check_room()
        async with desk.bodies.read(http) as body:
            asked = await asyncio.to_thread(_parsed, body, desk)
            body.clear()
        check_room()  # only now: a place taken before would be held by whoever sends slowly
        waiting += 1
        try:
            messages = await open_messages(asked.messages, desk.settings, desk.pool, target_of(desk.engine))
            span = None if asked.span is None else (asked.span[0], asked.span[1])
            loop = asyncio.get_running_loop()
            seen = await loop.run_in_executor(thread, lambda: maps().look(messages, span))
        finally:
            waiting -= 1
        return AttentionAnswer.model_validate(
            {"model": desk.settings.model_id, "of": seen.of, "text": seen.text, "values": seen.values}
        )


def _parsed(body: bytearray, desk: Desk) -> AttentionRequest:
    try:
        asked = AttentionRequest.model_validate(read_json(body, desk.settings.limits))
    except ValidationError as error:
        raise sentence_of(error) from error
    if asked.model is not None and asked.model != desk.settings.model_id:
        raise ApiError(
            404, f"there is no model {asked.model[:80]!r} here", f"the model is {desk.settings.model_id!r}",
            param="model", code="model_not_found",
        )  # fmt: skip
    check_amount(asked.messages, desk.settings)
    return asked
