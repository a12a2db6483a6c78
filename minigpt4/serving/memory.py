"""Conversations that were read, for those that go on from them: the one with the longest common beginning is taken."""

from collections import OrderedDict
from dataclasses import dataclass, field

from transformers import DynamicCache

from minigpt4.reading import Read, can_crop, common_prefix
from minigpt4.serving.batch import keys_and_values


@dataclass
class ReadMemory:
    """Caches of keys and values, the least recently kept forgotten first.

    Args:
        max_bytes: Most bytes kept.
    """

    max_bytes: int
    _kept: OrderedDict[int, Read] = field(default_factory=OrderedDict)
    _next: int = 0

    def take(self, ids: list[int], pictures: list[str], marker: int, width: int) -> Read:
        """Return, and forget, the conversation that has most of this one's beginning; an empty one if none has any."""
        best, length = None, 0
        for number, read in self._kept.items():
            shared = common_prefix(ids, pictures, read, marker, width)
            if shared > length:
                best, length = number, shared
        return Read() if best is None else self._kept.pop(best)

    def keep(self, read: Read) -> None:
        """Keep a conversation."""
        if read.cache is None or not can_crop(read.cache):
            return
        self._kept[self._next] = read
        self._next += 1
        while sum(_num_bytes(kept.cache) for kept in self._kept.values()) > self.max_bytes:
            self._kept.popitem(last=False)


def _num_bytes(cache: DynamicCache | None) -> int:
    return sum(k.nbytes + v.nbytes for k, v in keys_and_values(cache)) if cache is not None else 0
