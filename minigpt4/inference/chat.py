"""A conversation about pictures: questions in, streamed answers out.

`ChatSession` owns what makes the second question cheap: the embeddings of every picture, by content, and the language
model's cache of all it has read and said. Neither changes an answer. Knows no command line and no network.
"""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from minigpt4.errors import PromptError
from minigpt4.inference.generation import AnswerWriter, generation_options
from minigpt4.inference.reading import ImageCache, Read, answer_rules, check_length, embed, never_said, stops, take_up
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.processing.pictures import PictureSource, content_hash, open_image
from minigpt4.processing.processing_minigpt4 import MiniGPT4Processor
from minigpt4.processing.prompts import template as template_named


@dataclass
class Answer:
    """The last answer and what it took.

    Args:
        text: What was said.
        finish_reason: `"stop"` (the model ended), `"length"` (`max_new_tokens` reached) or `"cancelled"`.
        prompt_tokens: Ids of the whole conversation up to the answer, image tokens included.
        cached_tokens: How many of those did not have to be read again.
        completion_tokens: Ids of the answer, its end symbol included.
        seconds_to_first_token: From the call to the first id.
        seconds: From the call to the last.
    """

    text: str = ""
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds_to_first_token: float = 0.0
    seconds: float = 0.0


class ChatSession:
    """One conversation with one model.

    Args:
        model: The model.
        processor: Its processor.
        template: Name of the prompt template; default the one in the model folder.
        system: System message; default the template's own.
        image_cache: Shared between sessions where given.
    """

    def __init__(
        self,
        model: MiniGPT4ForConditionalGeneration,
        processor: MiniGPT4Processor,
        *,
        template: str | None = None,
        system: str | None = None,
        image_cache: ImageCache | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.template = template_named(template or processor.template)
        self.system = system
        self.answer = Answer()
        self._image_cache = image_cache or ImageCache()
        self._messages: list[dict[str, Any]] = []
        self._waiting: list[dict[str, Any]] = []
        self._pictures: list[tuple[str, Image.Image]] = []
        self._read = Read()
        self._end_ids: list[int] = stops(model, processor, self.template)["eos_token_id"]
        self._cancelled = threading.Event()
        self._answering = False

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far: `{"role", "content"}`, the content a list of `text` and `image` parts."""
        return [{**message, "content": list(message["content"])} for message in self._messages]

    def add_image(self, source: PictureSource) -> None:
        """Add a picture; it belongs to the next question.

        Raises:
            ImageError: It cannot be opened.
            PromptError: An answer is in progress.
        """
        self._refuse_while_answering()
        picture = open_image(source)
        self._pictures.append((content_hash(picture), picture))
        self._waiting.append({"type": "image", "image": picture})

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
                answer), `top_p`, `top_k`, `repetition_penalty` (on what is newly said), `length_penalty`,
                `min_length` (in new tokens), `seed`.

        Raises:
            UsageError: An option that does not exist or is out of its range.
            PromptError: The conversation cannot be turned into a prompt, or an answer is in progress.
            ContextOverflowError: It and `max_new_tokens` do not fit the language model's context.
        """
        self._refuse_while_answering()
        asked = {"role": "user", "content": [*self._waiting, {"type": "text", "text": question}]}
        generation = generation_options(options)
        ids = self._encode([*self._messages, asked])
        check_length(self.model, len(ids), generation["max_new_tokens"])
        self._cancelled.clear()
        self.answer = Answer(prompt_tokens=len(ids))
        self._answering = True
        try:
            yield from self._generate(ids, generation)
        finally:
            self._answering = False
        self._messages += [asked, {"role": "assistant", "content": [{"type": "text", "text": self.answer.text}]}]
        self._waiting = []

    def cancel(self) -> None:
        """Stop the answer in progress, from any thread, within one token; what was said so far stays."""
        self._cancelled.set()

    def undo(self) -> None:
        """Take back the last question, its pictures and its answer.

        Raises:
            PromptError: There is none, or an answer is in progress.
        """
        self._refuse_while_answering()
        if not self._messages:
            raise PromptError("there is no question to take back")
        *self._messages, asked, _ = self._messages
        taken = sum(part["type"] == "image" for part in asked["content"])
        waiting = len(self._waiting)
        del self._pictures[len(self._pictures) - waiting - taken : len(self._pictures) - waiting]

    def reset(self) -> None:
        """Forget the conversation; the embeddings of its pictures are kept.

        Raises:
            PromptError: An answer is in progress.
        """
        self._refuse_while_answering()
        self._messages, self._waiting, self._pictures, self._read = [], [], [], Read()

    def _refuse_while_answering(self) -> None:
        if self._answering:
            raise PromptError("an answer is in progress", hint="read it to its end, or close its iterator")

    def _encode(self, messages: list[dict[str, Any]]) -> list[int]:
        if self.system is not None:
            messages = [{"role": "system", "content": self.system}, *messages]
        return self.template.encode(
            self.processor.tokenizer,
            messages,
            image_token_id=self.model.config.image_token_id,
            num_image_tokens=self.model.config.num_image_tokens,
        ).input_ids

    def _generate(self, ids: list[int], generation: dict[str, Any]) -> Iterator[str]:
        """Run `generate` in a thread of its own and hand out the text as it comes."""
        writer = AnswerWriter(self.processor.tokenizer, self.template.stop_strings)
        started = time.monotonic()
        pieces: queue.Queue[int | BaseException | None] = queue.Queue()
        thread = threading.Thread(target=self._work, args=(ids, generation, pieces), daemon=True)
        thread.start()
        try:
            while (item := pieces.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                if not self.answer.completion_tokens:
                    self.answer.seconds_to_first_token = time.monotonic() - started
                self.answer.completion_tokens += 1
                if text := writer.write(item):
                    yield text
            if text := writer.end():
                yield text
        finally:
            # The caller may have stopped reading: the thread must end before its cache is touched again.
            self._cancelled.set()
            thread.join()
        self.answer.text = writer.text
        self.answer.seconds = time.monotonic() - started
        if self.answer.finish_reason != "cancelled" and not writer.ended:
            ended = bool(writer.ids) and writer.ids[-1] in self._end_ids
            self.answer.finish_reason = "stop" if ended else "length"

    def _work(self, ids: list[int], generation: dict[str, Any], pieces: queue.Queue[Any]) -> None:
        """The thread's work: what it makes, or what went wrong, goes into the queue; None ends it."""
        try:
            if generation["num_beams"] > 1:
                for token in self._run(ids, Read(), generation, streamer=None)[len(ids) :]:
                    pieces.put(token)
            else:
                self._run(ids, self._read, generation, streamer=_QueueStreamer(pieces))
            if self._cancelled.is_set():
                self.answer.finish_reason = "cancelled"
        except BaseException as error:
            self._read = Read()
            pieces.put(error)
        finally:
            pieces.put(None)

    @torch.inference_mode()
    def _run(self, ids: list[int], read: Read, generation: dict[str, Any], streamer: BaseStreamer | None) -> list[int]:
        """Generate from where the cache ends; return all ids and remember what the cache holds then."""
        keys = [key for key, _ in self._pictures]
        kept = self.answer.cached_tokens = take_up(self.model, ids, keys, read)
        inputs: dict[str, Any] = {"past_key_values": read.cache} if streamer else {}
        old_pictures = ids[:kept].count(self.model.config.image_token_id) // self.model.config.num_image_tokens
        if new := self._pictures[old_pictures:]:
            rows = [embed(self.model, self.processor, key, picture, self._image_cache) for key, picture in new]
            embeds = torch.stack(rows)
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=embeds)}
        options = dict(generation)
        if (seed := options.pop("seed")) is not None:
            torch.manual_seed(seed)
        rules = answer_rules(self.model, options, len(ids))
        options.pop("repetition_penalty", None)
        input_ids = torch.tensor([ids], device=self.model.device)
        output: list[int] = self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            logits_processor=rules,
            stopping_criteria=StoppingCriteriaList([_Cancelled(self._cancelled)]),
            streamer=streamer,
            **inputs,
            **options,
            suppress_tokens=never_said(self.model),
            **stops(self.model, self.processor, self.template),
        )[0].tolist()
        if streamer and read.cache is not None:
            self._read = Read(output[: read.cache.get_seq_length()], keys, read.cache)
        return output


class _Cancelled(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device, dtype=torch.bool)


class _QueueStreamer(BaseStreamer):
    """Puts every new id into a queue; the library's own streamer hangs when `generate` raises."""

    def __init__(self, pieces: queue.Queue[Any]) -> None:
        self.pieces = pieces
        self.in_prompt = True

    def put(self, value: Tensor) -> None:
        if not self.in_prompt:
            for token in value.flatten().tolist():
                self.pieces.put(token)
        self.in_prompt = False

    def end(self) -> None:
        """The thread says itself when it ends."""
