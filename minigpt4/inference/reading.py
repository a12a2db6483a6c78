"""What a language model has read, and how the next question reads only what is new.

A cache of keys and values belongs to a list of ids and to the pictures among them. A longer conversation takes it up
where the two part; pictures are embedded once, by content. Neither changes an answer. What does, beside an answer's
options, is the same for all who answer and stands here too: what is never said, what ends an answer, and its scores.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from PIL import Image
from torch import FloatTensor, LongTensor, Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.cache_utils import DynamicLayer

from minigpt4.errors import ContextOverflowError, WeightsError
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.processing.processing_minigpt4 import MiniGPT4Processor
from minigpt4.processing.prompts import PromptTemplate


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
class Read:
    """What a language model's cache holds: ids, and the pictures among them in order."""

    ids: list[int] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    cache: DynamicCache | None = None


def common_prefix(ids: Sequence[int], pictures: Sequence[str], read: Read, marker: int, width: int) -> int:
    """Count the ids that a cache holds already, whole pictures only, and leave at least one to read.

    Args:
        ids: Of the whole conversation.
        pictures: Its pictures, by content.
        read: What was read before.
        marker: The id that holds a picture's places.
        width: Places of a picture.
    """
    place = passed = 0
    while place < min(len(ids) - 1, len(read.ids)) and ids[place] == read.ids[place]:
        if ids[place] != marker:
            place += 1
            continue
        if list(read.pictures[passed : passed + 1]) != list(pictures[passed : passed + 1]):
            break
        if place + width > min(len(ids) - 1, len(read.ids)):
            break
        place, passed = place + width, passed + 1
    return place


def can_crop(cache: DynamicCache) -> bool:
    """Tell whether a cache can forget its end; layers with a sliding window or a state of another kind cannot."""
    return all(isinstance(layer, DynamicLayer) and not layer.is_sliding for layer in cache.layers)


def take_up(model: MiniGPT4ForConditionalGeneration, ids: Sequence[int], pictures: Sequence[str], read: Read) -> int:
    """Let a cache hold the beginning of a conversation and nothing else; returns how many ids that is."""
    marker, width = model.config.image_token_id, model.config.num_image_tokens
    kept = common_prefix(ids, pictures, read, marker, width)
    if read.cache is None or kept == 0 or not can_crop(read.cache):
        read.cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        return 0
    if kept < read.cache.get_seq_length():
        read.cache.crop(kept - read.cache.get_seq_length())  # negative: how many to forget
    return kept


def embed(
    model: MiniGPT4ForConditionalGeneration,
    processor: MiniGPT4Processor,
    key: str,
    picture: Image.Image,
    cache: ImageCache,
) -> Tensor:
    """Return the embeddings `(num_image_tokens, text width)` of a picture, computed once."""
    embeds = cache.get(key)
    if embeds is None:
        pixels = processor.image_processor([picture], return_tensors="pt").pixel_values
        pixels = pixels.to(model.device, model.dtype)
        embeds = cast(Tensor, model.get_image_features(pixels).pooler_output)[0]
        cache.put(key, embeds)
    return embeds


def check_length(model: MiniGPT4ForConditionalGeneration, prompt_tokens: int, max_new_tokens: int) -> None:
    """Refuse what the language model cannot read to its end.

    Raises:
        ContextOverflowError: Prompt and answer together are longer than its context.
    """
    limit = getattr(model.config.text_config, "max_position_embeddings", None)
    if limit and prompt_tokens + max_new_tokens > limit:
        raise ContextOverflowError(
            f"the conversation has {prompt_tokens} tokens and the answer may have {max_new_tokens}, "
            f"the language model reads {limit} together",
            hint="ask for fewer new tokens, take back a turn, or begin anew",
        )


def never_said(model: MiniGPT4ForConditionalGeneration) -> list[int]:
    """List what the model's own settings forbid, and the image token: said, it would be a picture's place."""
    return [*(model.generation_config.suppress_tokens or []), model.config.image_token_id]


class _NumbersOnly(LogitsProcessor):
    """Refuses scores that are no numbers: the most likely of them, or one drawn, would be a token like any other."""

    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> FloatTensor:
        """Return the scores as they are."""
        if not bool(scores.max() < math.inf):  # also where one is NaN
            raise WeightsError(
                "the language model's scores are no numbers",
                hint="its weights are damaged, or need more bits: load it as float32",
            )
        return scores


def answer_rules(
    model: MiniGPT4ForConditionalGeneration, options: Mapping[str, Any], prompt_length: int
) -> LogitsProcessorList:
    """Return what the scores of every answer go through, said alone, beside others or by a search.

    A penalty for repetition counts what is newly said alone, as in the original, whose `generate` never sees the
    prompt's ids. `generate` lets this one take the place of its own, which would count them.

    Args:
        model: The model; its own penalty holds where the options have none.
        options: As `generation_options` returns them.
        prompt_length: Ids before the answer.
    """
    penalty = options.get("repetition_penalty", model.generation_config.repetition_penalty or 1.0)
    repetition = RepetitionPenaltyLogitsProcessor(float(penalty), prompt_ignore_length=prompt_length)
    return LogitsProcessorList([_NumbersOnly(), repetition])


def stops(
    model: MiniGPT4ForConditionalGeneration, processor: MiniGPT4Processor, template: PromptTemplate
) -> dict[str, Any]:
    """Say what ends an answer, for `generate`: end tokens where a stop string is a control token, else the strings."""
    tokenizer = processor.tokenizer
    ends = model.generation_config.eos_token_id
    end_ids = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    # An ordinary word of the vocabulary, such as "###", can also be said in smaller pieces.
    controls = tokenizer.added_tokens_encoder
    end_ids += [controls[stop] for stop in template.stop_strings if stop in controls]
    strings = [stop for stop in template.stop_strings if stop not in controls]
    said: dict[str, Any] = {"eos_token_id": sorted(set(end_ids)), "pad_token_id": tokenizer.pad_token_id}
    return said | ({"stop_strings": strings, "tokenizer": tokenizer} if strings else {})
