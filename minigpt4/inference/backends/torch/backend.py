"""Run time on torch: every model, every device; the other run times are compared with it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import (
    DynamicCache,
    ForcedEOSTokenLogitsProcessor,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from minigpt4.inference.backends.protocol import Logits, ModelInfo
from minigpt4.inference.backends.torch.attention import AttentionMap, AttentionMaps
from minigpt4.inference.backends.torch.batch import DecodeBatch, is_plain
from minigpt4.inference.backends.torch.beam_search import beam_search
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.processing.processing_minigpt4 import MiniGPT4Processor
from minigpt4.processing.prompts import PromptTemplate
from minigpt4.processing.prompts import template as template_named


@dataclass(eq=False)
class TorchSlot:
    """What was read of one conversation.

    Args:
        ids: Read, in order.
        images: Embeddings of the pictures among them.
        cache: Keys and values; None while they are in the batch.
    """

    ids: list[int]
    images: list[Tensor]
    cache: DynamicCache | None
    batch: DecodeBatch = field(repr=False)

    @property
    def length(self) -> int:
        """Ids read."""
        return len(self.ids)

    @property
    def own_cache(self) -> DynamicCache:
        """Its cache, taken out of the batch if it is there."""
        if self.cache is None:
            self.cache = self.batch.leave(self)
        return self.cache

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        layers: list[Any] = self.own_cache.layers
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if layer.is_initialized)

    @property
    def can_be_cropped(self) -> bool:
        """Whether the cache is plain keys and values: nothing that slides, and no state of another kind."""
        return is_plain(self.own_cache)


class TorchBackend:
    """A model on torch; see `Backend` for its methods.

    Args:
        model: The model, on its device.
        processor: Its processor.
        template: Name of the prompt template; default the processor's.
    """

    def __init__(
        self, model: MiniGPT4ForConditionalGeneration, processor: MiniGPT4Processor, template: str | None = None
    ) -> None:
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.template: PromptTemplate = template_named(template or processor.template)
        self._batch = DecodeBatch(model)
        self._maps: AttentionMaps | None = None
        # What FSDP2 gathers in inference mode could not learn afterwards.
        spread = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        self._without_gradients: Any = torch.no_grad if spread else torch.inference_mode
        # Phi-3's class, for one, reads all again where its positions change their scale.
        kind: Any = model.language_model_class
        self._steps_by_class = kind.prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation

    @property
    def info(self) -> ModelInfo:
        """What the model is, by its configuration and generation settings of this moment."""
        return _info(self.model, self.processor, self.template)

    def encode(self, picture: Image.Image) -> Tensor:
        """Encode a picture: `(num_image_tokens, text width)`."""
        pixels = self.processor.image_processor([picture], return_tensors="pt").pixel_values
        pixels = pixels.to(self.model.device, self.model.dtype)
        with self._without_gradients():
            return cast(Tensor, self.model.get_image_features(pixels).pooler_output)[0]

    def new_slot(self) -> TorchSlot:
        """Return an empty slot."""
        return TorchSlot([], [], DynamicCache(config=self.model.config.get_text_config(decoder=True)), self._batch)

    def prefill(self, slot: TorchSlot, ids: Sequence[int], images: Sequence[Tensor]) -> Logits:
        """Read ids and the pictures among them into a slot; return the last logits `(vocabulary,)`."""
        with self._without_gradients():
            output = self.model(
                input_ids=torch.tensor([list(ids)], device=self.model.device),
                past_key_values=slot.own_cache,
                use_cache=True,
                logits_to_keep=1,
                **image_inputs(images),
            )
        slot.cache = output.past_key_values
        slot.ids += ids
        slot.images += images
        return _array(output.logits[0, -1])

    def step(self, slots: Sequence[TorchSlot], tokens: Sequence[int]) -> Logits:
        """Read one id into each slot; return logits `(slots, vocabulary)`.

        Plain caches are read in one batch; one alone stays out of it, where nothing is padded or copied.
        """
        with self._without_gradients():
            return self._step(slots, tokens)

    def _step(self, slots: Sequence[TorchSlot], tokens: Sequence[int]) -> Logits:
        logits: dict[int, Logits] = {}
        together = [] if self._steps_by_class else [n for n, slot in enumerate(slots) if self._can_be_batched(slot)]
        if len(together) > 1:
            members = [slots[n] for n in together]
            rows = _array(self._batch.step(members, [tokens[n] for n in together]))
            logits = dict(zip(together, rows, strict=True))
        for number, (slot, token) in enumerate(zip(slots, tokens, strict=True)):
            slot.ids.append(token)
            if number not in logits:
                logits[number] = self._step_alone(slot)
        return np.stack([logits[number] for number in range(len(slots))])

    def _can_be_batched(self, slot: TorchSlot) -> bool:
        return slot.cache is None or is_plain(slot.cache)

    def _step_alone(self, slot: TorchSlot) -> Logits:
        cache = slot.own_cache
        device = self.model.device
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([slot.ids[-1:]], device=device),
            "past_key_values": cache,
            "use_cache": True,
        }
        if self._steps_by_class:
            ids = torch.tensor([slot.ids], device=device)
            inputs = self.model.prepare_inputs_for_generation(
                ids, past_key_values=cache, attention_mask=torch.ones_like(ids), next_sequence_length=1,
                is_first_iteration=False, use_cache=True, **image_inputs(slot.images),
            )  # fmt: skip
        output = self.model(**inputs)
        slot.cache = output.past_key_values
        return _array(output.logits[0, -1])

    def crop(self, slot: TorchSlot, length: int) -> None:
        """Forget all but the first ids of a slot."""
        if length < slot.length:
            slot.own_cache.crop(length - slot.length)  # negative: how many to forget
            self._shorten(slot, length)

    def fork(self, slot: TorchSlot, length: int) -> TorchSlot:
        """Copy the first ids of a slot into a new one."""
        copy = TorchSlot(list(slot.ids), list(slot.images), DynamicCache(), self._batch)
        layers: list[Any] = slot.own_cache.layers
        for number, layer in enumerate(layers):
            copy.own_cache.update(layer.keys[:, :, :length], layer.values[:, :, :length], number)  # copies them
        self._shorten(copy, length)
        return copy

    def drop(self, slot: TorchSlot) -> None:
        """Free a slot, in whatever state an error has left it."""
        if slot.cache is None:
            self._batch.discard(slot)
        slot.cache = DynamicCache()

    def sampling(self, seed: int | None, prompt_length: int, max_new_tokens: int) -> tuple[Any, Any]:
        """Return what a `Sampler` draws with, the original's draws for a seed, and the model's further rules."""
        random = torch.Generator(self.model.device)
        if seed is None:
            random.seed()
        else:
            random.manual_seed(seed)

        def draw(scores: Logits) -> int:
            probabilities = torch.from_numpy(scores).to(self.model.device).softmax(dim=-1)
            return int(torch.multinomial(probabilities, 1, generator=random))

        rules = _rules(self.model.generation_config, prompt_length + max_new_tokens)

        def model_rules(ids: Sequence[int], scores: Logits) -> Logits:
            so_far: Any = torch.tensor([list(ids)])
            return _array(rules(so_far, torch.from_numpy(scores)[None])[0])

        return draw, model_rules if rules else None

    def beam_search(
        self, ids: Sequence[int], images: Sequence[Tensor], options: dict[str, Any], stopped: Callable[[], bool]
    ) -> list[int]:
        """Return the ids of the best answer, as the library's search finds it."""
        info = self.info
        stops: dict[str, Any] = {
            "eos_token_id": list(info.end_ids),
            "pad_token_id": self.tokenizer.pad_token_id,
            "suppress_tokens": list(info.suppressed_ids),
        }
        # An ordinary word of the vocabulary, such as "###", can also be generated in smaller pieces.
        strings = [stop for stop in self.template.stop_strings if stop not in self.tokenizer.added_tokens_encoder]
        if strings:
            stops |= {"stop_strings": strings, "tokenizer": self.tokenizer}
        return beam_search(self.model, ids, options | stops | image_inputs(images), stopped)

    def attention_map(self, messages: Sequence[dict[str, Any]], span: tuple[int, int] | None) -> AttentionMap:
        """Return where the model looked on the last picture of a conversation."""
        if self._maps is None:
            self._maps = AttentionMaps(self.model, self.processor)
        return self._maps.look(messages, span)

    @staticmethod
    def _shorten(slot: TorchSlot, length: int) -> None:
        image_token = slot.batch.model.config.image_token_id
        width = slot.batch.model.config.num_image_tokens
        del slot.ids[length:]
        del slot.images[slot.ids.count(image_token) // width :]


def load(
    model: Any,  # noqa: ANN401  (a name, a folder or a model)
    processor: MiniGPT4Processor | None,
    template: str | None,
    **options: Any,
) -> TorchBackend:
    """Load a model, or take one that is loaded; see `minigpt4.load`."""
    if not isinstance(model, torch.nn.Module):
        from minigpt4.weights import load as load_model

        model, processor = load_model(model, **options)
    return TorchBackend(cast(MiniGPT4ForConditionalGeneration, model), cast(MiniGPT4Processor, processor), template)


def image_inputs(images: Sequence[Tensor]) -> dict[str, Any]:
    """Return image embeddings as an argument of the model."""
    if not images:
        return {}
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=torch.stack(list(images)))}}


