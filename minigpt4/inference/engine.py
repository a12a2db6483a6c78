"""One model and many who ask: a bounded queue, several answers in progress at once, and nothing lost.

A thread of its own owns the model. Requests wait in the order they came; up to `max_concurrent` are answered together,
token by token (`batch`), also between the tokens of a search (`beams`), of which there is one at a time. Image
embeddings and what was read of earlier conversations are shared. A request that is cancelled, or whose deadline has
passed, gives its place back within one token. What goes wrong ends the answers it concerns, never the engine.

Knows no HTTP.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from minigpt4.errors import MiniGPT4Error, ServerBusyError
from minigpt4.inference.batch import DecodeBatch, can_be_batched
from minigpt4.inference.beam_search import search
from minigpt4.inference.chat import Answer
from minigpt4.inference.generation import AnswerWriter, generation_options
from minigpt4.inference.prefix_cache import ReadMemory
from minigpt4.inference.reading import ImageCache, Read, check_length, embed, stops, take_up
from minigpt4.inference.request import Counts, Event, Request
from minigpt4.inference.row import Row
from minigpt4.inference.sampling import Sampler
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.processing import MiniGPT4Processor
from minigpt4.processing.prompts import PromptTemplate

logger = logging.getLogger(__name__)


class Engine:
    """Answers requests with one model.

    Args:
        model: The model, on its device.
        processor: Its processor.
        max_concurrent: Answers in progress at once.
        max_queue: Requests that wait while all answers are in progress; one more is refused.
        image_bytes: Most bytes of image embeddings kept.
        read_bytes: Most bytes of read conversations kept.
    """

    def __init__(
        self,
        model: MiniGPT4ForConditionalGeneration,
        processor: MiniGPT4Processor,
        *,
        max_concurrent: int = 8,
        max_queue: int = 32,
        image_bytes: int = 256 * 2**20,
        read_bytes: int = 512 * 2**20,
    ) -> None:
        self.model = model
        self.processor = processor
        self.template: PromptTemplate = processor.prompt_template
        self.max_concurrent = max_concurrent
        self.max_queue = max_queue
        self.on_image: Callable[[float, bool], None] = lambda seconds, cached: None
        self._images = ImageCache(image_bytes)
        self._memory = ReadMemory(read_bytes)
        self._end_ids: list[int] = stops(model, processor, self.template)["eos_token_id"]
        self._waiting: deque[Request] = deque()
        self._rows: list[Row] = []
        self._beginning: list[Request] = []
        self._batch = DecodeBatch(model)
        self._counts = dict.fromkeys(("accepted", "completed", "cancelled", "failed", "refused"), 0)
        self._change = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> Counts:
        """How the engine stands."""
        with self._change:
            return Counts(len(self._waiting), len(self._rows) + len(self._beginning), **self._counts)

    @property
    def room(self) -> int:
        """How many more requests would be accepted now."""
        with self._change:
            answering = len(self._rows) + len(self._beginning)
            return self.max_concurrent + self.max_queue - answering - len(self._waiting)

    def submit(
        self,
        messages: Sequence[dict[str, Any]],
        options: dict[str, Any],
        deliver: Callable[[Event], None],
        *,
        stop: Sequence[str] = (),
        timeout: float | None = None,
    ) -> Request:
        """Ask for an answer.

        Args:
            messages: The whole conversation, the last message a user's; an image part has its opened picture as
                `image` and its content's name as `key`.
            options: Generation options by the library's names.
            deliver: Told of every event from the engine's thread: pieces of text, then None; or an exception.
            stop: Further strings that end the answer and are no part of it.
            timeout: Seconds after which it is given up.

        Raises:
            ServerBusyError: The queue is full, or the engine closes.
            UsageError: An option that does not exist or is out of its range.
            PromptError: The messages cannot be turned into a prompt.
            ContextOverflowError: They and `max_new_tokens` do not fit the language model's context.
        """
        generation = generation_options(options)
        ids = self._encode(messages)
        check_length(self.model, len(ids), generation["max_new_tokens"])
        pictures = [
            (part["key"], part["image"])
            for message in messages
            if isinstance(message["content"], list)
            for part in message["content"]
            if part["type"] == "image"
        ]
        request = Request(
            ids,
            pictures,
            generation,
            (*self.template.stop_strings, *stop),
            deliver,
            deadline=time.monotonic() + timeout if timeout else None,
            answer=Answer(prompt_tokens=len(ids)),
        )
        with self._change:
            if self._closing or self.room <= 0:
                self._counts["refused"] += 1
                what = "is closing" if self._closing else f"has {len(self._waiting)} requests waiting"
                raise ServerBusyError(f"the server {what}, try again later", hint="wait a few seconds")
            self._waiting.append(request)
            self._counts["accepted"] += 1
            self._change.notify()
        return request

    def place_in_queue(self, request: Request) -> int:
        """Return how many requests wait before this one; 0 when it is being answered."""
        with self._change:
            return self._waiting.index(request) + 1 if request in self._waiting else 0

    def close(self, seconds: float = 10.0, *, patience: float = 10.0) -> None:
        """Take no more requests, finish those there are, and give up the rest after so many seconds.

        Args:
            seconds: Until answers in progress are given up; they end within one token, so that it takes little longer.
            patience: How long that is waited for.
        """
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join(seconds)
        with self._change:
            for request in (*self._waiting, *self._beginning, *(row.request for row in self._rows)):
                request.cancel()
            self._change.notify()
        self._thread.join(patience)

    def _encode(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        return self.template.encode(
            self.processor.tokenizer,
            messages,
            image_token_id=self.model.config.image_token_id,
            num_image_tokens=self.model.config.num_image_tokens,
        ).input_ids

    def _work(self) -> None:
        """The thread's work, until it is closed and nothing is left."""
        while self._wait():
            self._turn()

    def _wait(self) -> bool:
        """Wait for something to do; returns whether there is any, or will be."""
        with self._change:
            while not self._waiting and not self._rows:
                if self._closing:
                    return False
                self._change.wait()
        return True

    @torch.inference_mode()
    def _turn(self, *, in_search: bool = False) -> None:
        """Take up who waits, as far as there are places, and say one token of every answer in progress.

        Args:
            in_search: Between two tokens of a search; another one waits for its end.
        """
        try:
            while (request := self._next(in_search)) is not None:
                row = self._begun(request)
                with self._change:  # at once: counted twice or not at all, it would change who is refused
                    self._beginning.remove(request)
                    if row is not None:
                        self._rows.append(row)
            self._step()
        except BaseException as error:  # an engine that ended would leave all who come waiting
            self._batch = DecodeBatch(self.model)  # what it holds is not known any more
            with self._change:
                rows, self._rows = self._rows, []
            for row in rows:
                self._failed(row.request, error)

    def _next(self, in_search: bool) -> Request | None:
        """Return the request that is answered next, if one waits and has a place."""
        with self._change:
            for request in [request for request in self._waiting if request.given_up]:
                self._waiting.remove(request)
                self._finish(request, "cancelled")
            if len(self._rows) + len(self._beginning) >= self.max_concurrent:
                return None
            for request in self._waiting:
                if not (in_search and request.options["num_beams"] > 1):
                    self._waiting.remove(request)
                    self._beginning.append(request)
                    return request
        return None

    def _begun(self, request: Request) -> Row | None:
        """Begin an answer; what goes wrong with it is its own."""
        try:
            return self._begin(request)
        except BaseException as error:
            self._failed(request, error)
            return None

    def _begin(self, request: Request) -> Row | None:
        """Read the prompt, from where an earlier conversation has it, and say the first token.

        Returns:
            Its row, which has joined the batch where it can; None when the answer has ended.
        """
        request.state = "answering"
        writer = AnswerWriter(self.processor.tokenizer, request.stop_strings)
        if request.options["num_beams"] > 1:
            self._search(request, writer)
            return None
        keys = [key for key, _ in request.pictures]
        width = self.model.config.num_image_tokens
        read = self._memory.take(request.ids, keys, self.model.config.image_token_id, width)
        kept = request.answer.cached_tokens = take_up(self.model, request.ids, keys, read)
        old = request.ids[:kept].count(self.model.config.image_token_id) // width
        output = self.model(
            input_ids=torch.tensor([request.ids[kept:]], device=self.model.device),
            past_key_values=read.cache,
            use_cache=True,
            logits_to_keep=1,
            **self._picture_inputs(request.pictures[old:]),
        )
        sampler = Sampler(request.options, self.model, len(request.ids), self._end_ids)
        row = Row(request, sampler, writer, list(request.ids))
        cache = output.past_key_values
        if row.say(output.logits[0, -1]):
            self._end(row, cache, "completed")
            return None
        if can_be_batched(cache):
            self._batch.join(cache)
        else:
            row.cache = cache
        return row

    def _search(self, request: Request, writer: AnswerWriter) -> None:
        pictures = self._picture_inputs(request.pictures)
        ends = stops(self.model, self.processor, self.template)
        whole = search(self.model, request, writer, lambda: self._turn(in_search=True), ends, pictures)
        self._finish(request, "completed" if whole else "cancelled")

    def _picture_inputs(self, pictures: Sequence[tuple[str, Image.Image]]) -> dict[str, Any]:
        rows = []
        for key, picture in pictures:
            cached = self._images.get(key) is not None
            started = time.monotonic()
            rows.append(embed(self.model, self.processor, key, picture, self._images))
            self.on_image(time.monotonic() - started, cached)
        if not rows:
            return {}
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=torch.stack(rows))}}

    def _step(self) -> None:
        """One token for every answer in progress."""
        for row in [row for row in self._rows if row.request.given_up]:
            self._leave(row, "cancelled")
        together = self._together
        if together:
            for row, logits in zip(together, self._batch.step([row.ids[-1] for row in together]), strict=True):
                self._say(row, logits)
        for row in [row for row in self._rows if row.cache is not None]:
            ids = torch.tensor([[row.ids[-1]]], device=self.model.device)
            output = self.model(input_ids=ids, past_key_values=row.cache, use_cache=True)
            self._say(row, output.logits[0, -1])

    @property
    def _together(self) -> list[Row]:
        """The rows of the batch, in its order."""
        return [row for row in self._rows if row.cache is None]

    def _say(self, row: Row, logits: torch.Tensor) -> None:
        """Say an answer's next token; what goes wrong with it is its own."""
        try:
            ended = row.say(logits)
        except BaseException as error:
            self._take_out(row)
            self._failed(row.request, error)
            return
        if ended:
            self._leave(row, "completed")

    def _leave(self, row: Row, how: str) -> None:
        """Take an answer out and end it; what goes wrong with that is its own, and told to it."""
        cache = self._take_out(row)
        try:
            self._end(row, cache, how)
        except BaseException as error:
            self._failed(row.request, error)

    def _take_out(self, row: Row) -> DynamicCache:
        cache = row.cache if row.cache is not None else self._batch.leave(self._together.index(row))
        with self._change:
            self._rows.remove(row)
        return cache

    def _end(self, row: Row, cache: DynamicCache, how: str) -> None:
        """Keep what was read for those that go on from it, and say that the answer has ended."""
        request = row.request
        self._memory.keep(Read(row.ids[: cache.get_seq_length()], [key for key, _ in request.pictures], cache))
        row.end(deliver=how == "completed")
        self._finish(request, how)

    def _finish(self, request: Request, how: str) -> None:
        request.answer.seconds = time.monotonic() - request.asked_at
        if how == "cancelled":
            request.answer.finish_reason = "cancelled"
        request.state = "done"
        self._counts[how] += 1
        request.deliver(None)

    def _failed(self, request: Request, error: BaseException) -> None:
        logger.debug("an answer failed", exc_info=error)
        self._counts["failed"] += 1
        request.state = "done"
        request.deliver(error if isinstance(error, MiniGPT4Error) else MiniGPT4Error("the answer failed"))
