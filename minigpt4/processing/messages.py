"""Messages as clients send them, checked and reduced to what a prompt template needs.

The form is the one of the OpenAI API and of transformers' chat templates. This file knows roles, parts and limits;
it knows no template and no tokenizer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minigpt4.errors import PromptError

Message = Mapping[str, object]

MAX_MESSAGE_CHARACTERS = 32_768
"""The longest text of one message; four times what a context of 8,192 tokens holds in the worst case."""

IMAGE_PARTS = ("image", "image_url")
"""Types of content parts that stand for a picture: transformers' and OpenAI's."""

_FORM_HINT = 'a message is {"role": "user", "content": "..."}; content may also be a list of text and image parts'
_ORDER_HINT = "send an optional system message, then user and assistant messages in turn, beginning with the user's"


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        role: "system", "user" or "assistant".
        text: Its text parts, joined by line breaks.
        num_images: How many pictures it brings.
    """

    role: str
    text: str
    num_images: int


def read_turns(messages: Sequence[Message], *, answer_wanted: bool) -> list[Turn]:
    """Check a conversation and return its turns, at most one of the system first, then user and assistant in turn.

    Args:
        messages: See `PromptTemplate.render`.
        answer_wanted: The conversation must end with a user's message.

    Raises:
        PromptError: Names the message, the value found there and what was expected.
    """
    turns = [_read_message(message, f"messages[{position}]") for position, message in enumerate(messages)]
    expected: tuple[str, ...] = ("system", "user")
    for position, turn in enumerate(turns):
        if turn.role not in expected:
            raise PromptError(
                f"messages[{position}] has the role {turn.role!r}, expected {' or '.join(map(repr, expected))}",
                _ORDER_HINT,
            )
        expected = ("assistant",) if turn.role == "user" else ("user",)
    if answer_wanted and (not turns or turns[-1].role != "user"):
        last = f"messages[{len(turns) - 1}] has the role {turns[-1].role!r}" if turns else "There are no messages"
        raise PromptError(f"{last}, expected 'user' at the end of a conversation that waits for an answer", _ORDER_HINT)
    return turns


def _read_message(message: Message, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise PromptError(f"{where} is {_shown(message)}, expected a mapping with role and content", _FORM_HINT)
    role = message.get("role")
    if not isinstance(role, str) or role not in ("system", "user", "assistant"):
        raise PromptError(f"{where} has the role {_shown(role)}, expected 'system', 'user' or 'assistant'", _ORDER_HINT)
    text, num_images = _read_content(message.get("content"), where)
    if len(text) > MAX_MESSAGE_CHARACTERS:
        raise PromptError(
            f"{where} has {len(text)} characters of text, expected at most {MAX_MESSAGE_CHARACTERS}",
            "shorten the message",
        )
    if num_images and role != "user":
        raise PromptError(f"{where} has a picture and the role {role!r}, expected 'user'", "send pictures as the user")
    if role == "user" and not num_images and not text.strip():
        raise PromptError(f"{where} is empty, expected a question or a picture", "ask something")
    return Turn(role, text, num_images)


def _read_content(content: object, where: str) -> tuple[str, int]:
    """Return the text of a message and the number of its pictures."""
    if isinstance(content, str):
        return content, 0
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise PromptError(f"{where}.content is {_shown(content)}, expected a string or a list of parts", _FORM_HINT)
    texts: list[str] = []
    for position, part in enumerate(content):
        place = f"{where}.content[{position}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            texts.append(_read_text(part.get("text"), place))
        elif kind not in IMAGE_PARTS:
            found = f"has the type {_shown(kind)}" if isinstance(part, Mapping) else f"is {_shown(part)}"
            raise PromptError(f"{place} {found}, expected a part of type 'text' or 'image'", _FORM_HINT)
    return "\n".join(texts), len(content) - len(texts)


def _read_text(text: object, place: str) -> str:
    if not isinstance(text, str):
        raise PromptError(f"{place}.text is {_shown(text)}, expected a string", _FORM_HINT)
    return text


def _shown(value: object) -> str:
    """Name a foreign value in a few characters: it may be a picture, or a megabyte of text."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else f"{value[:40]}...")
    return f"a {type(value).__name__}"