def _info(model: MiniGPT4ForConditionalGeneration, processor: MiniGPT4Processor, template: PromptTemplate) -> ModelInfo:
    generation: Any = model.generation_config
    ends = generation.eos_token_id
    end_ids = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    controls = processor.tokenizer.added_tokens_encoder
    end_ids += [controls[stop] for stop in template.stop_strings if stop in controls]
    images = processor.image_processor
    size = images.size
    resized = images.do_resize and size.height and size.width
    return ModelInfo(
        context=getattr(model.config.get_text_config(), "max_position_embeddings", None),
        image_token_id=model.config.image_token_id,
        num_image_tokens=model.config.num_image_tokens,
        image_size=(int(size.width), int(size.height), int(images.resample)) if resized else None,
        end_ids=tuple(sorted(set(end_ids))),
        suppressed_ids=(*(generation.suppress_tokens or []), model.config.image_token_id),
        repetition_penalty=generation.repetition_penalty or 1.0,
        top_p=1.0 if generation.top_p is None else generation.top_p,
        min_p=generation.min_p or 0.0,
        min_new_tokens=generation.min_new_tokens or 0,
        has_attention_maps=model.config.qformer_config is not None,
    )


def _rules(settings: GenerationConfig, max_length: int) -> LogitsProcessorList:
    """List what generation settings of a model ask for that few have, by the library's own classes."""
    made: dict[str, Any] = {
        "no_repeat_ngram_size": lambda value: NoRepeatNGramLogitsProcessor(value),
        "bad_words_ids": lambda value: NoBadWordsLogitsProcessor(value, settings.eos_token_id),
        "forced_eos_token_id": lambda value: ForcedEOSTokenLogitsProcessor(max_length, value, device="cpu"),
    }
    return LogitsProcessorList(make(value) for name, make in made.items() if (value := getattr(settings, name, None)))


def _array(logits: Tensor) -> Logits:
    return cast(Logits, logits.float().cpu().numpy())
