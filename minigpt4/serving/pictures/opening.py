"""Messages of a request to messages of the engine: their pictures counted, fetched, decoded and named by content."""

from collections.abc import Sequence
from typing import Any

from minigpt4.errors import ImageError
from minigpt4.serving.http.bodies import ImagePart, Message
from minigpt4.serving.http.openai_errors import ApiError
from minigpt4.serving.pictures.fetching import fetch_picture
from minigpt4.serving.pictures.pool import PicturePool, Target
from minigpt4.serving.settings import Settings


def check_amount(messages: Sequence[Message], settings: Settings) -> None:
    """Refuse more messages, text or pictures than a request may bring, before a picture is looked at.

    Raises:
        ApiError: 400, naming the number and the limit.
    """
    limits = settings.limits
    parts = [part for message in messages if isinstance(message.content, list) for part in message.content]
    pictures = sum(isinstance(part, ImagePart) for part in parts)
    text = sum(len(part.text) for part in parts if not isinstance(part, ImagePart))
    text += sum(len(message.content) for message in messages if isinstance(message.content, str))
    for count, most, what in (
        (len(messages), limits.max_messages, "messages"),
        (pictures, limits.max_pictures, "pictures"),
        (text, limits.max_text, "characters of text"),
    ):
        if count > most:
            raise ApiError(400, f"the request has {count} {what}, expected at most {most}", param="messages")


async def open_messages(
    messages: Sequence[Message], settings: Settings, pool: PicturePool, target: Target | None
) -> list[dict[str, Any]]:
    """Turn messages into the engine's, with every picture decoded.

    Args:
        messages: As they were asked.
        settings: Limits and hosts.
        pool: Decodes.
        target: The size that the model reads.

    Raises:
        ApiError: 400, naming the part whose picture is refused; 503, no decoder was free.
    """
    left = settings.limits.max_total_pixels
    opened: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        if isinstance(message.content, str):
            opened.append({"role": role, "content": message.content})
            continue
        parts: list[dict[str, Any]] = []
        for place, part in enumerate(message.content):
            if not isinstance(part, ImagePart):
                parts.append({"type": "text", "text": part.text})
                continue
            param = f"messages[{number}].content[{place}].image_url.url"
            try:
                decoded = await pool.decode(await _source(part.image_url.url, settings), target, left)
            except ImageError as error:
                raise ApiError(400, error.message, error.hint, param=param, code="invalid_image") from error
            left -= decoded.pixels
            parts.append({"type": "image", "image": decoded.image, "key": decoded.key})
        opened.append({"role": role, "content": parts})
    return opened


async def _source(url: str, settings: Settings) -> str | bytes:
    if url[:5].lower() == "data:":
        return url
    return await fetch_picture(url, settings.image_hosts, settings.limits.image.max_bytes)
