"""Reading the records whose pictures are to be looked at, ahead of the one who looks; nothing is decoded twice."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from minigpt4.data.batches import SourceBatches
from minigpt4.data.examples import pixel_values
from minigpt4.errors import DataError, ImageError, PromptError
from minigpt4.training.feature_store import FeatureStore
from minigpt4.training.stopping import any_number_of_readers, begin_reading, end_reading

CHUNK = 8
"""Neighbouring records are read by one worker: they often show the same picture, and lie together on the disk."""


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
        prompts = self._batches.prompts
        try:
            record = self._batches.record(source, number)
            self._batches.encoded(record, prompts[0] if prompts else "")  # all its texts: one bad makes it bad
        except (DataError, PromptError) as error:
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
            return Read(source, number, digest, reason=error.message)


def read_ahead(
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
        DataError: A process that reads ended.
    """
    with any_number_of_readers():
        loader: Any = DataLoader(
            _Chunks(batches, numbers, store, fresh),
            batch_size=None,
            collate_fn=list,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            worker_init_fn=begin_reading,
        )
        chunks = iter(loader)
    try:
        while True:
            try:
                chunk = next(chunks)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader" not in str(error):
                    raise
                raise DataError(
                    f"a process that reads pictures ended: {' '.join(str(error).split())}",
                    hint="it is often out of memory: fewer workers; what was computed is kept",
                ) from error
            yield from chunk
    finally:
        end_reading(chunks)
