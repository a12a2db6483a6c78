"""What was computed before and is reused: image embeddings, and the prefixes of conversations.

Neither changes an answer. Knows ids, content hashes and slots; no tensors.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minigpt4.inference.backends.protocol import Backend, ImageEmbeds

TAIL = 8
"""Ids at the end of an answer that may be spelled in another way when the answer is part of a prompt."""


@dataclass
class ImageCache:
    """Image embeddings by content hash, the least recently used dropped first.

    Args:
        max_bytes: Most bytes kept.
    """

    max_bytes: int = 256 * 2**20
    _entries: OrderedDict[str, ImageEmbeds] = field(default_factory=OrderedDict)

    def get(self, key: str) -> ImageEmbeds | None:
        """Return the embeddings of a picture, or None."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: str, embeds: ImageEmbeds) -> None:
        """Keep the embeddings of a picture."""
        self._entries[key] = embeds
        self._entries.move_to_end(key)
        while sum(kept.nbytes for kept in self._entries.values()) > self.max_bytes:
            self._entries.popitem(last=False)


@dataclass
class Prefix:
    """What a slot holds: ids, and the content hashes of the pictures among them in order."""

    ids: list[int]
    pictures: list[str]
    slot: Any


@dataclass
class PrefixCache:
    """Conversations in slots, for those that continue them or begin in the same way.

    Args:
        backend: Owns the slots.
        max_bytes: Most bytes kept, the least recently used dropped first; the last one stays whatever its size.
    """

    backend: Backend
    max_bytes: int
    _kept: list[Prefix] = field(default_factory=list)

    def __len__(self) -> int:
        """How many conversations are kept."""
        return len(self._kept)

    def take(self, ids: Sequence[int], pictures: Sequence[str]) -> tuple[Any, int]:
        """Return a slot that holds the longest known prefix of a conversation, and how many ids that is.

        The slot of a conversation that continues is handed over; of another that merely begins in the same way, as all
        with the same system message do, the common part is copied.

        Args:
            ids: Of the whole conversation; at least one is left to read.
            pictures: Content hashes of its pictures.
        """
        info = self.backend.info
        shared = [common_prefix(ids, pictures, kept, info.image_token_id, info.num_image_tokens) for kept in self._kept]
        length = max(shared, default=0)
        if length == 0:
            return self.backend.new_slot(), 0
        best = self._kept.pop(shared.index(length))
        if length >= len(best.ids) - TAIL:
            self.backend.crop(best.slot, length)
            return best.slot, length
        self._kept.append(best)
        return self.backend.fork(best.slot, length), length

    def keep(self, prefix: Prefix) -> None:
        """Keep a conversation, in place of its own prefixes; drop one whose slot cannot be reused."""
        if not prefix.slot.can_be_cropped:
            self.backend.drop(prefix.slot)
            return
        for kept in [kept for kept in self._kept if _is_prefix(kept, prefix)]:
            self._drop(kept)
        self._kept.append(prefix)
        while len(self._kept) > 1 and sum(kept.slot.nbytes for kept in self._kept) > self.max_bytes:
            self._drop(self._kept[0])

    def clear(self) -> None:
        """Drop all conversations."""
        for kept in list(self._kept):
            self._drop(kept)

    def _drop(self, kept: Prefix) -> None:
        self._kept.remove(kept)
        self.backend.drop(kept.slot)


def common_prefix(ids: Sequence[int], pictures: Sequence[str], kept: Prefix, image_token: int, width: int) -> int:
    """Count the ids of a conversation that a slot holds: whole pictures only, and at least one id is left to read.

    Args:
        ids: Of the whole conversation.
        pictures: Content hashes of its pictures.
        kept: What the slot holds.
        image_token: The id that holds the places of pictures.
        width: Places of a picture.
    """
    position = num_pictures = 0
    end = min(len(ids) - 1, len(kept.ids))
    while position < end and ids[position] == kept.ids[position]:
        if ids[position] != image_token:
            position += 1
            continue
        same = list(kept.pictures[num_pictures : num_pictures + 1]) == list(pictures[num_pictures : num_pictures + 1])
        if not same or position + width > end:
            break
        position, num_pictures = position + width, num_pictures + 1
    return position


def _is_prefix(one: Prefix, other: Prefix) -> bool:
    return other.ids[: len(one.ids)] == one.ids and other.pictures[: len(one.pictures)] == one.pictures
