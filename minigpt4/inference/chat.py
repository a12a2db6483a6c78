"""A conversation about pictures: questions in, streamed answers out, over an `Engine`."""

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4.errors import PromptError
from minigpt4.inference.engine import Engine
from minigpt4.inference.prefix_cache import ImageCache
from minigpt4.inference.request import Answer, Event, Request
from minigpt4.processing.pictures import PictureSource, content_hash, open_image

if TYPE_CHECKING:
    from minigpt4.model import MiniGPT4ForConditionalGeneration
    from minigpt4.processing import MiniGPT4Processor

__all__ = ["Answer", "ChatSession", "ImageCache"]


class ChatSession:
    """One conversation with one model.

    Args:
        model: A loaded model, or nano, a folder or a hub id.
        processor: Of a loaded model.
        template: Name of the prompt template; default the one in the model folder.
        system: System message; default the template's own.
        image_cache: Shared between sessions where given.
        options: As for `Engine`: `engine`, `device`, `dtype`, `quantize`.
    """

    def __init__(
        self,
        model: "str | Path | MiniGPT4ForConditionalGeneration",
        processor: "MiniGPT4Processor | None" = None,
        *,
        template: str | None = None,
        system: str | None = None,
        image_cache: ImageCache | None = None,
        **options: Any,
    ) -> None:
        self.engine = Engine(model, processor, template=template, max_concurrent=1, image_cache=image_cache, **options)
        self.system = system
        backend: Any = self.engine.backend
        self.model: MiniGPT4ForConditionalGeneration = backend.model
        self.processor: MiniGPT4Processor = backend.processor
        self.template = self.engine.backend.template
        self.answer = Answer()
        self._messages: list[dict[str, Any]] = []
        self._waiting: list[dict[str, Any]] = []
        self._request: Request | None = None
        self._answering = False

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far: `{"role", "content"}`, the content a list of `text` and `image` parts."""
        return [
            {**message, "content": [_without_key(part) for part in message["content"]]} for message in self._messages
        ]

    def add_image(self, source: PictureSource) -> None:
        """Add a picture; it belongs to the next question.

        Raises:
            ImageError: It cannot be opened.
            PromptError: An answer is in progress.
        """
        self._refuse_while_answering()
        picture = open_image(source)
        self._waiting.append({"type": "image", "image": picture, "key": content_hash(picture)})

    def ask(self, question: str, **options: Any) -> str:
        """Return the whole answer; see `stream`."""
        for _ in self.stream(question, **options):
            pass
        return self.answer.text

    def stream(self, question: str, **options: Any) -> Iterator[str]:
        """Ask, and yield the answer piece by piece; with beams, in one piece.

        The question joins the conversation when its answer is complete or cancelled; after an error, or when the
        caller stops reading, the conversation is as it was before and the pictures still wait.

        Args:
            question: Any text.
            options: `max_new_tokens` (default 300), `num_beams`, `temperature` (0, the default, for the likeliest
                answer), `top_p`, `top_k`, `min_p`, `repetition_penalty` (on ids of the answer), `length_penalty`,
                `min_length` (in new tokens), `seed`.

        Raises:
            UsageError: An option that does not exist or is out of its range.
            PromptError: The conversation cannot be turned into a prompt, or an answer is in progress.
            ContextOverflowError: It and `max_new_tokens` do not fit the language model's context.
        """
        self._refuse_while_answering()
        asked = {"role": "user", "content": [*self._waiting, {"type": "text", "text": question}]}
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        events: queue.Queue[Event] = queue.Queue()
        self._answering = True
        try:
            self._request = self.engine.submit([*system, *self._messages, asked], options, events.put)
            self.answer = self._request.answer
            yield from self._pieces(self._request, events)
        finally:
            self._request, self._answering = None, False
        self._messages += [asked, {"role": "assistant", "content": [{"type": "text", "text": self.answer.text}]}]
        self._waiting = []

    def cancel(self) -> None:
        """Stop the answer in progress, from any thread, within one token; what was generated so far stays."""
        if (request := self._request) is not None:
            request.cancel()

    def undo(self) -> None:
        """Take back the last question, its pictures and its answer.

        Raises:
            PromptError: There is none, or an answer is in progress.
        """
        self._refuse_while_answering()
        if not self._messages:
            raise PromptError("there is no question to take back")
        del self._messages[-2:]

    def reset(self) -> None:
        """Forget the conversation; the embeddings of its pictures are kept.

        Raises:
            PromptError: An answer is in progress.
        """
        self._refuse_while_answering()
        self._messages, self._waiting = [], []
        self.engine.prefix_cache.clear()

    def _refuse_while_answering(self) -> None:
        if self._answering:
            raise PromptError("an answer is in progress", hint="read it to its end, or close its iterator")

    @staticmethod
    def _pieces(request: Request, events: "queue.Queue[Event]") -> Iterator[str]:
        """Yield text as it comes; an answer nobody reads any more has ended when this has."""
        event: Event = ""
        try:
            while (event := events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            request.cancel()
            while event is not None and not isinstance(event, BaseException):
                event = events.get()


def _without_key(part: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name != "key"}
