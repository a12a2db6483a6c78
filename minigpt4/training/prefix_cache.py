"""Keys and values of the prefix of all texts, which a frozen language model computes once for all updates.

Before the picture come the template's system message and the mark of the user: in MiniGPT-4's own template more tokens
(42 with SmolLM2's tokenizer) than the picture takes. No gradient is needed there, since nothing trained comes before.

There is no caching where the language model is trained, sharded, checkpoints its activations, or caches something else
than keys and values; nor where a trial gives another result.
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

MIN_TOKENS = 2
"""Of a prefix worth caching."""
MAX_PREFIXES = 16
"""In the cache; a run has one, or one for each of its prompts with words before the picture."""
TRIAL_TOKENS = 16
TOLERANCE = 0.1
"""Of a text after a cached prefix to the same text read as a whole, relative to the text without its prefix."""


@dataclass(frozen=True)
class CachedPrefix:
    """Keys and values of a prefix.

    Args:
        length: Its tokens.
        layers: Keys and values of each layer, `(1, heads, length, head size)`.
    """

    length: int
    layers: tuple[tuple[Tensor, Tensor], ...]

    def cache(self, batch_size: int) -> DynamicCache:
        """Return them as the cache of a batch."""
        made = DynamicCache()
        for number, (keys, values) in enumerate(self.layers):
            made.update(keys.expand(batch_size, -1, -1, -1), values.expand(batch_size, -1, -1, -1), number)
        return made


class PrefixCache:
    """Cache of the prefixes of batches, valid while the language model stays as it is."""

    def __init__(self) -> None:
        self._prefixes: dict[tuple[Any, ...], CachedPrefix] = {}
        self._works: bool | None = None

    def get(self, model: MiniGPT4ForConditionalGeneration, batch: dict[str, Any]) -> CachedPrefix | None:
        """Return the prefix of all rows of a batch up to the first picture or answer; None if there is no caching.

        Texts without a picture have another prefix each time, so they are not cached.

        Args:
            model: The model.
            batch: With `input_ids` and `labels` `(batch, length)`.
        """
        image_token_id = model.config.image_token_id
        ids = common_prefix(batch, image_token_id)
        if len(ids) < MIN_TOKENS or not (batch["input_ids"] == image_token_id).any() or not _is_frozen(model):
            return None
        # Autocast decides the dtype of keys and values.
        key = (*ids, torch.is_autocast_enabled(model.get_input_embeddings().weight.device.type))
        with torch.no_grad():
            if self._works is None:
                self._works = _works(model, ids)
            if not self._works:
                return None
            if key not in self._prefixes:
                if len(self._prefixes) == MAX_PREFIXES:
                    self._prefixes.clear()
                self._prefixes[key] = prefill(model, ids)
        return self._prefixes[key]


def common_prefix(batch: dict[str, Any], image_token_id: int) -> list[int]:
    """Return the ids that all rows of a batch begin with, before a picture and before what predicts a target."""
    ids, labels = batch["input_ids"], batch["labels"]
    ended = (ids != ids[:1]) | (ids == image_token_id) | (labels.roll(-1, dims=1) != IGNORED)
    positions = ended.any(dim=0).nonzero()
    prefix: list[int] = ids[0, : int(positions[0]) if len(positions) else 0].tolist()
    return prefix


def prefill(model: MiniGPT4ForConditionalGeneration, ids: list[int]) -> CachedPrefix:
    """Compute the keys and values of a prefix.

    Raises:
        ValueError: The language model caches something else.
    """
    cache = DynamicCache(config=model.config.text_config)
    _hidden(model, ids, past_key_values=cache, use_cache=True)
    layers = []
    for layer in cache.layers:
        if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
            raise ValueError("the language model caches something else than keys and values")
        layers.append((layer.keys, layer.values))
    return CachedPrefix(len(ids), tuple(layers))


def _is_frozen(model: MiniGPT4ForConditionalGeneration) -> bool:
    """Return whether the language model is frozen, whole on its device, and keeps its activations."""
    language_model = model.model.language_model
    return not (
        any(getattr(module, "gradient_checkpointing", False) for module in language_model.modules())
        or any(p.requires_grad or isinstance(p, DTensor) for p in language_model.parameters())
    )


def _works(model: MiniGPT4ForConditionalGeneration, ids: list[int]) -> bool:
    """Try whether a text after a cached prefix is read as the whole of both is."""
    drawn = torch.randperm(model.config.text_config.vocab_size, generator=torch.Generator().manual_seed(0))
    text = drawn[drawn != model.config.image_token_id][:TRIAL_TOKENS].tolist()
    try:
        cached = _hidden(model, text, past_key_values=prefill(model, ids).cache(1))
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False  # its cache is of its own kind
    whole, alone = _hidden(model, ids + text)[-len(text) :], _hidden(model, text)
    return bool((cached - whole).norm() <= TOLERANCE * (alone - whole).norm())


def _hidden(model: MiniGPT4ForConditionalGeneration, ids: list[int], **options: Any) -> Tensor:
    """Return the language model's last hidden states of a text, `(length, width)`."""
    device = model.get_input_embeddings().weight.device
    options = {"use_cache": False, **options}
    hidden: Tensor = model.model(input_ids=torch.tensor([ids], device=device), **options).last_hidden_state[0]
    return hidden.float()
