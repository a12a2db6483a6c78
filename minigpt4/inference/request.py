"""One answer that was asked for: what it needs, how it stands, and how it is given up."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from minigpt4.inference.chat import Answer

Event = str | BaseException | None
"""A piece of text, what went wrong, or the end."""


@dataclass(eq=False)
class Request:
    """One answer that was asked for.

    Args:
        ids: The prompt.
        pictures: Its pictures, in order: content and picture.
        options: As `generation_options` returns them.
        stop_strings: End the answer, besides the template's own.
        deliver: Told of every event, from the engine's thread.
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
        """Whether nobody waits for it any more: it was cancelled, or its deadline has passed."""
        return self.cancelled or (self.deadline is not None and time.monotonic() > self.deadline)


@dataclass(frozen=True)
class Counts:
    """How the engine stands."""

    waiting: int
    answering: int
    accepted: int
    completed: int
    cancelled: int
    failed: int
    refused: int
