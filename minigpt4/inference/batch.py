"""Several answers in progress, one step of the language model at a time for all of them together.

Each answer brings its own cache of keys and values; in the batch they are padded on the left to the longest, and
positions count without the padding, so every row is computed as if it were alone. Rows join and leave between steps.

Knows tensors; no text, no queue and no requests.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from minigpt4.model import MiniGPT4ForConditionalGeneration


def can_be_batched(cache: DynamicCache) -> bool:
    """Tell whether a cache is plain keys and values: nothing that slides, and no state of another kind."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


@dataclass
class DecodeBatch:
    """The rows that are decoded together.

    Args:
        model: The model.
    """

    model: MiniGPT4ForConditionalGeneration
    lengths: list[int] = field(default_factory=list)
    _layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.lengths)

    @property
    def _width(self) -> int:
        return max(self.lengths, default=0)

    def join(self, cache: DynamicCache) -> None:
        """Add a row, the last, with a cache of its own; the cache must not be used by anyone else after that."""
        length = cache.get_seq_length()
        width = max(self._width, length)
        joined = []
        for number, (own_keys, own_values) in enumerate(keys_and_values(cache)):
            row = (_padded(own_keys, width), _padded(own_values, width))
            if not self.lengths:
                joined.append(row)
                continue
            keys, values = self._layers[number]
            joined.append((torch.cat([_padded(keys, width), row[0]]), torch.cat([_padded(values, width), row[1]])))
        self._layers = joined
        self.lengths.append(length)

    def leave(self, row: int) -> DynamicCache:
        """Take a row out; returns its cache, without padding."""
        length, width = self.lengths[row], self._width
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self._layers):
            own = slice(width - length, width)
            cache.update(keys[row : row + 1, :, own].clone(), values[row : row + 1, :, own].clone(), number)
        others = [i for i in range(len(self.lengths)) if i != row]
        self.lengths = [self.lengths[i] for i in others]
        start = width - self._width  # what was padding for all that stay
        self._layers = [(k[others, :, start:], v[others, :, start:]) for k, v in self._layers] if others else []
        return cache

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> Tensor:
        """Read one token in every row.

        Args:
            tokens: The last id of each row.

        Returns:
            Logits of what comes next, `(rows, vocabulary)`.
        """
        width = self._width
        device = self.model.device
        lengths = torch.tensor(self.lengths, device=device)
        places = torch.arange(width + 1, device=device)
        mask = (places >= (width - lengths)[:, None]).long()
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self._layers):
            cache.update(keys, values, number)
        options: dict[str, Any] = {} if len(set(self.lengths)) == 1 else {"attention_mask": mask}
        output = self.model(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            position_ids=lengths[:, None],
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        self._layers = keys_and_values(cache)
        self.lengths = [length + 1 for length in self.lengths]
        logits: Tensor = output.logits[:, -1]
        return logits


def keys_and_values(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Return what a plain cache holds, layer by layer, each `(rows, heads, length, size)`."""
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def _padded(tensor: Tensor, width: int) -> Tensor:
    """Pad `(rows, heads, length, size)` on the left of its length."""
    return torch.nn.functional.pad(tensor, (0, 0, width - tensor.shape[2], 0))
