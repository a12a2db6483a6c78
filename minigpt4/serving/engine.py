"""One model and many who ask: a bounded queue, several answers in progress at once, and nothing lost.

A thread of its own owns the model. Requests wait in the order they came; up to `max_concurrent` are answered together,
token by token (`batch`). Image embeddings and what was read of earlier conversations are shared. A request that is
cancelled, or whose deadline has passed, gives its place back within one token.

Knows no HTTP.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutputWithPooling

from minigpt4.chat import Answer
from minigpt4.errors import MiniGPT4Error, ServerBusyError
from minigpt4.generation import AnswerWriter, generation_options
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.processing import MiniGPT4Processor
from minigpt4.processing.prompts import PromptTemplate
from minigpt4.reading import ImageCache, Read, check_length, embed, never_said, stops, take_up
from minigpt4.serving.batch import DecodeBatch, can_be_batched
from minigpt4.serving.memory import ReadMemory
from minigpt4.serving.request import Counts, Event, GivenUp, Request
from minigpt4.serving.sampling import Sampler

logger = logging.getLogger(__name__)


@dataclass
class _Row:
    """A request that is being answered."""

    request: Request
    sampler: Sampler
    writer: AnswerWriter
    ids: list[int]
    started: float


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
        self._rows: list[_Row] = []
        self._beginning = 0
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
            return Counts(len(self._waiting), len(self._rows) + self._beginning, **self._counts)

    @property
    def room(self) -> int:
        """How many more requests would be accepted now."""
        with self._change:
            answering = len(self._rows) + self._beginning
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
            for request in (*self._waiting, *(row.request for row in self._rows)):
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
        while True:
            with self._change:
                while not self._waiting and not self._rows:
                    if self._closing:
                        return
                    self._change.wait()
                self._drop_given_up()
                free = self.max_concurrent - len(self._rows)
                new = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
                self._beginning = len(new)
            for request in new:
                row = self._guarded(request, self._begin)
                with self._change:  # at once: counted twice or not at all, it would change who is refused
                    self._beginning -= 1
                    if row is not None:
                        self._rows.append(row)
            if self._rows:
                self._step()

    def _drop_given_up(self) -> None:
        """Take those out of the queue that nobody waits for any more; holding the lock."""
        for request in [request for request in self._waiting if request.given_up]:
            self._waiting.remove(request)
            self._finish(request, "cancelled")

    def _guarded(self, request: Request, work: Callable[[Request], _Row | None]) -> _Row | None:
        """Let what goes wrong with one request be that request's own."""
        try:
            return work(request)
        except BaseException as error:
            logger.debug("an answer failed", exc_info=error)
            known = error if isinstance(error, MiniGPT4Error) else MiniGPT4Error("the answer failed")
            self._counts["failed"] += 1
            request.state = "done"
            request.deliver(known)
            return None

    @torch.inference_mode()
    def _begin(self, request: Request) -> _Row | None:
        """Read the prompt, from where an earlier conversation has it, and say the first token.

        Returns:
            Its row, which has joined the batch; None when the answer has ended.
        """
        request.state = "answering"
        if request.options["num_beams"] > 1:
            self._with_beams(request)
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
        sampler = Sampler(request.options, len(request.ids), self._end_ids, never_said(self.model), self.model.device)
        writer = AnswerWriter(self.processor.tokenizer, request.stop_strings)
        row = _Row(request, sampler, writer, list(request.ids), time.monotonic())
        cache = output.past_key_values
        ended = self._say(row, output.logits[0, -1])
        if ended or not can_be_batched(cache):
            while not ended and not self._given_up(row):
                output = self.model(
                    input_ids=torch.tensor([[row.ids[-1]]], device=self.model.device),
                    past_key_values=cache,
                    use_cache=True,
                )
                ended = self._say(row, output.logits[0, -1])
            self._memory.keep(Read(row.ids[: cache.get_seq_length()], keys, cache))
            self._end(row)
            return None
        self._batch.join(cache)
        return row

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
        for number in reversed(range(len(self._rows))):
            if self._given_up(self._rows[number]):
                self._take_out(number)
        if not self._rows:
            return
        logits = self._batch.step([row.ids[-1] for row in self._rows])
        ended = [self._say(row, logits[number]) for number, row in enumerate(self._rows)]
        for number in reversed(range(len(self._rows))):
            if ended[number]:
                self._take_out(number)

    def _take_out(self, number: int) -> None:
        cache = self._batch.leave(number)
        with self._change:
            row = self._rows.pop(number)
        keys = [key for key, _ in row.request.pictures]
        self._memory.keep(Read(row.ids[: cache.get_seq_length()], keys, cache))
        self._end(row)

    @staticmethod
    def _given_up(row: _Row) -> bool:
        if not row.request.given_up:
            return False
        row.request.answer.finish_reason = "cancelled"
        return True

    def _say(self, row: _Row, logits: torch.Tensor) -> bool:
        """Choose a row's next token and hand out its text; returns whether the answer has ended."""
        answer = row.request.answer
        token = row.sampler.choose(row.ids, logits)
        row.ids.append(token)
        if not answer.completion_tokens:
            answer.seconds_to_first_token = time.monotonic() - row.request.asked_at
        answer.completion_tokens += 1
        if text := row.writer.write(token):
            row.request.deliver(text)
        if token in self._end_ids or row.writer.ended:
            answer.finish_reason = "stop"
            return True
        answer.finish_reason = "length"
        return answer.completion_tokens >= int(row.request.options["max_new_tokens"])

    def _end(self, row: _Row) -> None:
        request = row.request
        if (text := row.writer.end()) and request.answer.finish_reason != "cancelled":
            request.deliver(text)
        request.answer.text = row.writer.text
        self._finish(request, "cancelled" if request.answer.finish_reason == "cancelled" else "completed")

    def _finish(self, request: Request, how: str) -> None:
        request.answer.seconds = time.monotonic() - request.asked_at
        if how == "cancelled":
            request.answer.finish_reason = "cancelled"
        request.state = "done"
        self._counts[how] += 1
        request.deliver(None)

    def _with_beams(self, request: Request) -> None:
        """Follow several answers at once by the library's own search; the text comes whole, others wait."""
        options = dict(request.options)
        if (seed := options.pop("seed")) is not None:
            torch.manual_seed(seed)
        input_ids = torch.tensor([request.ids], device=self.model.device)
        output: list[int] = self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            suppress_tokens=never_said(self.model),
            stopping_criteria=StoppingCriteriaList([GivenUp(request)]),
            **self._picture_inputs(request.pictures),
            **options,
            **stops(self.model, self.processor, self.template),
        )[0].tolist()
        if request.given_up:
            self._finish(request, "cancelled")
            return
        writer = AnswerWriter(self.processor.tokenizer, request.stop_strings)
        said = output[len(request.ids) :]
        for token in said:
            if text := writer.write(token):
                request.deliver(text)
        if text := writer.end():
            request.deliver(text)
        request.answer.text = writer.text
        request.answer.completion_tokens = len(said)
        ended = writer.ended or bool(said and said[-1] in self._end_ids)
        request.answer.finish_reason = "stop" if ended else "length"
        request.answer.seconds_to_first_token = time.monotonic() - request.asked_at
        self._finish(request, "completed")
