"""One model and several requests at once: a bounded queue, answers in progress, and what they share.

Requests wait in the order they came; up to `max_concurrent` are answered together, one token of each at a time, also
between the tokens of a beam search, of which there is one at a time. Image embeddings and prefixes of conversations are
computed once. A cancelled request, or one whose deadline has passed, frees its slot within one token. An error ends the
answers it concerns, never the engine. Knows no HTTP and no tensors: the run time is a `Backend`.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4.errors import ContextOverflowError, ServerBusyError
from minigpt4.inference.backends import load_backend
from minigpt4.inference.backends.protocol import Backend, Logits, ModelInfo
from minigpt4.inference.detokenizer import Detokenizer
from minigpt4.inference.prefix_cache import ImageCache, Prefix, PrefixCache
from minigpt4.inference.request import Answer, Counts, Event, Request
from minigpt4.inference.sampling import Sampler, generation_options
from minigpt4.processing.pictures import content_hash, open_image

if TYPE_CHECKING:
    from minigpt4.model import MiniGPT4ForConditionalGeneration
    from minigpt4.processing import MiniGPT4Processor

logger = logging.getLogger(__name__)

Messages = Sequence[dict[str, Any]]
"""A conversation: `{"role", "content"}`, the content a text or a list of `text` and `image` parts."""


@dataclass(eq=False)
class _Running:
    """A request that is being answered: `ids` are the prompt and the answer, whose last id the slot has not read."""

    request: Request
    slot: Any
    sampler: Sampler
    text: Detokenizer
    ids: list[int]


class Engine:
    """Answers requests with one model.

    Args:
        model: nano, a folder or a hub id; or a loaded model.
        processor: Of a loaded model.
        engine: The run time: a name of `backends.BACKENDS`, or `auto`.
        template: Name of the prompt template; default the model folder's own.
        max_concurrent: Most answers in progress at once.
        max_queue: Most requests that wait; one more is refused.
        image_cache: Image embeddings, shared between engines where given.
        prefix_bytes: Most bytes of kept prefixes.
        options: As for `minigpt4.load`, where the model is not loaded.
    """

    def __init__(
        self,
        model: "str | Path | MiniGPT4ForConditionalGeneration",
        processor: "MiniGPT4Processor | None" = None,
        *,
        engine: str = "auto",
        template: str | None = None,
        max_concurrent: int = 8,
        max_queue: int = 32,
        image_cache: ImageCache | None = None,
        prefix_bytes: int = 512 * 2**20,
        **options: Any,
    ) -> None:
        self.backend: Backend = load_backend(model, processor, engine, template, **options)
        self.max_concurrent = max_concurrent
        self.max_queue = max_queue
        self.image_cache = image_cache if image_cache is not None else ImageCache()
        self.prefix_cache = PrefixCache(self.backend, prefix_bytes)
        self.on_image: Callable[[float, bool], None] = lambda seconds, cached: None
        self._waiting: deque[Request] = deque()
        self._beginning: list[Request] = []
        self._running: list[_Running] = []
        self._counts = dict.fromkeys(("accepted", "completed", "cancelled", "failed", "refused"), 0)
        self._lock = threading.RLock()  # of the lists and counts above
        self._turns = threading.Lock()  # of the backend
        self._thread: threading.Thread | None = None
        self._closing = False

    @property
    def info(self) -> ModelInfo:
        """What the model is."""
        return self.backend.info

    @property
    def counts(self) -> Counts:
        """Requests by state."""
        with self._lock:
            return Counts(len(self._waiting), len(self._running) + len(self._beginning), **self._counts)

    @property
    def room(self) -> int:
        """How many more requests would be accepted now."""
        counts = self.counts
        return self.max_concurrent + self.max_queue - counts.answering - counts.waiting

    def submit(
        self,
        messages: Messages,
        options: dict[str, Any],
        deliver: Callable[[Event], None],
        *,
        stop: Sequence[str] = (),
        timeout: float | None = None,
    ) -> Request:
        """Ask for an answer; it comes from a thread that lives while there are requests.

        Args:
            messages: The whole conversation, the last message a user's; an image part has its picture as `image`, and
                where that is open already, its content hash as `key`.
            options: Generation options, by the names of `ChatSession.stream`.
            deliver: Receives every event: pieces of text, then None; or an exception.
            stop: Further strings that end the answer and are no part of it.
            timeout: Seconds after which it is given up.

        Raises:
            ServerBusyError: The queue is full, or the engine closes.
            UsageError: An option that does not exist or is out of its range.
            PromptError: The messages cannot be turned into a prompt.
            ContextOverflowError: They and `max_new_tokens` do not fit the language model's context.
        """
        request = self._request(messages, options, deliver, stop, timeout)
        with self._lock:
            if self._closing or self.room <= 0:
                self._counts["refused"] += 1
                what = "is closing" if self._closing else f"has {len(self._waiting)} requests waiting"
                raise ServerBusyError(f"the server {what}, try again later", hint="wait a few seconds")
            self._waiting.append(request)
            self._counts["accepted"] += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
                self._thread.start()
        return request

    def answer(self, messages: Messages, **options: Any) -> Answer:
        """Answer one conversation, in this thread; see `answer_all`."""
        return next(iter(self.answer_all([messages], **options)))

    def answer_all(self, conversations: Iterable[Messages], **options: Any) -> Iterator[Answer]:
        """Answer conversations in their order, `max_concurrent` at once, in this thread and under its contexts.

        Args:
            conversations: Read as they are answered; the order of steps depends on them alone.
            options: Generation options, by the names of `ChatSession.stream`.

        Raises:
            MiniGPT4Error: As `submit`, or what went wrong with an answer; those in progress are given up.
        """
        errors: dict[Request, BaseException] = {}
        pending: deque[Request] = deque()
        waiting = iter(conversations)
        try:
            while True:
                while len(pending) < 2 * self.max_concurrent and (messages := next(waiting, None)) is not None:
                    pending.append(self._enqueue(messages, options, errors))
                if not pending:
                    return
                while pending[0].state != "done":
                    with self._turns:
                        self._turn()
                request = pending.popleft()
                if request in errors:
                    raise errors[request]
                yield request.answer
        finally:
            for request in pending:
                request.cancel()
            while any(request.state != "done" for request in pending):
                with self._turns:
                    self._turn()

    def queue_position(self, request: Request) -> int:
        """Return how many requests wait up to this one; 0 when it is being answered."""
        with self._lock:
            return self._waiting.index(request) + 1 if request in self._waiting else 0

    def close(self, seconds: float = 10.0, *, patience: float = 10.0) -> None:
        """Take no more requests, finish those there are, and give up the rest after some time.

        Args:
            seconds: Until answers in progress are given up; they end within one token.
            patience: Most seconds to wait for that.
        """
        with self._lock:
            self._closing = True
            thread = self._thread
        if thread is None:
            return
        thread.join(seconds)
        with self._lock:
            for request in (*self._waiting, *self._beginning, *(running.request for running in self._running)):
                request.cancel()
        thread.join(patience)

    # -- a request

    def _request(
        self,
        messages: Messages,
        options: dict[str, Any],
        deliver: Callable[[Event], None],
        stop: Sequence[str],
        timeout: float | None,
    ) -> Request:
        generation, info = generation_options(options), self.info
        ids = self.backend.template.encode(
            self.backend.tokenizer,
            messages,
            image_token_id=info.image_token_id,
            num_image_tokens=info.num_image_tokens,
        ).input_ids
        _check_length(len(ids), generation["max_new_tokens"], info.context)
        return Request(
            ids,
            [_keyed(part) for message in messages for part in _image_parts(message)],
            generation,
            (*self.backend.template.stop_strings, *stop),
            deliver,
            deadline=time.monotonic() + timeout if timeout else None,
            answer=Answer(prompt_tokens=len(ids)),
        )

    def _enqueue(self, messages: Messages, options: dict[str, Any], errors: dict[Request, BaseException]) -> Request:
        """Let a conversation wait for this thread to answer it."""

        def deliver(event: Event) -> None:
            if isinstance(event, BaseException):
                errors[request] = event

        request = self._request(messages, options, deliver, (), None)
        with self._lock:
            self._waiting.append(request)
            self._counts["accepted"] += 1
        return request

    # -- the loop

    def _work(self) -> None:
        """Answer until nothing is left."""
        while True:
            with self._lock:
                if not self._waiting and not self._running:
                    self._thread = None
                    return
            with self._turns:
                self._turn()

    def _turn(self, *, in_search: bool = False) -> None:
        """Begin waiting requests as far as there are slots, and generate one token of every answer in progress.

        Args:
            in_search: Between two tokens of a beam search; another one waits for its end.
        """
        try:
            while (request := self._next(in_search)) is not None:
                running = self._begun(request)
                with self._lock:
                    self._beginning.remove(request)
                    if running is not None:
                        self._running.append(running)
            self._step()
        except BaseException as error:  # an engine that ended would leave all later requests waiting
            with self._lock:
                all_running, self._running = self._running, []
            for running in all_running:
                self.backend.drop(running.slot)
                self._failed(running.request, error)

    def _next(self, in_search: bool) -> Request | None:
        """Return the request that is answered next, if one waits and there is a slot for it."""
        with self._lock:
            for request in [request for request in self._waiting if request.given_up]:
                self._waiting.remove(request)
                self._finish(request, "cancelled")
            if len(self._running) + len(self._beginning) >= self.max_concurrent:
                return None
            for request in self._waiting:
                if not (in_search and request.options["num_beams"] > 1):
                    self._waiting.remove(request)
                    self._beginning.append(request)
                    return request
        return None

    def _begun(self, request: Request) -> _Running | None:
        """Begin an answer; an error is this answer's own."""
        try:
            return self._begin(request)
        except BaseException as error:
            self._failed(request, error)
            return None

    def _begin(self, request: Request) -> _Running | None:
        """Read the prompt after its known prefix, and generate the first token; None if the answer has ended."""
        request.state = "answering"
        if request.options["num_beams"] > 1:
            self._search(request)
            return None
        info = self.info
        slot, cached = self.prefix_cache.take(request.ids, [key for key, _ in request.pictures])
        request.answer.cached_tokens = cached
        num_cached_pictures = request.ids[:cached].count(info.image_token_id) // info.num_image_tokens
        try:
            images = [self._encoded(*picture) for picture in request.pictures[num_cached_pictures:]]
            logits = self.backend.prefill(slot, request.ids[cached:], images)
            draw, model_rules = self.backend.sampling(
                request.options["seed"], len(request.ids), request.options["max_new_tokens"]
            )
            sampler = Sampler(request.options, info, draw, len(request.ids), model_rules)
            text = Detokenizer(self.backend.tokenizer, request.stop_strings)
            running = _Running(request, slot, sampler, text, list(request.ids))
            if not self._generated(running, logits):
                return running
        except BaseException:
            self.backend.drop(slot)
            raise
        self._end(running, "completed")
        return None

    def _encoded(self, key: str, picture: Any) -> Any:  # noqa: ANN401  (Pillow's; the backend's own kind)
        """Return the embeddings of a picture, computed once."""
        started = time.monotonic()
        embeds = self.image_cache.get(key)
        cached = embeds is not None
        if embeds is None:
            embeds = self.backend.encode(picture)
            self.image_cache.put(key, embeds)
        self.on_image(time.monotonic() - started, cached)
        return embeds

    def _search(self, request: Request) -> None:
        """Answer with beams: the text comes whole, at the end, and other answers go on meanwhile."""

        def stopped() -> bool:
            self._turn(in_search=True)
            return request.given_up

        images = [self._encoded(*picture) for picture in request.pictures]
        new_ids = self.backend.beam_search(request.ids, images, request.options, stopped)
        if request.given_up:
            self._finish(request, "cancelled")
            return
        text = Detokenizer(self.backend.tokenizer, request.stop_strings)
        for piece in (*map(text.add, new_ids), text.end()):
            if piece:
                request.deliver(piece)
        answer = request.answer
        answer.text = text.text
        answer.completion_tokens = len(new_ids)
        ended = text.ended or bool(new_ids and new_ids[-1] in self.info.end_ids)
        answer.finish_reason = "stop" if ended else "length"
        answer.seconds_to_first_token = time.monotonic() - request.asked_at
        self._finish(request, "completed")

    def _step(self) -> None:
        """Generate one token of every answer in progress."""
        for running in [running for running in self._running if running.request.given_up]:
            self._leave(running, "cancelled")
        if not self._running:
            return
        all_running = list(self._running)
        slots, tokens = zip(*((running.slot, running.ids[-1]) for running in all_running), strict=True)
        logits = self.backend.step(slots, tokens)
        for running, scores in zip(all_running, logits, strict=True):
            try:
                ended = self._generated(running, scores)
            except BaseException as error:
                self.backend.drop(running.slot)
                self._failed(running.request, error)
                continue
            if ended:
                self._leave(running, "completed")

    def _generated(self, running: _Running, logits: Logits) -> bool:
        """Choose an answer's next token and deliver its text; returns whether the answer has ended."""
        request, answer = running.request, running.request.answer
        token = running.sampler.choose(running.ids, logits)
        running.ids.append(token)
        if not answer.completion_tokens:
            answer.seconds_to_first_token = time.monotonic() - request.asked_at
        answer.completion_tokens += 1
        if text := running.text.add(token):
            request.deliver(text)
        if token in running.sampler.info.end_ids or running.text.ended:
            answer.finish_reason = "stop"
            return True
        answer.finish_reason = "length"
        return answer.completion_tokens >= int(request.options["max_new_tokens"])

    def _leave(self, running: _Running, how: str) -> None:
        """End an answer; an error is this answer's own."""
        try:
            self._end(running, how)
        except BaseException as error:
            self._failed(running.request, error)

    def _end(self, running: _Running, how: str) -> None:
        """Keep what was read for conversations that continue it, and deliver the rest of the text."""
        request = running.request
        pictures = [key for key, _ in request.pictures]
        self.prefix_cache.keep(Prefix(running.ids[: running.slot.length], pictures, running.slot))
        if text := running.text.end():
            request.deliver(text)
        request.answer.text = running.text.text
        self._finish(request, how)

    def _finish(self, request: Request, how: str) -> None:
        request.answer.seconds = time.monotonic() - request.asked_at
        if how == "cancelled":
            request.answer.finish_reason = "cancelled"
        self._count(request, how)
        request.state = "done"
        request.deliver(None)

    def _failed(self, request: Request, error: BaseException) -> None:
        logger.debug("an answer failed", exc_info=error)
        self._count(request, "failed")
        request.deliver(error)
        request.state = "done"

    def _count(self, request: Request, how: str) -> None:
        """Free the slot of an answer that has ended, and count it."""
        with self._lock:
            self._running = [running for running in self._running if running.request is not request]
            self._counts[how] += 1


def _check_length(prompt_tokens: int, max_new_tokens: int, context: int | None) -> None:
    if context and prompt_tokens + max_new_tokens > context:
        raise ContextOverflowError(
            f"the conversation has {prompt_tokens} tokens and the answer may have {max_new_tokens}, "
            f"the language model reads {context} together",
            hint="ask for fewer new tokens, take back a turn, or begin anew",
        )


def _image_parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [part for part in content if part["type"] == "image"] if isinstance(content, list) else []


def _keyed(part: dict[str, Any]) -> tuple[str, Any]:
    """Return the content hash and the opened picture of an image part."""
    if "key" in part:
        return part["key"], part["image"]
    picture = open_image(part["image"])
    return content_hash(picture), picture
