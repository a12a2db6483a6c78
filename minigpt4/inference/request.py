"""One answer that was asked for: its prompt, its options, its state and its result."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

Event = str | BaseException | None
"""A piece of text, an error, or the end."""


@dataclass
class Answer:
    """An answer and what it took.

    Args:
        text: What was generated, without its stop string.
        finish_reason: `"stop"` (the model ended), `"length"` (`max_new_tokens` reached) or `"cancelled"`.
        prompt_tokens: Ids of the whole conversation up to the answer, image tokens included.
        cached_tokens: How many of those were in the prefix cache.
        completion_tokens: Ids of the answer, its end symbol included.
        seconds_to_first_token: From the request to the first id.
        seconds: From the request to the last id.
    """

    text: str = ""
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds_to_first_token: float = 0.0
    seconds: float = 0.0


@dataclass(eq=False)
class Request:
    """One answer that was asked for.

    Args:
        ids: The prompt.
        pictures: Its pictures in order: content hash and picture.
        options: As `generation_options` returns them.
        stop_strings: End the answer; they are no part of it.
        deliver: Receives every event, from the engine's thread.
        deadline: When it is given up, of `time.monotonic`; None for never.
    """

    ids: list[int]
    pictures: list[tuple[str, Image.Image]]
    options: dict[str, Any]
    stop_strings: tuple[str, ...]
    deliver: Callable[[Event], None]
    deadline: float | None = None
    answer: Answer = field(default_factory=Answer)
    asked_at: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    state: Literal["waiting", "answering", "done"] = "waiting"

    def cancel(self) -> None:
        """Give it up, from any thread, within one token."""
        self.cancelled = True

    @property
    def given_up(self) -> bool:
        """Whether it was cancelled or its deadline has passed."""
        return self.cancelled or (self.deadline is not None and time.monotonic() > self.deadline)


@dataclass(frozen=True)
class Counts:
    """Requests of an engine by state: the first two now, the others since it began."""

    waiting: int
    answering: int
    accepted: int
    completed: int
    cancelled: int
    failed: int
    refused: int
