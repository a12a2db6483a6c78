"""What all texts begin with, read once: a frozen language model makes the same keys and values of it at every update.

Before the picture stand the template's system message and the mark of the user: in MiniGPT-4's own template more places
(42 with SmolLM2's tokenizer) than the picture takes. No gradient is needed there, since nothing that learns comes
before it.

All is read each time where the language model learns itself, is spread over devices, computes its activations twice, or
keeps something else than keys and values; and where a trial shows another result.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from minigpt4.data.examples import IGNORED
from minigpt4.model import MiniGPT4ForConditionalGeneration

SHORTEST = 2
"""Fewer places are not worth it."""
MOST = 16
"""Beginnings that are kept; a run has one, or as many as its prompts have words before the picture."""
TRIED_WITH = 16
"""Places of the text that a language model is tried with."""
ALIKE = 0.1
"""How far a text may lie from the same text read as a whole, relative to the text without its beginning."""


@dataclass(frozen=True)
class Beginning:
    """Keys and values of a text's beginning.

    Args:
        length: Places.
        layers: Keys and values of each layer, `(1, heads, length, head size)`.
    """

    length: int
    layers: tuple[tuple[Tensor, Tensor], ...]

    def cache(self, batch: int) -> DynamicCache:
        """Return them as what so many rows have read."""
        made = DynamicCache()
        for number, (keys, values) in enumerate(self.layers):
            made.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), number)
        return made


class Beginnings:
    """The beginnings that a model has read.

    They hold for as long as its language model stays as it is.
    """

    def __init__(self) -> None:
        self._read: dict[tuple[Any, ...], Beginning] = {}
        self._works: bool | None = None

    def of(self, model: MiniGPT4ForConditionalGeneration, batch: dict[str, Any]) -> Beginning | None:
        """Return what all rows of a batch begin with, up to the first picture or answer; None to read all of it.

        Text alone begins otherwise each time, so that is read as a whole.

        Args:
            model: The model.
            batch: With `input_ids` and `labels` `(batch, length)`.
        """
        image_token_id = model.config.image_token_id
        ids = beginning_of(batch, image_token_id)
        if len(ids) < SHORTEST or not (batch["input_ids"] == image_token_id).any() or not stays_as_it_is(model):
            return None
        # Autocast decides in which numbers keys and values are.
        device = model.get_input_embeddings().weight.device.type
        key = (*ids, torch.is_autocast_enabled(device))
        with torch.no_grad():
            if self._works is None:
                self._works = works(model, ids)
            if not self._works:
                return None
            if key not in self._read:
                if len(self._read) == MOST:
                    self._read.clear()
                self._read[key] = read(model, ids)
        return self._read[key]


def beginning_of(batch: dict[str, Any], image_token_id: int) -> list[int]:
    """Return the ids that all rows have before a picture and before what is learnt.

    Args:
        batch: See `Beginnings.of`.
        image_token_id: The id at a picture's places.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    # The place that predicts the first learnt one is read with the rest.
    ended = (ids != ids[:1]) | (ids == image_token_id) | (labels.roll(-1, dims=1) != IGNORED)
    places = ended.any(dim=0).nonzero()
    length = int(places[0]) if len(places) else 0
    beginning: list[int] = ids[0, :length].tolist()
    return beginning


def stays_as_it_is(model: MiniGPT4ForConditionalGeneration) -> bool:
    """Tell whether the language model is frozen, whole on its device, and keeps its activations."""
    language_model = model.model.language_model
    return not (
        any(getattr(module, "gradient_checkpointing", False) for module in language_model.modules())
        or any(p.requires_grad or isinstance(p, DTensor) for p in language_model.parameters())
    )


def read(model: MiniGPT4ForConditionalGeneration, ids: list[int]) -> Beginning:
    """Read a beginning.

    Raises:
        ValueError: The language model keeps something else than keys and values.
    """
    cache = DynamicCache(config=model.config.text_config)
    _hidden(model, ids, past_key_values=cache, use_cache=True)
    layers = []
    for layer in cache.layers:
        if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
            raise ValueError("the language model keeps something else than keys and values")
        layers.append((layer.keys, layer.values))
    return Beginning(len(ids), tuple(layers))


def works(model: MiniGPT4ForConditionalGeneration, ids: list[int]) -> bool:
    """Try whether a text that goes on from a beginning is read as the whole of both is."""
    drawn = torch.randperm(model.config.text_config.vocab_size, generator=torch.Generator().manual_seed(0))
    words = drawn[drawn != model.config.image_token_id][:TRIED_WITH].tolist()
    try:
        beginning = read(model, ids)
        goes_on = _hidden(model, words, past_key_values=beginning.cache(1))
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False  # it keeps what it read in a way of its own
    whole, alone = _hidden(model, ids + words)[-len(words) :], _hidden(model, words)
    return bool((goes_on - whole).norm() <= ALIKE * (alone - whole).norm())


def _hidden(model: MiniGPT4ForConditionalGeneration, ids: list[int], **more: Any) -> Tensor:
    """Return what the language model makes of a text, `(places, width)`."""
    device = model.get_input_embeddings().weight.device
    options = {"use_cache": False, **more}
    hidden: Tensor = model.model(input_ids=torch.tensor([ids], device=device), **options).last_hidden_state[0]
    return hidden.float()
