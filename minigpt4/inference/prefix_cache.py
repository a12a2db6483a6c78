"""Conversations that were read, for those that go on from them, or begin as they do."""

from collections import OrderedDict
from dataclasses import dataclass, field

from transformers import DynamicCache

from minigpt4.inference.batch import can_be_batched, keys_and_values
from minigpt4.inference.reading import Read, common_prefix

TAIL = 8
"""Tokens at the end of an answer that may be spelled in another way when the answer is read as part of a prompt."""


@dataclass
class ReadMemory:
    """Caches of keys and values, the least recently used forgotten first.

    Args:
        max_bytes: Most bytes kept.
    """

    max_bytes: int
    _kept: OrderedDict[int, Read] = field(default_factory=OrderedDict)
    _next: int = 0

    def __len__(self) -> int:
        """How many conversations are kept."""
        return len(self._kept)

    def take(self, ids: list[int], pictures: list[str], marker: int, width: int) -> Read:
        """Return what was read of a conversation's beginning, for the caller to change.

        A conversation that goes on is handed over, without a copy. Of another one that merely begins in the same way,
        as all do that have the same instructions, the beginning is copied, and it stays.

        Args:
            ids: Of the whole conversation.
            pictures: Its pictures, by content.
            marker: The id that holds a picture's places.
            width: Places of a picture.
        """
        best, shared = None, 0
        for number, read in self._kept.items():
            length = common_prefix(ids, pictures, read, marker, width)
            if length > shared:
                best, shared = number, length
        if best is None:
            return Read()
        if shared >= len(self._kept[best].ids) - TAIL:
            return self._kept.pop(best)
        self._kept.move_to_end(best)
        return _beginning(self._kept[best], shared, marker, width)

    def keep(self, read: Read) -> None:
        """Keep a conversation, in place of its own beginnings."""
        if read.cache is None or not can_be_batched(read.cache):
            return
        for number in [number for number, kept in self._kept.items() if _begins(kept, read)]:
            del self._kept[number]
        self._kept[self._next] = read
        self._next += 1
        while sum(_num_bytes(kept.cache) for kept in self._kept.values()) > self.max_bytes:
            self._kept.popitem(last=False)


def _beginning(read: Read, length: int, marker: int, width: int) -> Read:
    assert read.cache is not None  # those without are not kept
    cache = DynamicCache()
    for number, (keys, values) in enumerate(keys_and_values(read.cache)):
        cache.update(keys[:, :, :length].clone(), values[:, :, :length].clone(), number)
    ids = read.ids[:length]
    return Read(ids, read.pictures[: ids.count(marker) // width], cache)


def _begins(one: Read, other: Read) -> bool:
    """Whether a conversation is the beginning of another one, or the same."""
    same_ids = other.ids[: len(one.ids)] == one.ids
    return same_ids and other.pictures[: len(one.pictures)] == one.pictures


def _num_bytes(cache: DynamicCache | None) -> int:
    return sum(k.nbytes + v.nbytes for k, v in keys_and_values(cache)) if cache is not None else 0
