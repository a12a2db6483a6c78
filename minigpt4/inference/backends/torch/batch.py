"""Several answers in progress, one step of the language model at a time for all of them together.

Caches are padded on the left to the longest, and positions count without the padding, so every row is computed as if it
were alone. Rows join and leave between steps. Knows tensors; no text and no requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from minigpt4.model import MiniGPT4ForConditionalGeneration

if TYPE_CHECKING:
    from minigpt4.inference.backends.torch.backend import TorchSlot


def is_plain(cache: DynamicCache) -> bool:
    """Whether a cache is keys and values alone: no sliding window, and no state of another kind."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


@dataclass
class DecodeBatch:
    """The slots that are decoded together, and their caches as one.

    Args:
        model: The model.
    """

    model: MiniGPT4ForConditionalGeneration
    _slots: list["TorchSlot"] = field(default_factory=list)
    _lengths: list[int] = field(default_factory=list)
    _cache: DynamicCache = field(default_factory=DynamicCache)

    def step(self, slots: Sequence["TorchSlot"], tokens: Sequence[int]) -> Tensor:
        """Read one id in every slot; those of the step before that are not among them leave.

        Returns:
            Logits `(slots, vocabulary)`.
        """
        for slot in [slot for slot in self._slots if slot not in slots]:
            slot.cache = self.leave(slot)
        for slot in [slot for slot in slots if slot not in self._slots]:
            self._join(slot)
        token_of = dict(zip(map(id, slots), tokens, strict=True))
        device = self.model.device
        width = max(self._lengths)
        lengths = torch.tensor(self._lengths, device=device)
        mask = (torch.arange(width + 1, device=device) >= (width - lengths)[:, None]).long()
        padded: dict[str, Any] = {} if len(set(self._lengths)) == 1 else {"attention_mask": mask}
        output = self.model(
            input_ids=torch.tensor([[token_of[id(slot)]] for slot in self._slots], device=device),
            position_ids=lengths[:, None],
            past_key_values=self._cache,
            use_cache=True,
            **padded,
        )
        self._lengths = [length + 1 for length in self._lengths]
        order = [self._slots.index(slot) for slot in slots]
        logits: Tensor = output.logits[order, -1]
        return logits

    def leave(self, slot: "TorchSlot") -> DynamicCache:
        """Take a slot out; returns its cache, without padding."""
        row = self._slots.index(slot)
        length, width = self._lengths[row], max(self._lengths)
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self._layers):
            own = slice(width - length, width)
            cache.update(keys[row : row + 1, :, own], values[row : row + 1, :, own], number)  # copies them
        self.discard(slot)
        return cache

    def discard(self, slot: "TorchSlot") -> None:
        """Take a slot out and forget its cache, in whatever state an error has left the batch."""
        row = self._slots.index(slot)
        width = max(self._lengths)
        del self._slots[row], self._lengths[row]
        if not self._slots:
            self._cache = DynamicCache()
            return
        start = width - max(self._lengths)  # what was padding for all that stay
        others = [i for i in range(len(self._slots) + 1) if i != row]
        for layer in self._cache.layers:
            plain: Any = layer
            plain.keys, plain.values = plain.keys[others, :, start:], plain.values[others, :, start:]

    @property
    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values, layer by layer, each `(slots, heads, width, size)`."""
        layers: list[Any] = self._cache.layers
        return [(layer.keys, layer.values) for layer in layers]

    def _join(self, slot: "TorchSlot") -> None:
        """Add a slot, the last row; its cache becomes part of the batch's."""
        assert slot.cache is not None  # only a slot of this batch has none
        if not self._slots:
            self._cache = slot.cache
        else:
            width = max(*self._lengths, slot.length)
            own: list[Any] = slot.cache.layers
            layers: list[Any] = self._cache.layers
            for layer, new in zip(layers, own, strict=True):
                layer.keys = torch.cat([_padded(layer.keys, width), _padded(new.keys, width)])
                layer.values = torch.cat([_padded(layer.values, width), _padded(new.values, width)])
        self._slots.append(slot)
        self._lengths.append(slot.length)
        slot.cache = None


def _padded(tensor: Tensor, width: int) -> Tensor:
    """Pad `(rows, heads, length, size)` on the left of its length."""
    return torch.nn.functional.pad(tensor, (0, 0, width - tensor.shape[2], 0))
