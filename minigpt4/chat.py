"""A conversation about pictures: questions in, streamed answers out.

`ChatSession` owns what makes the second question cheap: the embeddings of every picture, by content, and the language
model's cache of all it has read and said. Neither changes an answer. Knows no command line and no network.
"""

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from minigpt4.errors import ContextOverflowError, PromptError
from minigpt4.generation import AnswerWriter, generation_options
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


@dataclass
class ImageCache:
    """Image embeddings by content, the least recently used forgotten first.

    Args:
        max_bytes: Most bytes kept.
    """

    max_bytes: int = 256 * 2**20
    _entries: OrderedDict[str, Tensor] = field(default_factory=OrderedDict)

    def get(self, key: str) -> Tensor | None:
        """Return the embeddings `(num_image_tokens, text width)` of a picture, or None."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: str, embeds: Tensor) -> None:
        """Keep the embeddings of a picture."""
        self._entries[key] = embeds
        self._entries.move_to_end(key)
        while sum(kept.nbytes for kept in self._entries.values()) > self.max_bytes:
            self._entries.popitem(last=False)


@dataclass
class _Read:
    """What the language model's cache holds: ids, and the pictures among them in order."""

    ids: list[int] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    cache: DynamicCache | None = None


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
        self._read = _Read()
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
        self._check_length(len(ids), generation["max_new_tokens"])
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
        self._messages, self._waiting, self._pictures, self._read = [], [], [], _Read()

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

    def _check_length(self, prompt_tokens: int, max_new_tokens: int) -> None:
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if limit and prompt_tokens + max_new_tokens > limit:
            raise ContextOverflowError(
                f"the conversation has {prompt_tokens} tokens and the answer may have {max_new_tokens}, "
                f"the language model reads {limit} together",
                hint="ask for fewer new tokens, take back a turn, or begin anew",
            )

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
            ended = bool(writer.ids) and writer.ids[-1] in self._stops()["eos_token_id"]
            self.answer.finish_reason = "stop" if ended else "length"

    def _work(self, ids: list[int], generation: dict[str, Any], pieces: queue.Queue[Any]) -> None:
        """The thread's work: what it makes, or what went wrong, goes into the queue; None ends it."""
        try:
            if generation["num_beams"] > 1:
                for token in self._run(ids, _Read(), generation, streamer=None)[len(ids) :]:
                    pieces.put(token)
            else:
                self._run(ids, self._read, generation, streamer=_QueueStreamer(pieces))
            if self._cancelled.is_set():
                self.answer.finish_reason = "cancelled"
        except BaseException as error:
            self._read = _Read()
            pieces.put(error)
        finally:
            pieces.put(None)

    @torch.inference_mode()
    def _run(self, ids: list[int], read: _Read, generation: dict[str, Any], streamer: BaseStreamer | None) -> list[int]:
        """Generate from where the cache ends; return all ids and remember what the cache holds then."""
        keys = [key for key, _ in self._pictures]
        kept = self._common_prefix(ids, keys, read)
        if read.cache is None or kept == 0 or not _can_crop(read.cache):
            read.cache, kept = DynamicCache(config=self.model.config.get_text_config(decoder=True)), 0
        elif kept < read.cache.get_seq_length():
            read.cache.crop(kept - read.cache.get_seq_length())  # negative: how many to forget
        self.answer.cached_tokens = kept
        inputs: dict[str, Any] = {"past_key_values": read.cache} if streamer else {}
        old_pictures = ids[:kept].count(self.model.config.image_token_id) // self.model.config.num_image_tokens
        if new := self._pictures[old_pictures:]:
            embeds = torch.stack([self._embed(key, picture) for key, picture in new])
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=embeds)}
        options = dict(generation)
        if (seed := options.pop("seed")) is not None:
            torch.manual_seed(seed)
        # Only on what is newly said, as in the original, whose `generate` never sees the prompt's ids. The library
        # lets this one take the place of its own, which would count them.
        penalty = options.pop("repetition_penalty", self.model.generation_config.repetition_penalty or 1.0)
        processor = RepetitionPenaltyLogitsProcessor(float(penalty), prompt_ignore_length=len(ids))
        input_ids = torch.tensor([ids], device=self.model.device)
        output: list[int] = self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            logits_processor=LogitsProcessorList([processor]),
            stopping_criteria=StoppingCriteriaList([_Cancelled(self._cancelled)]),
            streamer=streamer,
            **inputs,
            **options,
            suppress_tokens=self._never_said(),
            **self._stops(),
        )[0].tolist()
        if streamer:
            self._read = _Read(output[: read.cache.get_seq_length()], keys, read.cache)
        return output

    def _common_prefix(self, ids: list[int], keys: list[str], read: _Read) -> int:
        """Count the ids that the cache holds already, whole pictures only, and leave at least one to read."""
        marker, width = self.model.config.image_token_id, self.model.config.num_image_tokens
        place = 0
        pictures = 0
        while place < min(len(ids) - 1, len(read.ids)) and ids[place] == read.ids[place]:
            if ids[place] != marker:
                place += 1
                continue
            if read.pictures[pictures : pictures + 1] != keys[pictures : pictures + 1]:
                break
            if place + width > min(len(ids) - 1, len(read.ids)):
                break
            place, pictures = place + width, pictures + 1
        return place

    def _embed(self, key: str, picture: Image.Image) -> Tensor:
        """Return the embeddings of a picture, computed once."""
        embeds = self._image_cache.get(key)
        if embeds is None:
            pixels = self.processor.image_processor([picture], return_tensors="pt").pixel_values
            pixels = pixels.to(self.model.device, self.model.dtype)
            embeds = cast(Tensor, self.model.get_image_features(pixels).pooler_output)[0]
            self._image_cache.put(key, embeds)
        return embeds

    def _never_said(self) -> list[int]:
        """List what the model's own settings forbid, and the image token: said, it would be a picture's place."""
        return [*(self.model.generation_config.suppress_tokens or []), self.model.config.image_token_id]

    def _stops(self) -> dict[str, Any]:
        """Say what ends an answer: end tokens where a stop string is a control token, else the strings."""
        tokenizer = self.processor.tokenizer
        ends = self.model.generation_config.eos_token_id
        end_ids = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        # An ordinary word of the vocabulary, such as "###", can also be said in smaller pieces.
        controls = tokenizer.added_tokens_encoder
        end_ids += [controls[stop] for stop in self.template.stop_strings if stop in controls]
        strings = [stop for stop in self.template.stop_strings if stop not in controls]
        stops: dict[str, Any] = {"eos_token_id": sorted(set(end_ids)), "pad_token_id": tokenizer.pad_token_id}
        return stops | ({"stop_strings": strings, "tokenizer": tokenizer} if strings else {})


def _can_crop(cache: DynamicCache) -> bool:
    """Tell whether the cache can forget its end; layers with a sliding window cannot."""
    return not any(getattr(layer, "is_sliding", False) for layer in cache.layers)


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
