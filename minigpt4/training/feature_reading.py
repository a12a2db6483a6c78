"""Reading the records whose pictures are to be looked at, ahead of the one who looks; nothing is decoded twice."""

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from minigpt4.data.batches import SourceBatches
from minigpt4.data.examples import pixel_values
from minigpt4.data.memory import lacks_memory, memory_for_record
from minigpt4.errors import DataError, ImageError, PromptError
from minigpt4.training.feature_store import FeatureStore
from minigpt4.training.readers import read_ahead

CHUNK = 8
"""Neighbouring records are read by one worker: they often show the same picture, and lie together on the disk."""
CHUNKS_AHEAD = 2
"""That each reader has ready."""


@dataclass(frozen=True)
class Read:
    """What was found in a record.

    Args:
        source: Number of its source.
        number: Its own there.
        digest: The sha256 of its encoded picture; None without one, and where the record is bad besides its picture.
        pixels: `(3, height, width)`; None where the picture was opened before, or cannot be.
        reason: Why the record or its picture cannot be used; None where it can.
    """

    source: int
    number: int
    digest: bytes | None = None
    pixels: Tensor | None = None
    reason: str | None = None


class _Chunks(Dataset[list[Read]]):
    def __init__(self, batches: SourceBatches, numbers: np.ndarray, store: FeatureStore, fresh: set[bytes]) -> None:
        self._batches = batches
        self._numbers = numbers
        self._store = store
        self._fresh = fresh
        self._opened: set[bytes] = set()

    def __len__(self) -> int:
        return -(-len(self._numbers) // CHUNK)

    def __getitem__(self, item: int) -> list[Read]:
        return [self._read(int(s), int(n)) for s, n in self._numbers[item * CHUNK : (item + 1) * CHUNK]]

    def _read(self, source: int, number: int) -> Read:
        with memory_for_record(self._batches.sources[source].name, number):
            return self._looked_at(source, number)

    def _looked_at(self, source: int, number: int) -> Read:
        prompts = self._batches.prompts
        try:
            record = self._batches.record(source, number)
            self._batches.encoded(record, prompts[0] if prompts else "")  # all its texts: one bad makes it bad
        except (DataError, PromptError) as error:
            if lacks_memory(error):
                raise
            return Read(source, number, reason=error.message)
        if record.picture is None:
            return Read(source, number)
        digest = hashlib.sha256(record.picture).digest()
        if digest in self._store or digest in self._fresh or digest in self._opened:
            return Read(source, number, digest)
        self._opened.add(digest)
        try:
            return Read(source, number, digest, pixel_values(record, self._batches.layout.processor, None))
        except ImageError as error:
            if lacks_memory(error):
                raise
            return Read(source, number, digest, reason=error.message)


def read_records(
    batches: SourceBatches, numbers: np.ndarray, store: FeatureStore, fresh: set[bytes], workers: int
) -> Iterator[Read]:
    """Read records and open the pictures that are in no shard yet.

    Args:
        batches: Of the stage.
        numbers: `(records, 2)`: source and number of each.
        store: Pictures that need not be opened.
        fresh: Others of them, by digest.
        workers: Processes that read.

    Yields:
        The records in their order.

    Raises:
        DataError: A process that reads ended, or there was not enough memory for a record.
    """
    chunks = _Chunks(batches, numbers, store, fresh)
    with closing(read_ahead(chunks, workers, ahead=CHUNKS_AHEAD)) as read:
        for chunk in read:
            yield from chunk
